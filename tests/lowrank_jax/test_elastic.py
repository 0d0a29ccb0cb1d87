"""One set of weights at several sizes: each is the cut model, all hold the largest."""

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_models
from flax import nnx
from reference import relative_error

import lowrank_jax as lr
from lowrank_jax.elastic import Elastic
from lowrank_jax.ranks import at_fraction
from train.models import lenet, mlp, vit

BATCHES = (1, 4)
FRACTIONS = {"whole": 1.0, "half": 0.5, "least": 0.1}


def of_images(build: Callable[..., nnx.Module], shape: tuple[int, ...], **args: Any):
    def make(**rule: Any) -> nnx.Module:
        dense = build(image_shape=shape, num_classes=10, rngs=nnx.Rngs(0), **args)
        return lr.factorize(dense, [(".*", rule or "full")])

    return make, jax.ShapeDtypeStruct((1, *shape), jnp.float32)


class Table(nnx.Module):
    """A table of embeddings that is read, and multiplied by."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(9, 6, rngs=rngs)

    def __call__(self, words):
        return self.table.attend(jnp.tanh(self.table(words)).mean(axis=1))


def of_library(
    kind: type[nnx.Module], shape: tuple[int, ...], dtype: Any = jnp.float32
):
    def make(**rule: Any) -> nnx.Module:
        return lr.factorize(kind(nnx.Rngs(0)), [(".*", rule or "full")])

    return make, jax.ShapeDtypeStruct((1, *shape), dtype)


MODELS = {
    "lenet": of_images(lenet.build, (16, 16, 1)),
    "mlp": of_images(mlp.build, (4, 4, 1), hidden=(24, 24)),
    "vit": of_images(
        vit.build, (4, 4, 1), embed_dim=8, depth=2, num_heads=2, dropout_rate=0.5
    ),
    "groups": of_library(
        functools.partial(saved_models.Net, dtype=jnp.float32), (5, 4)
    ),
    "bfloat16": of_library(saved_models.Net, (5, 4)),
    "scanned": of_library(saved_models.Scanned, (4,)),
    "table": of_library(Table, (3,), jnp.int32),
}
RULES = {"": {}, "s": {"with_s": True}, "depth": {"depth": 3}}


def inputs_for(spec: jax.ShapeDtypeStruct, rows: int) -> np.ndarray:
    values = np.random.default_rng(rows).normal(size=(rows, *spec.shape[1:]))
    return np.asarray(
        np.abs(3 * values) if spec.dtype == jnp.int32 else values, spec.dtype
    )


def sizes_of(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """Fractions of every rank, and ranks of one layer: for each matrix of a stack its
    own, and none."""
    full = lr.max_ranks(model)
    sizes = {name: at_fraction(full, fraction) for name, fraction in FRACTIONS.items()}
    first, rank = next(iter(full.items()))
    uneven = rank - 1 if isinstance(rank, int) else [*rank[:-1], rank[-1] - 2]
    return {**sizes, "one": {first: uneven}, "none": {first: np.zeros_like(rank)}}


@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize(
    ("name", "rule"),
    [*((name, "") for name in MODELS), ("mlp", "s"), ("mlp", "depth"), ("groups", "s")],
)
def test_every_size_is_the_cut_model(name, rule, views):
    """In evaluation mode, at every batch up to the largest, whoever asks first."""
    make, spec = MODELS[name]
    model = make(**RULES[rule])
    sizes = sizes_of(model)
    elastic = Elastic(model, sizes, spec, batches=BATCHES, views=views)
    model.eval()
    for size, ranks in sizes.items():
        cut = lr.truncate(model, ranks)
        for rows in (4, 3, 1):
            inputs = inputs_for(spec, rows)
            found = elastic(inputs, size=size)
            assert isinstance(found, np.ndarray) and len(found) == rows
            wanted = cut(jnp.asarray(inputs)).astype(jnp.float32)
            error = relative_error(found.astype(np.float32), wanted)
            # half of the digits, where sums in another order are rounded to bfloat16
            assert error <= (2**-7 if name == "bfloat16" else 1e-5)
    assert elastic.sizes["whole"] == lr.max_ranks(model)
    assert list(elastic.sizes) == list(sizes)


@contextlib.contextmanager
def compiled_events() -> Iterator[list[str]]:
    """What jax traces, lowers or compiles meanwhile."""
    events: list[str] = []

    def note(event: str, seconds: float, **more: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_no_call_traces_or_compiles():
    """Neither a new size nor a batch that no program is for, nor the first call."""
    make, spec = MODELS["mlp"]
    traces = []

    def forward(model: nnx.Module, inputs: jax.Array) -> dict[str, jax.Array]:
        traces.append(inputs.shape)
        scores = model(inputs)
        return {"scores": scores, "best": scores.argmax(axis=-1)}

    model = make()
    with compiled_events() as events:
        elastic = Elastic(
            model, sizes_of(model), spec, batches=BATCHES, forward=forward
        )
        programs = len(BATCHES) * len(elastic.sizes)
        assert len(traces) == programs and len(events) >= 3 * programs
        del events[:]
        for _ in range(2):
            for size in elastic.sizes:
                for rows in (1, 2, 3, 4):
                    found = elastic(inputs_for(spec, rows), size=size)
                    np.testing.assert_array_equal(
                        found["best"], found["scores"].argmax(axis=-1)
                    )
        assert not events and len(traces) == programs


def test_the_default_size_is_switched():
    """The first at first; from then on what was set, of all calls that name none."""
    make, spec = MODELS["mlp"]
    model = make()
    elastic = Elastic(model, sizes_of(model), spec)
    inputs = inputs_for(spec, 1)
    assert elastic.size == "whole"
    for name in ("least", "half", "whole"):
        elastic.size = name
        assert elastic.size == name
        np.testing.assert_array_equal(elastic(inputs), elastic(inputs, size=name))
    outputs = {name: elastic(inputs, size=name) for name in elastic.sizes}
    assert not np.allclose(outputs["least"], outputs["whole"])
    np.testing.assert_array_equal(elastic(inputs, size="half"), outputs["half"])


def held_bytes(before: set[int]) -> int:
    """Bytes of the device's memory that weights take, but for those by id."""
    largest: dict[int, int] = {}
    for array in jax.live_arrays():
        if id(array) not in before and jnp.issubdtype(array.dtype, jnp.floating):
            pointer = array.unsafe_buffer_pointer()
            largest[pointer] = max(largest.get(pointer, 0), array.nbytes)
    return sum(largest.values())


def weights_of(model: nnx.Module) -> int:
    """Bytes of all arrays of a model but ranks."""
    state = nnx.state(model, nnx.Not(lr.Rank))
    return sum(array.nbytes for array in jax.tree.leaves(state))


class Copied(Elastic):
    """The control: each size holds arrays of its own."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name, size in self._sizes.items():
            own = {key: jnp.copy(x) for key, x in size.factors.items()}
            self._sizes[name] = size._replace(factors=own)


@pytest.mark.parametrize(
    ("kind", "views"), [(Elastic, True), (Elastic, False), (Copied, True)]
)
def test_the_device_holds_the_largest_size_alone(kind, views):
    """What lies past it is gone, and arrays without a rank are there once; sizes with
    arrays of their own take more."""
    make, spec = MODELS["mlp"]
    model = make()
    ranks = lr.max_ranks(model)
    sizes = {str(f): at_fraction(ranks, f) for f in (0.75, 0.5, 0.25)}
    largest = weights_of(lr.truncate(model, sizes["0.75"]))
    gc.collect()
    kept = jax.live_arrays()  # their ids stay theirs
    before = {id(array) for array in kept}
    model = jax.tree.map(jnp.copy, model)
    elastic = kind(model, sizes, spec, batches=BATCHES, views=views)
    del model
    for size in sizes:
        elastic(inputs_for(spec, 3), size=size)
    gc.collect()
    assert elastic.nbytes == largest
    if kind is Elastic:
        assert held_bytes(before) == largest
    else:
        assert held_bytes(before) > 1.5 * largest


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compiles as outside of tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def temporary(program: jax.stages.Compiled) -> int:
    return program.memory_analysis().temp_size_in_bytes


def compiled(model: nnx.Module, spec: Any, rows: int) -> jax.stages.Compiled:
    """A cut model compiled on its own, its ranks among the arguments."""
    graphdef, state = nnx.split(model)
    inputs = jax.ShapeDtypeStruct((rows, *spec.shape[1:]), spec.dtype)

    def run(state: nnx.State, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(inputs)

    return jax.jit(run).lower(state, inputs).compile()


def test_programs_of_views_copy_no_weights(optimized):
    """What they need beside their arguments is activations. Slices are copied, and so
    is what the ranks of a cut model mask, where they are arguments."""
    make, spec = of_images(mlp.build, (8, 8, 1), hidden=(256, 256))
    model = make()
    model.eval()
    sizes = {str(f): at_fraction(lr.max_ranks(model), f) for f in (1.0, 0.5, 0.25)}
    views, slices = (
        Elastic(model, sizes, spec, batches=(8,), views=views)
        for views in (True, False)
    )
    activations = 2 * 8 * 256 * 4
    for name in ("0.5", "0.25"):
        factors = views._sizes[name].factors
        weights = sum(array.nbytes for array in factors.values())
        cut = compiled(lr.truncate(model, sizes[name]), spec, 8)
        assert weights > 5 * activations
        assert temporary(views.program(name, 8)) <= activations
        assert temporary(slices.program(name, 8)) <= weights + activations
        assert temporary(slices.program(name, 8)) > activations < temporary(cut)
        arguments = views.program(name, 8).memory_analysis().argument_size_in_bytes
        assert arguments <= cut.memory_analysis().argument_size_in_bytes
    whole = slices.program("0.25", 8).memory_analysis().argument_size_in_bytes
    assert whole == slices.program("0.5", 8).memory_analysis().argument_size_in_bytes


def test_threads_may_call_at_different_sizes():
    make, spec = MODELS["mlp"]
    model = make()
    elastic = Elastic(model, sizes_of(model), spec, batches=BATCHES)
    names, inputs = list(elastic.sizes), inputs_for(spec, 3)
    wanted = {name: elastic(inputs, size=name) for name in names}
    wrong, barrier = [], threading.Barrier(4)

    def call(number: int) -> None:
        barrier.wait()
        for step in range(50):
            name = names[(number + step) % len(names)]
            if not np.array_equal(elastic(inputs, size=name), wanted[name]):
                wrong.append((number, name))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_sizes_may_have_statistics_of_their_own():
    """Others have the model's; only these few numbers are held again."""
    make, spec = MODELS["groups"]
    model = make()
    model.eval()
    ranks = at_fraction(lr.max_ranks(model), 0.5)
    batch = jnp.asarray(inputs_for(spec, 8))
    cut = lr.truncate(model, ranks)
    own = nnx.clone(cut)
    own.norm.mean.set_value(own.norm.mean[...] + 2)
    statistics = {"own": nnx.state(own, nnx.BatchStat)}
    sizes = {"model's": ranks, "own": ranks}
    elastic = Elastic(model, sizes, spec, batches=(8,), statistics=statistics)
    for name, alone in (("model's", cut), ("own", own)):
        found = elastic(np.asarray(batch), size=name)
        assert relative_error(found.astype("f4"), alone(batch).astype("f4")) <= 1e-5
    assert (
        elastic.nbytes == weights_of(cut) + 2 * 6 * 4 - 6 * 4
    )  # the mean alone differs
