"""Faults of the reference code of Maestro, each a test that ours does not have it.

Read in the authors' PyTorch code: its scripts train without ordered dropout, since a
misspelled flag is swallowed; ranks are not in its checkpoints; pruning loses parameters
from the optimizer; a convolution of rank 0 returns a wrong shape; the gradient of the
lasso is NaN at zero; ranks are rounded in floating point; folding back to dense ignores
the mask; the sampler can be neither seeded nor resumed; the best model is chosen on
test data.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error
from support import begin

from configs import common, maestro
from lowrank_jax import (
    checkpoint,
    factorization,
    penalties,
    samplers,
    shrinking,
    surgery,
)
from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.layers import LowRankConv, LowRankLinear
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import at_fraction, fraction_of
from train import loop, phases, registry
from train.config import to_json
from train.data import pipeline
from train.model import abstract_model, load_model
from train.models import MODELS
from train.models.mlp import MLP
from train.phases import Running
from train.state import Structure, carried_state, new_state
from train.step import Step, make_train_step
from train.tasks.classification import classification

FULL_RANKS = {"head": 3, "hidden/0": 6}
SGD = common.optimizer("sgd", learning_rate=0.05, args={"momentum": 0.9})
FACTS = {
    "arrays": {
        "image": {"shape": [4, 4, 1], "dtype": "uint8"},
        "label": {"shape": [], "dtype": "int32"},
    },
    "num_classes": 3,
}


@functools.cache
def original() -> nnx.Module:
    return factorization.factorize(MLP(16, (6,), 3, rngs=nnx.Rngs(0)))


@pytest.fixture
def small_model() -> nnx.Module:
    """16 -> 6 -> 3 in low-rank form; arrays of its own, since a step donates them."""
    graphdef, state = nnx.split(original())
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def batch(seed: int, size: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, 4, 4, 1)).astype(np.float32)
    labels = rng.integers(0, 3, size=size, dtype=np.int32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(labels)}


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


# Ranks are not in its checkpoints.


def test_ranks_are_in_the_checkpoint(small_model, tmp_path):
    """Allocated and active ranks come back, outputs bit for bit; lower ranks too."""
    model = surgery.truncate(small_model, {"hidden/0": 4})
    set_ranks(model, {"hidden/0": 2, "head": 1})
    checkpoint.save(tmp_path / "saved", model)
    saved = checkpoint.open_checkpoint(tmp_path / "saved")
    assert saved.metadata["max_ranks"] == {"head": 3, "hidden/0": 4}
    assert saved.metadata["ranks"] == {"head": 1, "hidden/0": 2}

    images = batch(0)["image"]
    loaded = checkpoint.load(saved, small_model)
    assert get_ranks(loaded) == {"head": 1, "hidden/0": 2}
    np.testing.assert_array_equal(loaded(images), model(images))
    lower = checkpoint.load(saved, small_model, ranks={"hidden/0": 1, "head": 1})
    expected = surgery.truncate(model, {"hidden/0": 1, "head": 1})
    np.testing.assert_array_equal(lower(images), expected(images))
    with pytest.raises(UserError, match=r"hidden/0: rank must be in \[0, 2\], got 3"):
        checkpoint.load(saved, small_model, ranks={"hidden/0": 3})


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


# A convolution of rank 0 returns a wrong shape.


@pytest.mark.parametrize(
    ("strides", "padding", "scheme"), [(1, "SAME", 0), (2, "VALID", 2), (2, 1, 0)]
)
def test_a_convolution_of_rank_zero_is_its_bias(strides, padding, scheme):
    """Its shape is the dense one's and its value the bias; the bias still learns.

    However the rank became 0: by the mask, by truncation or at the start.
    """
    ones = nnx.initializers.ones
    options = {"padding": padding, "kernel_init": ones, "rngs": nnx.Rngs(0)}
    dense = nnx.Conv(3, 4, (3, 3), strides, **options)
    dense.bias.set_value(jnp.arange(1.0, 5.0))
    full = LowRankConv.from_dense(dense, scheme=scheme)
    masked = nnx.clone(full)
    masked.factors.set_rank(0)
    cut = surgery.truncate(full, {"": 0})
    born = LowRankConv.from_dense(dense, max_rank=0, scheme=scheme)
    images = jnp.ones((2, 7, 7, 3))
    shape = nnx.eval_shape(lambda dense: dense(images), dense).shape
    expected = np.broadcast_to(np.arange(1.0, 5.0), shape)
    for layer in (masked, cut, born):
        np.testing.assert_array_equal(layer(images), expected)
        grads = nnx.grad(lambda layer: jnp.sum(layer(images)))(layer)
        np.testing.assert_array_equal(grads["bias"][...], expected[..., 0].size)
        np.testing.assert_array_equal(surgery.merge(layer).kernel[...], 0)


# The gradient of the lasso is NaN at zero.


@pytest.mark.parametrize("with_s", [False, True])
@pytest.mark.parametrize("live", [0, 2, 5])
@pytest.mark.parametrize("name", ["group_lasso", "hierarchical_group_lasso"])
def test_the_gradient_of_the_lasso_is_finite_at_zero(name, live, with_s):
    """Zero on columns that are zero, and unchanged by them on columns that are not."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(6, 5)), rng.normal(size=(5, 4))
    u[:, live:], v[live:] = 0, 0
    penalty = penalties.PENALTIES[name](weight=1.0)

    def gradient(columns: int) -> nnx.State:
        s = jnp.ones(columns) if with_s else None
        arrays = jnp.float32(u[:, :columns]), jnp.float32(v[:columns])
        return nnx.grad(lambda factors: penalty(factors, 0))(Factors(*arrays, s))

    padded, alone = gradient(5), gradient(live)
    for part, axis in (("u", -1), ("v", 0)):
        array = np.moveaxis(np.asarray(padded[part][...]), axis, 0)
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array[live:], 0)
        reference = np.moveaxis(np.asarray(alone[part][...]), axis, 0)
        np.testing.assert_allclose(array[:live], reference, rtol=1e-6)


# Ranks are rounded in floating point.


def test_fractions_of_a_rank_are_exact():
    """`rank / width` of a width is that rank, for all 131,328 pairs up to width 512.

    The control, `ceil` in floats, is wrong for 4,122 of them (75,010 up to width
    2,048), the first at width 25, rank 7.
    """
    pairs = [(width, rank) for width in range(1, 513) for rank in range(1, width + 1)]
    wrong = [(w, r) for w, r in pairs if math.ceil(r / w * w) != r]
    assert len(wrong) == 4122 and wrong[0] == (25, 7)
    assert [(w, r) for w, r in pairs if fraction_of(r / w, w) != r] == []


def test_every_user_of_a_fraction_rounds_exactly():
    """7/25 of rank 25 is 7 in evaluation, in samplers and in rules."""
    limits = {"a": 25, "stack": [25, 50]}
    expected = {"a": 7, "stack": [7, 14]}
    assert at_fraction(limits, 7 / 25) == expected
    for sampler in (
        samplers.matryoshka(fractions=[1.0, 7 / 25]),
        samplers.sandwich(passes=2, smallest=7 / 25),
        samplers.uniform_fraction(fractions=[1.0, 7 / 25]),
    ):
        tables = sampler.init(limits).tables
        assert {path: table[1].tolist() for path, table in tables.items()} == expected
    rules = [(".*", {"rank_fraction": 7 / 25})]
    low_rank = nnx.eval_shape(
        lambda: factorization.factorize(nnx.Linear(25, 30, rngs=nnx.Rngs(0)), rules)
    )
    assert max_ranks(low_rank) == {"": 7}


# Folding back to dense ignores the mask.


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_merging_respects_the_mask(kind):
    """The dense twin of a masked layer is that layer, not the one at full rank."""
    if kind == "linear":
        layer = LowRankLinear(6, 5, rngs=nnx.Rngs(0))
        inputs = batch(0)["image"].reshape(-1, 16)[:, :6]
    else:
        layer = LowRankConv(1, 5, (3, 3), rngs=nnx.Rngs(0))
        inputs = batch(0)["image"]
    at_full = layer(inputs)
    set_ranks(layer, {"": 2})
    dense = surgery.merge(layer)
    assert type(dense) is type(layer).dense_type
    assert relative_error(dense(inputs), layer(inputs)) <= 1e-5
    assert relative_error(dense(inputs), at_full) >= 1e-2
    kernel = np.asarray(dense.kernel[...]).reshape(-1, 5)
    assert np.linalg.matrix_rank(kernel, tol=1e-5) == 2


# The sampler can be neither seeded nor resumed.


def make_draw(sampler: samplers.RankSampler, count: int) -> Callable[..., Any]:
    """A jitted function from state, seed and first step to the next ranks and state."""

    @jax.jit
    def draw(state: Any, seed: int, start: int) -> tuple[dict[str, jax.Array], Any]:
        def body(state, number):
            key = jax.random.fold_in(jax.random.key(seed), number)
            ranks, state = sampler.sample(state, key, number)
            return state, ranks

        state, ranks = jax.lax.scan(body, state, start + jnp.arange(count))
        return ranks, state

    return draw


SAMPLERS = {  # one of each kind of state
    "independent": {},
    "sandwich": {"passes": 4, "smallest": 0.125},
    "single_layer": {},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_seeded_and_goes_on_where_it_stopped(name, small_model, tmp_path):
    """The same key, the same ranks; another key, others; a checkpoint continues them.

    A pass of `single_layer` is 9 pairs long here: after 13 steps it is under way.
    """
    sampler = samplers.SAMPLERS[name](**SAMPLERS[name])
    draw, fresh = make_draw(sampler, 13), sampler.init(FULL_RANKS)
    first, state = draw(fresh, 1, 0)
    same, other = draw(fresh, 1, 0)[0], draw(fresh, 2, 0)[0]
    assert all(np.array_equal(first[path], same[path]) for path in FULL_RANKS)
    assert any(not np.array_equal(first[path], other[path]) for path in FULL_RANKS)

    checkpoint.save(tmp_path / "saved", small_model, items={"sampler": state})
    saved = checkpoint.open_checkpoint(tmp_path / "saved")
    restored = checkpoint.restore(saved, {"sampler": fresh})["sampler"]
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    going_on, resumed = draw(state, 1, 13)[0], draw(restored, 1, 13)[0]
    for path in FULL_RANKS:
        np.testing.assert_array_equal(going_on[path], resumed[path])


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
            shrink={"every_epochs": 2, "threshold": 0.3, "multiple": 1},
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
