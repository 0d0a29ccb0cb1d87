"""An SVG picture, element by element: what draw.py draws with."""

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

BLUE, RED, GREEN, PINK, ORANGE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
INK, GREY, FAINT, WHITE = "#333333", "#8A8A8A", "#E3E3E3", "#FFFFFF"
WIDTH = 760

Point = tuple[float, float]


class Drawing:
    """An SVG picture, element by element.

    Args:
      height: In units of which the picture is `WIDTH` wide.
      title: What it shows, for who does not see it.
    """

    def __init__(self, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
            f' width="{WIDTH}" height="{height}" role="img"'
            ' font-family="Helvetica, Arial, sans-serif">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="{WHITE}"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = WHITE,
        *,
        stroke: str = INK,
        opacity: float = 1,
        dashed: bool = False,
        round: int = 0,
    ) -> None:
        dashes = ' stroke-dasharray="6 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
            f' rx="{round}" fill="{fill}" fill-opacity="{opacity:g}"'
            f' stroke="{stroke}"{dashes}/>'
        )

    def line(
        self,
        points: Iterable[Point],
        colour: str = INK,
        *,
        width: float = 1.5,
        dashes: str = "",
        arrow: bool = False,
    ) -> None:
        """A line through points; with an arrow's head at its end."""
        points = list(points)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}"'
            f' stroke-width="{width:g}"{dashed}/>'
        )
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
            along, across = ((x - x0) / length, (y - y0) / length), 4.5
            back = (x - 9 * along[0], y - 9 * along[1])
            corners = [
                (x, y),
                (back[0] - across * along[1], back[1] + across * along[0]),
                (back[0] + across * along[1], back[1] - across * along[0]),
            ]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
            self.parts.append(f'<polygon points="{path}" fill="{colour}"/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        colour: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"'
            f' text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def lines(self, x: float, y: float, texts: Sequence[str], **style) -> None:
        """Lines of text, one under the other."""
        for number, text in enumerate(texts):
            self.text(x, y + 18 * number, text, **style)

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])
