"""The benchmarks run, on models of a few numbers."""

import contextlib
import pathlib
import subprocess
import sys

import loop_configs
import numpy as np
import pytest
from flax import nnx
from support import compiled_anew

from benchmarks import (
    any_rank,
    elastic,
    host_time,
    import_time,
    inference,
    input_share,
    latency,
    peers,
    penalty_time,
    recompilation,
    report,
    scaling,
    search_speed,
    selectors,
    step_time,
    subjects,
    truncation,
)
from configs import common
from examples import serve_digits
from lowrank_jax import checkpoint, factorize
from lowrank_jax.errors import UserError
from lowrank_jax.penalties import PENALTIES
from train import loop, opening, start
from train.config import to_json
from train.models import mlp
from train.run import open_run
from train.source import Source


@pytest.fixture(scope="module")
def dense() -> nnx.Module:
    rngs = nnx.Rngs(0)
    return mlp.build(image_shape=(4, 4, 1), num_classes=10, rngs=rngs, hidden=(6,))


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_is_timed(dense, name):
    """Its arguments fit it, and value and gradient are computed."""
    model = factorize(dense, [(".*", {"with_s": True})])
    arguments = penalty_time.arguments(model)
    assert arguments.keys() == PENALTIES.keys()
    assert penalty_time.make_timer(model, name, arguments[name])() > 0


def test_variants_of_the_step_are_timed(dense):
    """Dense, at full rank and shrunk; the ratio of the first to itself is 1."""
    subject = subjects.Subject(dense, *subjects.images((4, 4, 1), 8))
    rows = step_time.measure(subject, "^full|parts|shrunk", rounds=2, count=1)
    assert len(rows) == 5
    assert rows["dense"]["ratio"] == rows["dense"]["flops_ratio"] == 1
    assert all(np.isfinite(row["ms"]) and row["mib"] > 0 for row in rows.values())


def test_imports_are_timed():
    """In fresh processes, which must end well."""
    assert import_time.make_timer("import sys")(2) > 0
    with pytest.raises(subprocess.CalledProcessError):
        import_time.make_timer("import lowrank_jax.nowhere")(1)
    assert import_time.BASE in import_time.PROGRAMS


def test_models_that_are_cut_are_timed(dense):
    """At batch 1 and at the whole one; dense is its own measure."""
    subject = subjects.Subject(dense, *subjects.images((4, 4, 1), 8))
    figures = inference.measure(subject, rounds=2, calls=1)
    assert figures.keys() == {1, 8}
    for rows in figures.values():
        assert rows["dense"]["of_promise"] == rows["dense"]["macs"] == 1
        macs = [row["macs"] for row in rows.values()]
        assert macs == sorted(macs, reverse=True) and macs[-1] < 0.5


def test_predicted_times_stand_beside_measured_ones(dense):
    """Of three rank vectors, and of one that a share of the time is asked for, if it
    can be had."""
    subject = subjects.Subject(dense, *subjects.images((4, 4, 1), 8))
    rows = latency.measure(subject, share=1.0, rounds=1, table=None)
    assert len(rows) in (3, 4)
    for row in rows.values():
        assert row["measured"] > 0 and 0 < row["predicted"] <= 1


def test_sizes_are_timed_beside_models_that_are_cut(dense):
    """Each at both batches; one set of weights is the largest size's, not all."""
    subject = subjects.Subject(dense, *subjects.images((4, 4, 1), 8))
    found = elastic.measure_calls(subject, (1, 8), rounds=2, calls=1)
    for rows in found.values():
        assert list(rows) == ["1", "0.5", "0.25", "0.125"]
        for row in rows.values():
            assert row["cut_ms"] > 0 < row["views"] and row["slices"] > 0
    row = elastic.measure_switching(subject, rounds=2, calls=1)
    assert row["kib"] == row["largest_kib"] < row["all_kib"]
    assert np.isfinite(row["switch_us"]) and row["staying_us"] > 0


def test_the_server_is_asked_while_its_size_changes(tmp_path):
    """Rows by default size; requests that begin before a switch may run after it."""
    config = loop_configs.make_config(loop_configs.phase(3))
    loop.train_and_evaluate(config, tmp_path / "run")
    served = serve_digits.load(tmp_path / "run", (1.0, 0.25), batches=(1, 4))
    with elastic.serving(*served) as port:
        rows = elastic.measure_load(port, ["1", "0.25"], clients=3, seconds=0.3)
    assert list(rows) == ["1", "0.25"]
    assert "1" in rows["1"]["ran"].split() and rows["0.25"]["ran"] == "0.25"
    for row in rows.values():
        assert row["failed"] == 0 < row["requests_per_s"]
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["put_ms"] > 0


def test_the_time_on_the_host_is_what_calls_take_longer():
    figures = host_time.measure(leaves=20, steps=10, rounds=1)
    assert figures["leaves"] >= 20
    between = figures["called_ms"] - figures["compiled_ms"]
    assert figures["host_ms"] == pytest.approx(between)


def test_the_wait_for_batches_is_a_share(tmp_path):
    """Between nothing and all of a step's time."""
    config = loop_configs.make_config(loop_configs.phase(3))
    with contextlib.ExitStack() as resources:
        session, _ = start.start_run(config, tmp_path / "run", resources)
        batches = resources.enter_context(
            contextlib.closing(session.run.batches_from(0))
        )
        figures = input_share.share_of(session, batches, 2)
    assert 0 <= figures["waiting"] < 1
    assert figures["step_ms"] > 0
    assert input_share.batch_alone(session.run, 2) > 0


def test_ranks_between_the_trained_ones_are_judged(tmp_path):
    """The trained fractions lose nothing to the line between them, and full ranks are
    an upper bound of the drawn ones."""
    config = loop_configs.make_config(loop_configs.phase(3))
    loop.train_and_evaluate(config, tmp_path / "run")
    opened = opening.open_model(tmp_path / "run")
    found = any_rank.measure(
        opened, "validation", trained=(1.0, 0.5, 0.25), count=5, vectors=3
    )
    rows = {row["fraction"]: row for row in found["fractions"]}
    assert list(rows) == [1.0, 0.7071, 0.5, 0.3536, 0.25]
    assert all(rows[f]["loss_lost"] == 0 for f in (1.0, 0.5, 0.25))
    line = (
        rows[0.5]["accuracy"] + (rows[1.0]["accuracy"] - rows[0.5]["accuracy"]) * 0.4142
    )
    lost = line - rows[0.7071]["accuracy"]
    assert rows[0.7071]["accuracy_lost"] == pytest.approx(lost, abs=1e-6)
    assert all(row["macs"] <= rows[1.0]["macs"] for row in found["vectors"])
    ((name, *_), _) = any_rank.quartiles(found["vectors"])
    assert name == "loss"


def test_selectors_are_judged_within_their_budgets(tmp_path):
    """Each at each budget that rank 1 everywhere fits; the whole budget is no cut, and
    what looks at the loss is no worse than what does not, on what it has seen."""
    config = loop_configs.make_config(loop_configs.phase(3))
    loop.train_and_evaluate(config, tmp_path / "run")
    step = checkpoint.open_checkpoint(tmp_path / "run").path
    source = Source(step, None, [])
    named = ("macs_fraction", "knapsack:curve=loss", "greedy:steps=4")
    found = selectors.measure(source, named, (1.0, 0.4, 1e-6))
    for rows in found.values():
        assert [row["budget"] for row in rows] == [1.0, 0.4]
        assert rows[0]["ranks"] == source.ranks
        layers = source.cost.layers
        dense = sum(layer.dense_macs for layer in layers.values())
        macs = sum(layers[p].macs(r) for p, r in rows[1]["ranks"].items())
        assert macs <= 0.4 * dense
    score = source.context().score
    uniform, greedy = (
        score([found[name][1]["ranks"]])[0] for name in (named[0], named[2])
    )
    assert greedy >= uniform
    headers, *cells = selectors.table(found, "loss")
    assert headers == ["selector", "1", "0.4", "s"]
    assert [row[0] for row in cells] == list(named)


def test_searches_are_timed_with_what_is_compiled():
    """Vectors drawn for one round, and a beam, by one program."""
    config = loop_configs.make_config(loop_configs.phase(1))
    with compiled_anew():
        beam = {**search_speed.BEAM, "width": 1, "steps": 2}
        run = open_run(to_json(config))
        figures = search_speed.measure(run, count=8, rounds=1, beam=beam)
    assert figures["traced"] == figures["compiled"] == 1
    assert figures["layers"] == 2 and figures["examples"] == 1177 // 600 * 600
    for name in ("vectors_per_second", "first_seconds", "beam_seconds"):
        assert figures[name] > 0


@pytest.mark.slow
@pytest.mark.parametrize("cold", [False, True])
def test_large_cuts_are_measured(tmp_path, cold):
    """In processes of their own; what they keep is a quarter, and nothing stays."""
    found = truncation.measure(tmp_path, 1e5, rounds=1, pause=0.0, cold=cold)
    assert found.keys() == truncation.SELECTORS.keys()
    layer = 4 * truncation.width(1e5) ** 2
    for row in found.values():
        assert row["layer"] == layer and 0 < row["bytes"]
        assert 0.2 < row["kept"] / (truncation.LAYERS * layer) <= 0.27
        assert 0 < row["seconds"] < row["whole_seconds"]
        assert 0 < row["floor"] and 0 < row["floor_reading_all"]
    headers, *cells = truncation.table(found)
    assert all(len(row) == len(headers) for row in cells)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_forms_are_timed_against_width_and_depth():
    """Beside a law that counts an eighth of the ranks as less than a half."""
    rows = scaling.measure(32, 2, 8, rounds=2, steps=1)
    assert rows.keys() == scaling.FORMS.keys()
    assert rows["dense"]["ratio"] == rows["dense"]["law"] == 1
    squares = {f"hidden/{n}": 4 for n in (0, 1)}
    macs = 4 * (256 + 32) + 4 * (32 + 32) + 32 * 10
    assert scaling.law(32, 2, 8, squares) == macs
    assert rows["0.125"]["law"] < rows["0.5"]["law"]


@pytest.mark.slow
def test_what_is_compiled_after_the_first_step_is_lost(tmp_path):
    """The step once more where layers shrink, whatever else is compiled with it."""
    shrinking = loop_configs.phase(
        8,
        sampler=common.named("single_layer"),
        penalties=(loop_configs.lasso(0.05),),
        shrink=loop_configs.SHRINK,
    )
    config = loop_configs.make_config(shrinking)

    def train():
        with compiled_anew():
            loop.train_and_evaluate(config, tmp_path / "run")

    figures = recompilation.measure(train)
    assert figures["steps_compiled"] == 2
    assert figures["compiling_before"] > 0 < figures["compiling_after"]
    assert 0 < figures["lost"] < 1


def test_tables_are_put_in_their_places():
    """Where one of this name stands, else at the end; the rest of the page stays."""
    page = "# Title\n"
    for name, text in (("a", "first"), ("b", "second"), ("a", "third")):
        page = report.placed(page, name, text)
    assert page == (
        "# Title\n\n<!-- a -->\nthird\n<!-- end -->\n"
        "\n<!-- b -->\nsecond\n<!-- end -->\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet", "resnet18", "shakespeare:cpu"])
def test_pytorch_takes_the_same_steps(name):
    """Its networks have as many parameters as ours, dense and factored."""
    python = pathlib.Path(__file__).parents[1] / ".venv-peers/bin/python"
    if not python.exists():
        pytest.skip("needs PyTorch in .venv-peers: run `make peers`")
    with peers.started(str(python), name, 2) as peer:
        rows = peers.measure(subjects.make(name, 2), peer, rounds=1, steps=1)
    assert [row["step"] for row in rows] == list(peers.OURS)
    assert all(row["pytorch_ms"] > 0 for row in rows)


def test_a_peer_that_is_not_there_is_named():
    with pytest.raises(UserError, match="--python: must be an interpreter"):
        with peers.started("no/python", "lenet", 2):
            pass


def test_a_peer_that_cannot_run_is_named():
    """This interpreter has no PyTorch."""
    with pytest.raises(
        UserError, match="--python: must run peers_torch.py, got status"
    ):
        with peers.started(sys.executable, "lenet", 2):
            pass
