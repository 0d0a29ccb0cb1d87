"""What choosing ranks asks of held-out data: a search tells how it gets on, compiles
once and scores no ranks twice; outputs of layers are measured on the same examples."""

import contextlib
import signal
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import pytest
from flax import nnx
from support import make_config, train

from configs import common
from lowrank_jax import active
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks, at_fraction
from lowrank_jax.selection import choosing
from train import evaluation, narrow, scoring, selecting
from train.report import searches
from train.run import Run, open_run
from train.source import Source
from train.state import split_model
from train.stopping import StopRequested


def test_a_long_search_tells_how_it_is_getting_on(monkeypatch, capsys):
    """Every few seconds by the clock, with its rate and the best loss so far."""
    now = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(searches.time, "monotonic", lambda: next(now))
    progress = searches.SearchProgress()
    for score in (-3.0, -1.5, -2.0, -1.25):
        progress.scored(score)
    assert capsys.readouterr().err.splitlines() == [
        "search: 2 rank vectors, 0.333 a second, loss 1.5 at best",
        "search: 4 rank vectors, 0.333 a second, loss 1.25 at best",
    ]


def test_rank_vectors_are_scored_by_one_program(run, monkeypatch):
    """However many there are: ranks are traced, the model once."""
    source, count, traced = Source(run, None, []), 40, []

    def sums(outputs, batch):
        traced.append(outputs.shape)
        return task.sums(outputs, batch)

    task = source.run.task
    counted = task._replace(sums=sums)
    monkeypatch.setattr(source, "run", source.run._replace(task=counted))
    fractions = [number / count for number in range(1, count + 1)]
    vectors = [at_fraction(source.ranks, fraction) for fraction in fractions]
    scores = source.context().score(vectors)
    assert len(traced) == 1
    assert len(set(scores)) > count / 2 and max(scores) > scores[0]


def of_images(name: str, **args: object) -> tuple[nnx.Module, Run]:
    """A fresh model of every layer at full rank, and its run: two batches of 16."""
    phase = common.phase(
        name="only",
        until={"steps": 1},
        optimizer=common.optimizer("sgd", learning_rate=0.1),
    )
    config = make_config(phase, model={"name": name, "args": args})
    config["data"]["eval_batch_size"] = 16
    run = open_run(config)
    return run.fresh_model(), run


def counting(run: Run) -> tuple[Run, list[None]]:
    """The run, with a list that gets longer with every batch that is judged."""
    task, judged = run.task, []

    def sums(outputs: jax.Array, batch: Mapping[str, jax.Array]):
        jax.debug.callback(lambda: judged.append(None))
        return task.sums(outputs, batch)

    return run._replace(task=task._replace(sums=sums)), judged


def test_no_ranks_are_scored_twice():
    """Whatever their order and types, in one call and in several; ranks that are not
    legal are refused though legal ones that look like them are known."""
    model, run = of_images("mlp", hidden=(6,))
    run, judged = counting(run)
    score = scoring.make_score(model, run)
    one, other = {"hidden/0": 2, "head": 3}, {"hidden/0": 3, "head": 2}
    first = score([one, other, one, {"head": np.int64(3), "hidden/0": np.int32(2)}])
    assert first[0] == first[2] == first[3] != first[1]
    jax.effects_barrier()
    assert len(judged) == 4  # two batches for each of two
    assert score([other, one]) == [first[1], first[0]]
    jax.effects_barrier()
    assert len(judged) == 4
    assert scoring.make_score(model, run)([one]) == [first[0]]  # of another: anew
    jax.effects_barrier()
    assert len(judged) == 6
    with pytest.raises(UserError, match="hidden/0: rank must be a whole number"):
        score([{**one, "hidden/0": 2.0}])
    with pytest.raises(UserError, match=r"head: rank must be in \[0, 6\], got 7"):
        score([{**one, "head": 7}])


def test_scores_are_losses_in_whatever_form_convolutions_are():
    """By blocks of pixels here, by XLA's own elsewhere; the model stays as it is."""
    model, run = of_images("convnet", widths=(4, 6))
    assert narrow.block(model.blocks[0].conv.kernel.shape, (1, 1)) == (2, 4)
    vectors = [at_fraction(active.get_ranks(model), f) for f in (1.0, 0.6, 0.3)]
    scores = scoring.make_score(model, run)(vectors)
    for _, node in nnx.iter_modules(model):
        assert getattr(node, "conv_general_dilated", None) is not narrow.convolve
    structure, *parts = split_model(model)
    plain = evaluation.make_evaluator(structure, run.task, batch_statistics=True)
    batches = run.scoring_batches()
    for ranks, score in zip(vectors, scores, strict=True):
        loss = plain(*parts, ranks, batches)["loss"]
        assert score == pytest.approx(-loss, rel=1e-5)


def test_a_search_stops_between_batches_when_it_is_asked_to():
    """And goes on afterwards with what it has scored."""
    model, run = of_images("mlp", hidden=(6,))
    run, judged = counting(run)
    score = scoring.make_score(model, run)
    vectors = [{"hidden/0": rank} for rank in (1, 2, 3)]
    with run.stop:
        known = score(vectors[:2])
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopRequested):
            score(vectors)
        assert score(vectors[:2]) == known
    jax.effects_barrier()
    assert len(judged) == 4


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that XLA compiles, or takes from its cache."""
    names: list[str] = []

    def note(event: str, seconds: float, **more: object) -> None:
        del seconds
        if event.endswith("backend_compile_duration"):
            names.append(str(more.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.slow  # compiles a ResNet-18
def test_a_beam_over_resnet_18_compiles_twice_at_most():
    """Over its 21 layers: the model once, and nothing after the first level; what adds
    sums up is small and counted too."""
    model, run = of_images("resnet", depth=18, width_multiplier=1 / 16)
    levels: list[tuple[int, int]] = []
    with compilations() as names:
        score = scoring.make_score(model, run)

        def counted(candidates: list[Ranks]) -> list[float]:
            found = score(candidates)
            levels.append((len(candidates), len(names)))
            return found

        context = choosing.context_of(model, run.cost(model), score=counted)
        assert len(context.ranks) == 21
        beam = {"measure": "macs", "fraction": 0.5, "width": 2, "steps": 4}
        ranks = selecting.select({"name": "beam", "args": beam}, context)
    assert sum(rank < context.ranks[path] for path, rank in ranks.items()) >= 3
    assert sum(count for count, _ in levels) >= 40 and len(levels) >= 4
    assert sum("sums" in name for name in names) == 1
    assert len({compiled for _, compiled in levels}) == 1  # all in the first level


KNAPSACK = {"measure": "params", "fraction": 0.5, "curve": "activations"}


def test_outputs_are_measured_on_held_out_examples(run):
    """Of a checkpoint, by NumPy from the weights; energy is 0.03 away from it."""
    source = Source(run, None, [])
    (found,) = source.context().activations()["hidden/0"]
    (batch,) = source.run.scoring_batches()
    (inputs,) = source.run.task.inputs(batch, None)
    factors = source.whole.hidden[0].factors
    u, v = (np.float64(getattr(factors, name)[...]) for name in "uv")
    hidden = np.float64(inputs).reshape(len(inputs), -1) @ u
    lost = [np.sum((hidden[:, kept:] @ v[kept:]) ** 2) for kept in range(9)]
    assert found[:9] == pytest.approx(np.divide(lost, lost[0]), rel=1e-4)


def test_padding_counts_for_nothing():
    """One batch of all held-out examples, and one that has room for more."""
    model, run = of_images("mlp", hidden=(6,))
    size = run.data.sizes["validation"]
    found = []
    for rows in (size, size + 300):
        data = {**run.config["data"], "eval_batch_size": rows}
        padded = run._replace(config={**run.config, "data": data})
        (batch,) = padded.scoring_batches()
        assert len(batch["weight"]) == rows
        found.append(scoring.output_losses(model, padded))
    for exact, other in zip(*(list(one.values()) for one in found), strict=True):
        np.testing.assert_allclose(exact[0], other[0], rtol=1e-5)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_run_ends_with_a_cut_by_outputs(held_out, tmp_path):
    """It is checked before the first step; without examples held out it is refused
    there."""
    truncate = common.named("truncate", selector=common.named("knapsack", **KNAPSACK))
    phase = common.phase(
        name="only",
        until={"steps": 2},
        optimizer=common.optimizer("sgd", learning_rate=0.1),
        on_end=(truncate,),
    )
    config = make_config(phase, model={"name": "mlp", "args": {"hidden": (16,)}})
    if not held_out:
        config["data"]["validation_examples"] = 0
        with pytest.raises(
            UserError, match="activations: must be there, from held-out"
        ):
            train(config, tmp_path / "run")
        assert not list((tmp_path / "run").glob("checkpoints/*"))
        return
    saved = train(config, tmp_path / "run")
    source = Source(saved.path, None, [])
    layers = source.cost.layers
    params = sum(layers[path].params(rank) for path, rank in source.ranks.items())
    assert 0 < params <= 0.5 * sum(layer.dense_params for layer in layers.values())
