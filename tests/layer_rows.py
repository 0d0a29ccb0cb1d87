"""The table of low-rank layers and their options, and what tests ask of its rows."""

import contextlib
import dataclasses
import functools
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax.factors import Factors
from lowrank_jax.layers import LAYERS, LowRankLayer, conv, embed, linear

Order = Literal["factored", "merged"]
ORDERS = ("factored", "merged")


def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers by NumPy: Flax's initialisers compile anew for every shape."""
    seed = (
        0 if isinstance(key, jax.core.Tracer) else np.asarray(jax.random.key_data(key))
    )
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer and what to call it with.

    Args:
      kind: The dense type.
      args: Its positional arguments.
      shape: Shape of the input.
      batch: Axis of the examples, in the input and the output; None if there is none.
      call: Name of the method.
      options: Its keyword arguments.
      fold: Options of the fold.
    """

    kind: type[nnx.Module]
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    batch: int | None = 0
    call: str = "__call__"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fold: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def keywords(self) -> dict[str, Any]:
        """Options, and a bias that is not zero, so that losing or doubling it shows."""
        if self.kind is nnx.Embed:
            return {"embedding_init": draw, **self.options}
        return {"kernel_init": draw, "bias_init": draw, **self.options}

    def dense(self, **options: Any) -> nnx.Module:
        return self.kind(*self.args, **{**self.keywords, **options}, rngs=nnx.Rngs(0))

    def inputs(self) -> jax.Array:
        random = np.random.default_rng(1)
        if self.kind is nnx.Embed and self.call == "__call__":
            return jnp.asarray(random.integers(0, self.args[0], self.shape), jnp.int32)
        return jnp.asarray(random.normal(size=self.shape), jnp.float32)


def image(
    kernel_size: tuple[int, ...] = (3, 2),
    *,
    channels: tuple[int, int] = (2, 3),
    lead: tuple[int, ...] = (2,),
    size: tuple[int, ...] = (5, 4),
    scheme: int = 0,
    **options: Any,
) -> Row:
    return Row(
        nnx.Conv,
        (*channels, kernel_size),
        (*lead, *size, channels[0]),
        batch=0 if lead else None,
        options=options,
        fold={"scheme": scheme},
    )


def spread(
    kernel_size: tuple[int, ...] = (3, 2),
    *,
    lead: tuple[int, ...] = (2,),
    size: tuple[int, ...] = (4, 3),
    scheme: int = 0,
    **options: Any,
) -> Row:
    """A transposed convolution."""
    return Row(
        nnx.ConvTranspose,
        (3, 4, kernel_size),
        (*lead, *size, 3),
        batch=0 if lead else None,
        options=options,
        fold={"scheme": scheme},
    )


line = functools.partial(image, (3,), size=(6,))
grouped = functools.partial(image, channels=(4, 6), feature_group_count=2)
ROWS = {
    "linear": Row(nnx.Linear, (4, 3), (3, 4)),
    "linear, tokens": Row(nnx.Linear, (3, 4), (2, 5, 3)),
    "linear, no bias": Row(nnx.Linear, (4, 3), (3, 4), options={"use_bias": False}),
    "linear, no batch axis": Row(nnx.Linear, (4, 3), (4,), batch=None),
    "general": Row(nnx.LinearGeneral, (4, 3), (3, 4)),
    "general, heads": Row(nnx.LinearGeneral, (4, (2, 3)), (2, 3, 4)),
    "general, axes": Row(
        nnx.LinearGeneral, ((2, 3), (2, 2)), (3, 2, 4, 3), options={"axis": (1, -1)}
    ),
    "general, batch axis": Row(
        nnx.LinearGeneral, (4, 3), (2, 3, 4), batch=1, options={"batch_axis": {0: 2}}
    ),
    "general, batch axes, no bias": Row(
        nnx.LinearGeneral,
        ((2, 2), (3,)),
        (2, 3, 2, 2, 2),
        batch=2,
        options={"batch_axis": {0: 2, 1: 3}, "axis": (3, 4), "use_bias": False},
    ),
    "einsum": Row(nnx.Einsum, ("bi,io->bo", (4, 3), (3,)), (3, 4)),
    "einsum, heads out": Row(
        nnx.Einsum, ("bti,ihd->bhtd", (4, 2, 2), (2, 2)), (2, 3, 4)
    ),
    "einsum, heads in": Row(nnx.Einsum, ("bthd,hdo->bto", (2, 2, 3)), (2, 3, 2, 2)),
    "einsum, shared axis": Row(
        nnx.Einsum, ("bthi,ohi->btho", (3, 2, 4), (2, 3)), (3, 2, 2, 4)
    ),
    "einsum, ellipsis": Row(nnx.Einsum, ("...i, io -> ...o", (4, 3), (3,)), (3, 2, 4)),
    "einsum, ellipsis and shared axis": Row(
        nnx.Einsum, ("...hi,hio->...ho", (2, 4, 3), (2, 3)), (3, 2, 2, 4)
    ),
    "einsum, summed axis": Row(nnx.Einsum, ("bti,io->bo", (4, 3), (3,)), (3, 2, 4)),
    "embed, lookup": Row(nnx.Embed, (6, 3), (3, 4)),
    "embed, attend": Row(nnx.Embed, (6, 3), (3, 2, 3), call="attend"),
    "embed, one row": Row(nnx.Embed, (1, 3), (3, 4)),
    "conv": image(kernel_dilation=(1, 2)),
    "conv, scheme 1": image(scheme=1),
    "conv, scheme 2": image(scheme=2),
    "conv, scheme 3": image(scheme=3),
    "conv, strides, scheme 1": image(strides=(2, 3), scheme=1, size=(6, 7)),
    "conv, strides, scheme 2": image(strides=(2, 3), scheme=2, size=(6, 7)),
    "conv, strides, scheme 3": image(strides=(2, 1), scheme=3, padding="VALID"),
    "conv, explicit padding, scheme 1": image(scheme=1, padding=((0, 2), (1, 0))),
    "conv, explicit padding, scheme 3": image(scheme=3, padding=(2, 1)),
    "conv, int padding, scheme 2": image(scheme=2, padding=1),
    "conv, CIRCULAR, scheme 2": image(scheme=2, padding="CIRCULAR"),
    "conv, REFLECT, scheme 1": image((3, 3), scheme=1, padding="REFLECT"),
    "conv, kernel dilation, scheme 2": image(scheme=2, kernel_dilation=(2, 3)),
    "conv, input dilation, scheme 1": image(scheme=1, input_dilation=(2, 3), padding=1),
    "conv, input dilation, scheme 3": image(
        scheme=3, input_dilation=2, strides=3, padding=(0, 1)
    ),
    "conv, groups": grouped(),
    "conv, groups, scheme 1": grouped(scheme=1, strides=2),
    "conv, groups, scheme 3": grouped(scheme=3, padding="VALID"),
    "conv, depthwise": image(channels=(3, 6), feature_group_count=3),
    "conv, no bias, no strides": image(use_bias=False, strides=None),
    "conv, no batch axis": image(lead=()),
    "conv, two batch axes": image(lead=(2, 3)),
    "conv, two batch axes, groups": grouped(lead=(2, 3)),
    "conv 1-D, CAUSAL": line(padding="CAUSAL", kernel_dilation=2),
    "conv 1-D, CAUSAL, scheme 3": line(padding="CAUSAL", scheme=3),
    "conv 3-D": image((2, 1, 3), size=(3, 2, 4)),
    "conv 3-D, scheme 3": image((2, 1, 3), size=(3, 2, 4), strides=(1, 2, 2), scheme=3),
    "conv transpose": spread(strides=(2, 3)),
    "conv transpose, scheme 1": spread(strides=2, scheme=1, padding="VALID"),
    "conv transpose, scheme 2": spread(strides=(1, 2), scheme=2, padding=((1, 0), 2)),
    "conv transpose, scheme 3": spread(strides=2, scheme=3),
    "conv transpose, CIRCULAR": spread(strides=2, padding="CIRCULAR"),
    "conv transpose, CIRCULAR, scheme 3": spread(padding="CIRCULAR", scheme=3),
    "conv transpose, dilation": spread(kernel_dilation=(2, 1), use_bias=False),
    "conv transpose, turned": spread(strides=2, transpose_kernel=True),
    "conv transpose, turned, scheme 1": spread(
        (3, 3), strides=2, transpose_kernel=True, scheme=1, padding="CIRCULAR"
    ),
    "conv transpose, turned, scheme 3": spread(
        strides=3, transpose_kernel=True, scheme=3, padding="VALID"
    ),
    "conv transpose, no batch axis": spread(lead=(), strides=2),
    "conv transpose, two batch axes, scheme 2": spread(lead=(2, 2), scheme=2),
    "conv transpose 1-D": spread((3,), size=(4,), strides=2),
}
ONE_OF_EACH = (
    "linear",
    "general, batch axis",
    "einsum, shared axis",
    "embed, lookup",
    "embed, attend",
    "conv, groups, scheme 1",
    "conv transpose, turned, scheme 1",
)


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@contextlib.contextmanager
def forced(order: Order | None):
    """Makes the layers multiply in this order, or for None in the one they choose."""
    with contextlib.ExitStack() as stack:
        for module in (conv, embed, linear) if order else ():
            stack.enter_context(
                mock.patch.object(
                    module, "merged_is_cheaper", lambda *_, **__: order == "merged"
                )
            )
        yield


def forward(layer: nnx.Module, row: Row, inputs, order: Order | None = None):
    with forced(order):
        return getattr(layer, row.call)(inputs)


def name_of(row: Row) -> str:
    return next(name for name, other in ROWS.items() if other is row)


@functools.cache
def parts(name: str, with_s: bool, options: tuple[tuple[str, Any], ...]):
    row = ROWS[name]
    dense, low_rank = row.dense(**dict(options)), LAYERS[row.kind]
    factors = None
    if with_s:
        fold = low_rank.fold_of(dense, **row.fold)
        matrix = fold.to_matrix(getattr(dense, low_rank.kernel_name)[...])
        factors = Factors.from_matrix(matrix, fold.full_rank, with_s=True)
    return nnx.split(low_rank.from_dense(dense, factors=factors, **row.fold))


def factorized(row: Row, with_s: bool = False, **options: Any) -> LowRankLayer:
    """The layer of a row in low-rank form at full rank, a new one every time."""
    return nnx.merge(*parts(name_of(row), with_s, tuple(options.items())), copy=True)


def at_rank(layer: LowRankLayer, rank) -> LowRankLayer:
    """A copy of the layer with this active rank, which may be traced."""
    layer = nnx.clone(layer)
    layer.factors.set_rank(rank)
    return layer


def cut_at(layer: LowRankLayer, rank: int) -> LowRankLayer:
    layer = nnx.clone(layer)
    layer.factors.cut(rank)
    return layer


def nearest(row: Row, rank: int) -> nnx.Module:
    """The dense layer with its kernel's matrix cut at a rank by NumPy in float64."""
    dense, low_rank = row.dense(), LAYERS[row.kind]
    fold, name = low_rank.fold_of(dense, **row.fold), low_rank.kernel_name
    matrix = np.asarray(fold.to_matrix(getattr(dense, name)[...]), np.float64)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    cut = (u * s[..., None, :])[..., :rank] @ v[..., :rank, :]
    setattr(dense, name, nnx.Param(fold.to_kernel(jnp.asarray(cut, jnp.float32))))
    return dense


def forward_all(layers: list[nnx.Module], row: Row, inputs):
    """The outputs of layers of equal shapes, one after the other."""
    graph, states = nnx.split(layers[0])[0], [nnx.state(layer) for layer in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return jax.vmap(lambda x: forward(nnx.merge(graph, x), row, inputs))(stacked)


@functools.cache
def outputs_by_rank(name: str) -> dict[str, np.ndarray]:
    """All that a layer gives at each of its ranks, in one compiled call.

    Ranks are mapped wherever shapes allow it, so that there is less to compile.
    """
    row = ROWS[name]
    layers = {with_s: factorized(row, with_s) for with_s in (False, True)}
    ranks = range(layers[False].factors.max_rank + 1)
    near = [nearest(row, rank) for rank in ranks]
    cut = {s: [cut_at(layer, r) for r in ranks] for s, layer in layers.items()}
    graph, state = nnx.split((row.dense(), layers, near, cut))

    @jax.jit
    def every(inputs, state):
        dense, layers, near, cut = nnx.merge(graph, state)
        results = {
            "dense": forward(dense, row, inputs),
            "nearest": forward_all(near, row, inputs),
            "cut": jnp.stack([forward(x, row, inputs) for x in cut[False]]),
        }
        for with_s, layer in layers.items():
            for order in ORDERS:
                results[f"masked, {order}, with_s={with_s}"] = jax.vmap(
                    lambda r, x=layer, o=order: forward(at_rank(x, r), row, inputs, o)
                )(jnp.arange(len(ranks)))
            results[f"masked, to_dense, with_s={with_s}"] = jax.vmap(
                lambda r, x=layer: forward(at_rank(x, r).to_dense(), row, inputs)
            )(jnp.arange(len(ranks)))
            results[f"cut, to_dense, with_s={with_s}"] = forward_all(
                [x.to_dense() for x in cut[with_s]], row, inputs
            )
        return results

    return jax.tree.map(np.asarray, every(row.inputs(), state))
