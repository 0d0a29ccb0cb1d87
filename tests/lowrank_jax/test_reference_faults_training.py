"""Faults of the training of Maestro's reference code, each a test that ours has not.

Read in the authors' PyTorch code: its scripts train without ordered dropout, since a
misspelled flag is swallowed; pruning loses parameters from the optimizer; the best
model is chosen on test data. All others are in `test_reference_faults.py`.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import small_mlp
from flax import nnx
from small_mlp import FULL_RANKS, batch, make_draw
from support import begin

from configs import common, maestro
from lowrank_jax import checkpoint, factorization, shrinking
from lowrank_jax.active import get_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.paths import find_factors
from train import loop, phases, registry
from train.config import to_json
from train.data import pipeline
from train.model import abstract_model, load_model
from train.models import MODELS
from train.phases import Running
from train.state import Structure, carried_state, new_state
from train.step import Step, make_train_step
from train.tasks.classification import classification

small_model = small_mlp.small_model

SGD = common.optimizer("sgd", learning_rate=0.05, args={"momentum": 0.9})
FACTS = {
    "arrays": {
        "image": {"shape": [4, 4, 1], "dtype": "uint8"},
        "label": {"shape": [], "dtype": "int32"},
    },
    "num_classes": 3,
}


def begin_phase(**values: Any) -> Running:
    """A phase of ten steps."""
    return begin(common.phase(name="only", until={"steps": 10}, **values))


def make_step(structure: Structure, running: Running) -> Step:
    task = classification(FACTS, mean=[0.0], std=[1.0], augment=[])
    return make_train_step(structure, running, task, jax.random.key(0))


def host(tree: Any) -> dict[str, np.ndarray]:
    """Copies of all arrays by path, safe from donation."""
    return {path: np.array(x) for path, x in checkpoint.flatten(tree).items()}


# Scripts train without ordered dropout, since a misspelled flag is swallowed.


def maestro_config() -> dict[str, Any]:
    return to_json(maestro.get_config())


def test_the_maestro_config_trains_with_ordered_dropout():
    """Its sampler visits every (layer, rank) pair of LeNet once in each pass.

    6 + 16 + 120 + 84 + 10 = 236 steps; all other layers run at full rank meanwhile.
    Lasso and shrinking are on as well.
    """
    config = maestro_config()
    (phase,) = phases.build_phases(config["phases"])
    model = abstract_model(lambda: lenet(config))
    limits = {path: factors.max_rank for path, factors in find_factors(model).items()}
    drawn, _ = make_draw(phase.sampler, 236)(phase.sampler.init(limits), 0, 0)
    ranks = {path: np.asarray(column) for path, column in drawn.items()}
    visits = {
        (path, int(rank))
        for row in range(236)
        for path, rank in [deviating(ranks, limits, row)]
    }
    below_full = {(p, b) for p, limit in limits.items() for b in range(1, limit)}
    assert visits - {("", 0)} == below_full
    assert phase.penalties and phase.shrink


def lenet(config: Mapping[str, Any]) -> nnx.Module:
    """The config's model for MNIST, without its data."""
    model = registry.build(
        config["model"],
        MODELS,
        rngs=nnx.Rngs(0),
        image_shape=(28, 28, 1),
        num_classes=10,
    )
    return factorization.factorize(model, [tuple(r) for r in config["rank_rules"]])


def deviating(
    ranks: Mapping[str, np.ndarray], limits: Mapping[str, int], row: int
) -> tuple[str, int]:
    """The one layer below its full rank in this step, or none: `("", 0)`."""
    below = [(p, int(r[row])) for p, r in ranks.items() if r[row] != limits[p]]
    assert len(below) <= 1
    return below[0] if below else ("", 0)


def test_a_sampled_rank_reaches_the_training_step(small_model):
    """In the real step columns past the sampled rank stand still, all others move."""
    running = begin_phase(
        optimizer=common.optimizer("sgd", learning_rate=0.1),
        sampler=common.named("single_layer"),
    )
    structure, state = new_state(small_model, running, 0)
    step = make_step(structure, running)
    seen = set()
    for number in range(9):  # one pass over all pairs
        old = host(state.params)
        state, _ = step(state, batch(number))
        new, moving = host(state.params), {}
        for path, limit in FULL_RANKS.items():
            moved = (old[f"{path}/factors/u"] != new[f"{path}/factors/u"]).any(axis=0)
            moving[path] = int(moved.sum())
            assert moved[: moving[path]].all()
            assert moving[path] <= limit
        seen |= {(path, rank) for path, rank in moving.items()}
    assert seen == {(p, b + 1) for p, limit in FULL_RANKS.items() for b in range(limit)}


MISSPELLED = {
    "key of the config": ((), "rank_rule", []),
    "key of the data": (("data",), "agument", []),
    "key of a phase": (("phases", 0), "smapler", {"name": "single_layer", "args": {}}),
    "key of the sampler": (("phases", 0, "sampler"), "arg", {}),
    "name of the sampler": (("phases", 0, "sampler"), "name", "single_layr"),
    "argument of the sampler": (("phases", 0, "sampler", "args"), "pases", 2),
    "name of the penalty": (("phases", 0, "penalties", 0), "name", "group_laso"),
    "argument of the penalty": (("phases", 0, "penalties", 0, "args"), "wieght", 1.0),
    "name of the teacher": (("phases", 0, "teacher"), "name", "ful"),
    "unit of the length": (("phases", 0, "until"), "epoch", 1),
    "key of shrinking": (("phases", 0, "shrink"), "treshold", 1e-5),
    "key of the optimizer": (("phases", 0, "optimizer"), "learing_rate", 0.1),
    "argument of the optimizer": (("phases", 0, "optimizer", "args"), "momntum", 0.9),
    "name of the schedule": (("phases", 0, "optimizer", "schedule"), "name", "cosin"),
}


@pytest.mark.parametrize("place", MISSPELLED)
def test_a_misspelled_word_is_an_error(place):
    """Nothing in a config is swallowed; the message has the word as it was written."""
    path, key, value = MISSPELLED[place]
    config = copy.deepcopy(maestro_config())
    section = config
    for part in path:
        section = section[part]
    section[key] = value
    with pytest.raises(UserError, match=value if isinstance(value, str) else key):
        phases.build_phases(to_json(config)["phases"])


def test_the_config_without_a_misspelling_builds():
    """The control of the test above."""
    assert phases.build_phases(maestro_config()["phases"])


# Pruning loses parameters from the optimizer.


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_shrinking_keeps_every_parameter_in_the_optimizer(small_model, name):
    """Every parameter keeps its moments, cut to its shape, and goes on moving."""
    adam = common.optimizer("adam", learning_rate=1e-2)
    running = begin_phase(optimizer=SGD if name == "sgd" else adam)
    structure, state = new_state(small_model, running, 0)
    step = make_step(structure, running)
    for number in range(2):
        state, _ = step(state, batch(number))
    before = host(state.opt_state)

    model = structure.merge(state.params, state.model_state, None)
    ranks = {"hidden/0": 4, "head": 1}
    shrunk = shrinking.shrink(model, ranks, state.opt_state, running.optimizer)
    assert shrunk.restarted == []
    structure, state = carried_state(shrunk.model, running, state)
    state = state._replace(opt_state=shrunk.opt_state)
    old, moments = host(state.params), host(shrunk.opt_state)
    assert moments.keys() == before.keys()
    assert len(moments) >= len(old) == 6
    for path, array in moments.items():
        owner = [key for key in old if path.endswith(f"/{key}")]
        assert [old[key].shape for key in owner] in ([array.shape], [])
        kept = tuple(map(slice, array.shape))
        np.testing.assert_array_equal(array, before[path][kept])
        assert np.any(array != 0)

    state, _ = make_step(structure, running)(state, batch(2))
    for path, array in host(state.params).items():
        assert array.shape == old[path].shape
        assert np.all(np.any(array != old[path], axis=0)), path


# The best model is chosen on test data.


@dataclasses.dataclass(frozen=True)
class Sealed:
    """A test split that nobody may read; its size may be asked for."""

    size: int
    streams: bool = False

    def __len__(self) -> int:
        return self.size

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        raise AssertionError("the test split was read")


class Run(NamedTuple):
    """A run of the real loop, with single-layer sampling, lasso and shrinking."""

    config: dict[str, Any]
    data: pipeline.Dataset
    result: dict[str, Any]
    saved: checkpoint.Saved


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Run:
    """Maestro on the digits for three epochs, the test split sealed."""
    config = common.base(seed=0)
    common.digits(config, batch_size=100)
    config.model = {"name": "mlp", "args": {"hidden": (8,)}}
    config.keep_checkpoints = 1
    lasso = {"name": "hierarchical_group_lasso", "args": {"weight": 0.02}}
    config.phases = (
        common.phase(
            name="maestro",
            until={"epochs": 3},
            sampler={"name": "single_layer", "args": {}},
            penalties=(lasso,),
            optimizer=SGD,
            shrink={
                "every_epochs": 2,
                "every_steps": 0,
                "threshold": 0.3,
                "multiple": 1,
                "least_share": 0.0,
            },
        ),
    )
    config = to_json(config)
    data = pipeline.load_data(config["data"], allow_imports=None)
    sealed = dataclasses.replace(
        data.splits["test"], source=Sealed(len(data.splits["test"]))
    )
    data = dataclasses.replace(data, splits={**data.splits, "test": sealed})
    workdir: Path = tmp_path_factory.mktemp("run") / "workdir"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_data", lambda *_, **__: data)
        result = loop.train_and_evaluate(config, workdir)
    return Run(config, data, result, checkpoint.open_checkpoint(workdir))


def test_training_never_reads_the_test_split(finished_run):
    """A run evaluates on validation data and keeps its last state, not its best."""
    with pytest.raises(AssertionError, match="test split was read"):
        next(iter(finished_run.data.eval_batches("test", 10)))  # the seal holds
    assert len(finished_run.result["frontier"]) == 4
    assert finished_run.result["step"] == finished_run.saved.step == 39


def test_a_run_leaves_its_ranks_sampler_and_optimizer_in_the_checkpoint(finished_run):
    """After shrinking in the loop: ranks that load, a moment for each parameter.

    The sampler's state is that of 39 draws by hand, kept over the cut at step 26.
    """
    saved = finished_run.saved
    full = {"head": 8, "hidden/0": 8}
    ranks = saved.metadata["ranks"]
    assert ranks == saved.max_ranks and sum(ranks.values()) < sum(full.values())
    model = load_model(saved, allow_imports=())
    assert get_ranks(model) == ranks

    arrays = saved.metadata["arrays"]
    moments = arrays["opt_state"]
    for path, shape in arrays["params"].items():
        assert [m for p, m in moments.items() if p.endswith(f"/{path}")] == [shape]

    (phase,) = phases.build_phases(finished_run.config["phases"])
    state, sample = phase.sampler.init(full), jax.jit(phase.sampler.sample)
    for step in range(39):
        if step == 26:
            state = phase.sampler.keep(state, ranks)
        step_key = jax.random.fold_in(jax.random.key(0), step)
        _, state = sample(state, jax.random.split(step_key)[0], step)
    found = checkpoint.restore(saved, {"sampler": state})["sampler"]
    jax.tree.map(np.testing.assert_array_equal, found, state)
