"""Draws the pictures of docs/concepts.md, the same bytes every time.

`python docs/drawings/draw.py` writes the SVG files beside this one. Colours are Okabe
and Ito's, as in train/report/plots.py; the background is white, so that dark pages show
them too. Widths leave room for the widest of the usual fonts.
"""

from collections.abc import Callable
from pathlib import Path

from canvas import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    WHITE,
    Drawing,
    Point,
)

from lowrank_jax.cost import LayerCost
from lowrank_jax.forms.gauge import GaugeCost

MASKED = {"fill": "#F4F4F4", "stroke": GREY, "dashed": True}
"""How a column looks that does not act."""


def columns(
    drawing: Drawing,
    corner: Point,
    size: Point,
    colour: str,
    kept: int,
    *,
    down: bool = False,
) -> None:
    """A factor as its columns (its rows, `down`), `kept` of six; the others pale."""
    (x, y), (width, height) = corner, size
    for number in range(6):
        look = {"fill": colour, "opacity": 1 - 0.12 * number}
        if number >= kept:
            look = MASKED
        if down:
            step = height / 6
            drawing.box(x, y + number * step, width, step, **look)
        else:
            step = width / 6
            drawing.box(x + number * step, y, step, height, **look)


def factors() -> Drawing:
    """A layer's matrix, its factors, the rank axis and a cut."""
    d = Drawing(330, "A matrix W as u times diag |s| times v, cut at rank 3 of 6")
    d.text(20, 28, "W = u · diag(|s|) · v", size=17, bold=True)
    d.box(40, 70, 120, 160, FAINT)
    d.text(100, 155, "W", size=22, anchor="middle")
    d.text(30, 155, "m", anchor="end")
    d.text(100, 62, "n", anchor="middle")
    d.text(100, 252, "dense kernel,", anchor="middle")
    d.text(100, 270, "m n numbers", anchor="middle")
    d.text(190, 156, "=", size=22, anchor="middle")
    columns(d, (240, 70), (108, 160), BLUE, 6)
    d.text(230, 155, "m", anchor="end")
    d.text(268, 252, "u: inputs to rank", anchor="middle", colour=BLUE, bold=True)
    d.text(380, 156, "·", size=26, anchor="middle")
    d.box(410, 70, 108, 108)
    for number in range(6):
        d.box(
            410 + 18 * number,
            70 + 18 * number,
            18,
            18,
            GREEN,
            opacity=1 - 0.12 * number,
        )
    d.text(464, 252, "|s|: scales, optional", anchor="middle", colour=GREEN, bold=True)
    d.text(550, 156, "·", size=26, anchor="middle")
    columns(d, (590, 70), (120, 108), RED, 6, down=True)
    d.text(650, 62, "n", anchor="middle")
    d.text(650, 252, "v: rank to outputs", anchor="middle", colour=RED, bold=True)
    for line in (
        [(294, 52), (294, 236)],
        [(410, 124), (464, 124), (464, 70)],
        [(584, 124), (720, 124)],
    ):
        d.line(line, width=2.5, dashes="7 4")
    d.text(294, 46, "cut at rank 3", anchor="middle", bold=True)
    d.line([(240, 290), (346, 290)], arrow=True)
    d.text(356, 295, "the rank axis, most important column first:")
    d.text(356, 315, "what stands before a cut is a smaller model")
    return d


def ranks() -> Drawing:
    """The active and the allocated rank: whole, masked, cut."""
    d = Drawing(330, "Whole, masked and cut factors: the active and the allocated rank")
    titles = ("whole", "masked", "cut")
    notes = (
        ("active 6 of", "allocated 6"),
        ("active 3 of", "allocated 6"),
        ("active 3 of", "allocated 3"),
    )
    for number, (title, note) in enumerate(zip(titles, notes, strict=True)):
        x, kept = 30 + 260 * number, 6 if title == "whole" else 3
        d.text(x, 30, title, size=17, bold=True)
        if title == "cut":
            for column in range(3):
                opacity = 1 - 0.12 * column
                d.box(x + 16 * column, 50, 16, 130, BLUE, opacity=opacity)
                d.box(x + 110, 50 + 16 * column, 80, 16, RED, opacity=opacity)
        else:
            columns(d, (x, 50), (96, 130), BLUE, kept)
            columns(d, (x + 110, 50), (80, 96), RED, kept, down=True)
        d.lines(x + 110, 166, note)
    d.line([(226, 98), (278, 98)], PINK, width=3, arrow=True)
    d.line([(278, 122), (226, 122)], PINK, width=3, arrow=True)
    d.line([(488, 110), (538, 110)], INK, width=3, arrow=True)
    d.lines(
        30,
        222,
        (
            "set_ranks, at_ranks, samplers",
            "move the active rank, both ways.",
            "Nothing recompiles.",
        ),
        colour=INK,
    )
    d.lines(
        290,
        222,
        (
            "Pale columns stay in memory,",
            "add nothing to the output and",
            "get a gradient of exactly zero.",
        ),
    )
    d.lines(
        550,
        222,
        (
            "truncate and shrink:",
            "smaller arrays, and",
            "no column comes back.",
        ),
    )
    d.box(30, 285, 14, 14, BLUE)
    d.text(50, 297, "u")
    d.box(75, 285, 14, 14, RED)
    d.text(95, 297, "v")
    d.box(120, 285, 14, 14, **MASKED)
    d.text(140, 297, "masked: allocated, but not active")
    return d


SHAPE = (256, 512)
"""Of the matrix whose forms are compared, m and n."""


def forms() -> Drawing:
    """Three forms of a layer and what they cost at every rank."""
    rows, outs = SHAPE
    plain, gauge = LayerCost(*SHAPE, 1, 1, 1, 1), GaugeCost(*SHAPE, 1, 1, 1, 1, 1)
    d = Drawing(
        430, "Numbers of the three forms of a 256 by 512 matrix against the rank"
    )
    d.text(20, 28, "What a layer costs at a rank", size=17, bold=True)
    d.text(20, 48, f"a {rows} x {outs} matrix; numbers stored, and MACs of an example")

    def place(rank: float, share: float) -> Point:
        return 70 + 400 * rank / rows, 370 - 190 * share

    for share in (0, 0.5, 1, 1.5):
        d.line([place(0, share), place(rows, share)], FAINT)
        d.text(62, place(0, share)[1] + 5, f"{share:g}", anchor="end")
    for rank in range(0, rows + 1, 64):
        d.text(place(rank, 0)[0], 390, str(rank), anchor="middle")
    d.text(270, 412, "rank r", anchor="middle")
    d.text(20, 72, "share of the dense matrix")
    even = rows * outs / (rows + outs)
    d.line([place(even, 0), place(even, 1)], GREY, dashes="3 3")
    x, y = place(even, 1)
    d.line([place(0, 1), place(rows, 1)], INK, width=3, dashes="8 5")
    curves = ((plain, BLUE, ""), (gauge, GREEN, "10 4 3 4"))
    for cost, colour, dashes in curves:
        shares = [cost.form_params(r) / cost.dense_params for r in range(rows + 1)]
        points = (place(rank, share) for rank, share in enumerate(shares))
        d.line(points, colour, width=3, dashes=dashes)
    d.box(x - 5, y - 5, 10, 10, WHITE)
    d.text(x - 12, y - 14, "break-even: r = m n / (m + n)", anchor="end")
    texts = (
        (BLUE, "factored", "r (m + n)", "trained, and can be cut again"),
        (INK, "merged", "m n", "one dense product; plain Flax"),
        (GREEN, "gauge", "r (m + n - r)", "for deployment: below dense,"),
    )
    for number, (colour, name, formula, note) in enumerate(texts):
        y = 110 + 88 * number
        d.line(
            [(500, y - 5), (530, y - 5)],
            colour,
            width=4,
            dashes=("", "8 5", "10 4 3 4")[number],
        )
        d.text(540, y, name, colour=colour, bold=True)
        d.text(620, y, formula)
        d.text(500, y + 22, note)
    d.text(500, 326, "but at full rank; cannot be")
    d.text(500, 344, "cut again")
    return d


PROFILES = {
    "one fraction of every rank": (
        (16, 16, 24, 20, 12),
        (8, 8, 12, 10, 6),
        (4, 4, 6, 5, 3),
    ),
    "a family: ranks chosen layer by layer": (
        (16, 16, 24, 20, 12),
        (13, 9, 8, 8, 11),
        (8, 4, 4, 3, 8),
    ),
}
"""Ranks of five layers at three sizes, as an example."""


def nesting() -> Drawing:
    """Profiles of layers, one within the other: fractions, and a family."""
    d = Drawing(
        330, "Nested ranks of five layers at three sizes, two ways to choose them"
    )
    shades = (SKY, BLUE, ORANGE)
    for number, (title, profiles) in enumerate(PROFILES.items()):
        x = 70 + 370 * number
        d.text(x - 40, 30, title, size=15, bold=True)
        for layer in range(5):
            y = 52 + 38 * layer
            d.text(x - 8, y + 19, "abcde"[layer], anchor="end")
            for size, profile in enumerate(profiles):
                # the smaller a size, the lower its bar: all begin at column 1
                d.box(x, y, 11 * profile[layer], 28, shades[size])
        d.line([(x, 250), (x + 264, 250)], arrow=True)
        d.text(x, 268, "rank: columns from the first on", size=13)
    names = ("a quarter", "a half: these and those before", "the whole model: all")
    for x, name, shade in zip((70, 180, 440), names, shades[::-1], strict=True):
        d.box(x, 290, 14, 14, shade)
        d.text(x + 20, 302, name)
    return d


def phases() -> Drawing:
    """A run: what each phase trains with, and where the shapes change."""
    d = Drawing(392, "A run of three phases: ranks, samplers, penalties, actions")
    d.text(20, 28, "A run is a list of phases", size=17, bold=True)
    bounds, names = (150, 280, 570, 735), ("dense", "low_rank", "fine_tune")
    spans = list(zip(bounds, bounds[1:], strict=False))
    for (left, right), name in zip(spans, names, strict=True):
        d.box(left, 45, right - left, 26, FAINT)
        d.text((left + right) / 2, 63, name, anchor="middle", bold=True)
    d.text(138, 130, "stored rank", anchor="end")
    d.text(215, 130, "kernels", anchor="middle", colour=GREY)
    d.line([(150, 172), (740, 172)], GREY)
    steps = ((360, 112), (440, 132), (520, 142), (570, 160))
    stairs = [(280, 92)]
    for x, y in steps:
        stairs += [(x, stairs[-1][1]), (x, y)]
    d.line([*stairs, (735, 160)], BLUE, width=3)
    for x, y in steps[:3]:
        d.line([(x, y), (x, 184)], BLUE, dashes="2 3")
    cells = (
        ("shrink", BLUE, ("no", "every epoch: tail_ranks", "no")),
        ("sampler", ORANGE, ("full", "single_layer", "full")),
        ("penalties", PINK, ("none", "hierarchical_group_lasso", "none")),
        ("optimizer_state", GREEN, ("new", "kept", "new")),
    )
    for number, (label, colour, row) in enumerate(cells):
        y = 202 + 34 * number
        d.text(138, y, label, anchor="end")
        for (left, right), cell in zip(spans, row, strict=True):
            opacity = 0.12 if cell in ("none", "no", "full") else 0.45
            d.box(
                *(left + 3, y - 18, right - left - 6, 26),
                colour,
                opacity=opacity,
                stroke=colour,
                round=4,
            )
            d.text((left + right) / 2, y, cell, anchor="middle", size=13)
    for x in bounds[1:]:
        d.line([(x, 45), (x, 332)], RED, width=2)
    d.text(138, 352, "on_end", anchor="end", colour=RED)
    d.text(280, 352, "factorize", anchor="middle", colour=RED)
    d.text(570, 352, "truncate", anchor="middle", colour=RED)
    d.text(738, 352, "recalibrate", anchor="end", colour=RED)
    note = "shapes change at factorize, truncate and shrinks alone"
    d.text(738, 378, note, anchor="end", size=13)
    return d


STEP = (
    ("sampler", "draws the ranks", ORANGE),
    ("passes", "whole first, then", BLUE),
    ("loss", "task, teacher,", PINK),
    ("optimizer", "updates what is", GREEN),
    ("projections", "set the factors", RED),
)
SECOND_LINES = (
    "of every pass",
    "masked or cut",
    "+ penalties",
    "trainable",
    "to a constraint",
)


def step() -> Drawing:
    """A step: what is in its one program, and what stays outside."""
    d = Drawing(330, "The training step and what happens between two steps")
    d.box(20, 20, 720, 170, FAINT, opacity=0.35, dashed=True, round=8)
    d.text(36, 44, "one jitted step: ranks are data, shapes never change", bold=True)
    for number, (name, first, colour) in enumerate(STEP):
        x = 36 + 140 * number
        d.box(x, 70, 124, 78, colour, opacity=0.25, stroke=colour, round=6)
        d.text(x + 62, 92, name, anchor="middle", bold=True)
        d.text(x + 62, 115, first, anchor="middle", size=13)
        d.text(x + 62, 134, SECOND_LINES[number], anchor="middle", size=13)
        if number < 4:
            d.line([(x + 124, 109), (x + 139, 109)], width=2, arrow=True)
    state = "parameters, BatchNorm, moments, states of sampler, penalties, projections"
    d.text(36, 175, f"carried from step to step: {state}", size=13)
    d.line([(658, 190), (658, 240)], width=2, arrow=True)
    d.line([(98, 240), (98, 192)], width=2, arrow=True)
    d.box(20, 240, 720, 72, SKY, opacity=0.25, stroke=SKY, round=8)
    d.text(36, 264, "between two steps, when due: shapes may change", bold=True)
    d.text(
        36,
        290,
        "shrink or end the phase → evaluate at several ranks → save → next batch",
    )
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    drawing.__name__: drawing
    for drawing in (factors, ranks, forms, nesting, phases, step)
}
"""By the name of the file."""


if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw().svg())
