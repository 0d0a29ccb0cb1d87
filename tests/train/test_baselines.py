"""The baselines of a nested run are what the loop trains, and are judged alike; what is
said of them is what all seeds show."""

import threading

import numpy as np
import pytest
import support
from pictures import assert_all_is_inside, bands_of

from configs import common
from lowrank_jax import checkpoint
from train import baselines, opening
from train.config import to_json
from train.report import comparisons
from train.run import open_run
from train.tasks.classification import classification

FRACTIONS = (1.0, 0.5)
SEEDS = (3, 4)


def make_config(**changes):
    """One phase of two sizes, for eight steps."""
    values = {
        "name": "nested",
        "until": {"epochs": 2},
        "sampler": common.named("matryoshka", fractions=FRACTIONS),
        "sizes": "static",
        "pass_parts": 5,
        "teacher": common.named("full", target_weight=0.0),
        "optimizer": common.optimizer("adamw", learning_rate=1e-2, weight_decay=0.1),
    }
    keys = {
        key: changes.pop(key) for key in [*changes] if key in common.phase(**values)
    }
    return support.make_config(
        common.phase(**{**values, **keys}),
        model={"name": "mlp", "args": {"hidden": (16,)}},
        rank_rules=changes.pop("rank_rules", (("head", "dense"), (".*", "full"))),
        **changes,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> opening.Opened:
    """A nested run, trained and opened."""
    workdir = tmp_path_factory.mktemp("nested") / "run"
    support.train(make_config(), workdir)
    return opening.open_model(workdir)


def kinds(whole: opening.Opened) -> dict[str, baselines.Kind]:
    found = baselines.kinds(whole.run.config, SEEDS, [0.5, 0.25])
    assert [(kind.alone, list(kind.seeds)) for kind in found] == [
        (None, [4]),
        (None, [3, 4]),
        (0.5, [3, 4]),
        (0.25, [3, 4]),
    ]
    names = ("nested", "dense", "half", "quarter")
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(
    "name",
    ["dense", *(pytest.param(x, marks=pytest.mark.slow) for x in ("nested", "half"))],
)
def test_each_is_what_the_loop_trains(whole, tmp_path, name):
    """From the second seed, by the same steps on the same batches."""
    kind = kinds(whole)[name]
    run = whole.run._replace(config=kind.config)
    trained = dict(baselines.trained(run, kind.seeds, threading.Event()))
    assert list(trained) == list(kind.seeds)
    saved = support.train({**kind.config, "seed": SEEDS[-1]}, tmp_path / "run")
    arrays = support.stored_arrays(saved)
    params = checkpoint.flatten(checkpoint.model_items(trained[4])["params"])
    assert params
    for key, array in params.items():
        np.testing.assert_allclose(array, arrays[f"params/{key}"], atol=2e-5)


def test_all_are_judged_at_equal_costs(whole, capsys):
    """A row of each seed and size; the run's own is its first, dense ones cut by SVD
    cost what nested ones do, and those trained alone what that size costs."""
    series = baselines.compare(whole, seeds=2, fractions=FRACTIONS, alone=[0.5])
    assert list(series) == [baselines.NESTED, baselines.DENSE, baselines.ALONE]
    of = {
        (name, row["seed"], row["rank_fraction"]): row
        for name, rows in series.items()
        for row in rows
    }
    assert len(of) == sum(map(len, series.values())) == 4 + 4 + 2
    own = whole.sweep(FRACTIONS)
    for row, fraction in zip(own, FRACTIONS, strict=True):
        ours = of[baselines.NESTED, 3, fraction]
        assert {key: ours[key] for key in row} == row
        for (_, _, size), other in of.items():
            if size == fraction:
                keys = ("params", "macs", "ranks")
                assert [other[key] for key in keys] == [row[key] for key in keys]
    losses = [row["loss"] for row in of.values()]
    assert len(set(losses)) == len(losses) and np.isfinite(losses).all()
    dense = whole.run._replace(config=kinds(whole)["dense"].config)
    ((_, model),) = baselines.trained(dense, [3], threading.Event())
    judged = opening.Opened(dense, model).figures()
    assert of[baselines.DENSE, 3, 1.0]["loss"] == pytest.approx(judged["loss"], 1e-4)
    assert "baselines: 5 models ..." in capsys.readouterr().err


def test_one_seed_has_no_baselines(whole, capsys):
    series = baselines.compare(whole, seeds=1, fractions=FRACTIONS, alone=[0.5])
    assert list(series) == [baselines.NESTED] and len(series[baselines.NESTED]) == 2
    assert "no baselines: --seeds is 1" in capsys.readouterr().err


LASSO = common.named("hierarchical_group_lasso", weight=1e-3)
FULL = {"sampler": common.named("full"), "teacher": common.named("none")}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, ""),
        (
            FULL | {"sizes": "masked", "pass_parts": 1},
            "it trains one size alone",
        ),
        (
            {"penalties": (LASSO,), "on_end": (common.named("merge"),)},
            "its recipe has penalties, on_end",
        ),
        ({"init_from": "a"}, "its recipe has init_from"),
        (
            {"rank_rules": (("head", "dense"), (".*", {"max_rank": 3}))},
            "its rank rules are more than full and dense",
        ),
    ],
)
def test_what_has_no_baselines_says_why(changes, reason):
    config = to_json(make_config(**changes))
    assert baselines.misfit(config) == reason
    config["phases"] *= 2
    assert baselines.misfit(config) == "it has 2 phases"


def rows(*figures: tuple[float, ...]) -> list[dict[str, float]]:
    """Seeds' figures at the fractions 1, 0.5 and 0.25."""
    return [
        {
            "seed": seed,
            "rank_fraction": fraction,
            "params": int(100 * fraction),
            "macs": int(80 * fraction),
            "accuracy": figure,
        }
        for seed, of_seed in enumerate(figures)
        for fraction, figure in zip((1.0, 0.5, 0.25), of_seed, strict=True)
    ]


@pytest.fixture(scope="module")
def task():
    facts = open_run(to_json(make_config())).data.facts
    return classification(facts, mean=(0.0,), std=(1.0,), augment=())


SERIES = {
    "ours": rows((0.9, 0.9, 0.8), (0.92, 0.8, 0.9)),
    "theirs": rows((0.95, 0.84, 0.3), (0.93, 0.84, 0.5)),
}


def test_findings_are_what_every_seed_shows(task):
    """Bands that touch tell nothing apart; lower may be better."""
    (line,) = comparisons.findings(SERIES, task)
    assert line == (
        "ours, against theirs: better at 0.25 (by 0.45); worse at 1 (by 0.03); not told"
        " apart at 0.5 (by 0.01)."
    )
    lower = task._replace(higher_is_better=False)
    (line,) = comparisons.findings(SERIES, lower)
    assert "better at 1" in line and "worse at 0.25" in line


def test_the_table_has_a_row_for_each_size(task):
    lines = comparisons.table(SERIES, task).splitlines()
    assert lines[0].split() == ["size", "cheapest", "MACs", "ours", "theirs"]
    last = "0.25 25 20 0.85 (0.8 to 0.9) 0.4 (0.3 to 0.5)"
    assert lines[-1].split() == last.split()


def test_the_picture_has_a_band_for_each_series(task, tmp_path, capsys):
    """What is printed says what is drawn: bands that are apart at the smallest."""
    note = "digits, 360 test examples, mean of 2 seeds, band from least to greatest"
    drawing = comparisons.picture_of(SERIES, task, note)
    for panel in drawing.axes:
        assert [line.get_label() for line in panel.lines] == ["ours", "theirs"]
        ours, theirs = bands_of(panel)
        at = ours[:, 0].min()
        assert theirs[theirs[:, 0] == at, 1].max() < ours[ours[:, 0] == at, 1].min()
    assert drawing.get_supxlabel() == note
    assert_all_is_inside(drawing)
    picture = tmp_path / "frontier.svg"
    comparisons.show(SERIES, task, picture, about="digits, 360 test examples")
    printed = capsys.readouterr().out
    assert note in printed and "ours, against theirs: better at 0.25" in printed
    assert picture.exists()
