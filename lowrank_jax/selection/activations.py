"""What each rank of each layer keeps of its outputs: curves from a model run on data.

For a layer y = x W + b the error of a cut, weighted by the inputs, is `E||x (W -
W_r)||^2 = tr((W - W_r)^T S (W - W_r))` with `S = E[x^T x]`, cross terms of the columns
that go included. It is what data-aware factorisations minimise (SVD-LLM, Wang et al.,
2024; FlexRank's DataSVD, Zaccone et al., 2026); here the factors stay as they are, and
it only says what their cuts lose. It is measured as it stands, as the outputs of the
layer at its active rank less those at a lower one, so that a layer of any kind is like
any other and the bias cancels.

The sums come out of the model as a derivative: each layer adds them to the gradient by
a number of its own, and so they pass through `nnx.scan`, `vmap`, `jit` and `remat`.
Letters: `n` settings, `outer` the axes over which a layer is stacked by those.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lowrank_jax import placement
from lowrank_jax.active import get_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.layers import LowRankLayer, LowRankParam
from lowrank_jax.nnx_internals import change_type, split, view_as, wrapping_calls
from lowrank_jax.paths import find_factors, find_layers
from lowrank_jax.ranked import Rank
from lowrank_jax.ranks import flatten_rank, name_of
from lowrank_jax.selection import curves, tails
from lowrank_jax.selection.tails import Errors


def output_losses(
    model: nnx.Module,
    batches: Iterable[Any],
    forward: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
) -> Errors:
    """Measures the share of its outputs' energy that each matrix loses when cut.

    The energy is the summed square of what the matrix adds to the outputs, with the
    model as in evaluation and all else at its active rank. It is measured at the ranks
    up to 8 and at four for each doubling from there, and is on a line between them.
    Factors that are no singular vectors may lose more at a higher rank: a rank that
    loses less than a higher one counts as that one, as in `curves.losses`. With white
    inputs and canonical factors it is `tails.energy`, and so it is taken to be of what
    is never called, such as a Param.

    Args:
      model: A low-rank model; it stays as it is.
      batches: What to run it on, of one shape so that nothing recompiles.
      forward: How to run the model on a batch.

    Returns:
      Of each layer, for each of its matrices, the share at 0, 1, ... columns.

    Raises:
      UserError: There is no batch, outputs are not finite, a layer has one rank per
        example, or its outputs reach those of the model by no derivative.
    """
    factors, ranks = find_factors(model), get_ranks(model)
    curves.check_common(factors)
    probe, layers = _measuring(model)
    sums = _sums(probe, layers, batches, forward)
    called = {path: one for path, one in layers.items() if one.measured_record.calls}
    _check(called, sums)
    # Layers that share factors add up.
    owners = {id(one): path for path, one in find_factors(probe).items()}
    found: dict[str, dict[int, Float[np.ndarray, "*stack"]]] = {}
    for path, layer in called.items():
        of_owner = found.setdefault(owners[id(layer.factors)], {})
        for rank, lost in layer.measured_record.by_rank(sums[path][..., 0]).items():
            of_owner[rank] = of_owner.get(rank, 0.0) + lost
    unseen = {path: rank for path, rank in ranks.items() if path not in found}
    importances = curves.column_importances({path: factors[path] for path in unseen})
    errors = dict(tails.list_errors(importances, unseen))
    for path, lost in found.items():
        rows = np.stack(list(lost.values()), axis=-1).reshape(-1, len(lost))
        errors[path] = [
            _share([*lost], row, active)
            for row, active in zip(rows, flatten_rank(ranks[path]), strict=True)
        ]
    return {path: errors[path] for path in ranks}


class _Cap(Rank):
    """The rank to which a layer is cut for a measurement, in the shape of its own."""


class _Lost(nnx.Param):
    """Zero; its gradient is what the layer's outputs lose at the cap, and how often it
    was called: `(*outer, 2)`. It is stacked as parameters are."""


class _Measured:
    """What a layer that measures keeps outside of traces.

    Attributes:
      settings: Which matrix of a call is cut, and to which rank: one at a time.
      calls: The numbers of the layer's calls among all that were traced.
    """

    def __init__(self, layer: LowRankLayer, numbers: Iterator[int]):
        self._numbers = numbers
        self.calls: list[int] = []
        self._stack, self._most = layer.factors.stack_shape, layer.factors.max_rank
        self._inner = layer.fold.stack_shape
        self.outer = self._stack[: len(self._stack) - len(self._inner)]
        self.settings = [
            (index, rank)
            for index in np.ndindex(self._inner)
            for rank in _ladder(self._most)
        ]

    def note(self) -> None:
        self.calls.append(next(self._numbers))

    def cap(self, number: int) -> Int[np.ndarray, "*stack"]:
        """The ranks of a setting; none is cut behind the last."""
        caps = np.full(self._stack, self._most, np.int32)
        if number < len(self.settings):
            index, rank = self.settings[number]
            caps[(..., *index)] = rank
        return caps

    def by_rank(
        self, sums: Float[np.ndarray, "..."]
    ) -> dict[int, Float[np.ndarray, "*stack"]]:
        """Sums at the settings, by rank."""
        found = {rank: np.zeros(self._stack) for rank in _ladder(self._most)}
        for (index, rank), lost in zip(self.settings, sums, strict=True):
            found[rank][(..., *index)] = lost
        return found


def _ladder(rank: int) -> list[int]:
    """The ranks up to 8, then four for each doubling, from 0 to below a rank.

    >>> _ladder(24)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
    """
    ladder = [0]
    while ladder[-1] < rank:
        step = 2 ** max(ladder[-1].bit_length() - 3, 0)
        ladder.append(ladder[-1] + step)
    return [one for one in ladder if one < max(rank, 1)]


def _measuring(model: nnx.Module) -> tuple[nnx.Module, dict[str, Any]]:
    """A copy of a model whose low-rank layers measure, and these by path."""
    probe, numbers = nnx.clone(model), itertools.count()
    probe.eval()
    layers = {}
    for path, (layer, _) in find_layers(probe).items():
        if isinstance(layer, LowRankLayer) and not isinstance(layer, LowRankParam):
            change_type(layer, _measuring_type(type(layer)))
            layer.measured_record = _Measured(layer, numbers)
            layer.measured_cap = _Cap(jnp.asarray(layer.measured_record.cap(0)))
            layer.measured_lost = _Lost(
                jnp.zeros((*layer.measured_record.outer, 2), jnp.float32)
            )
            layers[path] = layer
    return probe, layers


@functools.cache
def _measuring_type(cls: type[LowRankLayer]) -> type[nnx.Module]:
    """Makes a subclass that runs a second time at its cap, at each call."""

    def measuring(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.measured_record.note()
            rank = jnp.minimum(self.factors.rank[...], self.measured_cap[...])
            factors = view_as(type(self.factors), self.factors, rank=Rank(rank))
            whole = method(view_as(cls, self), *args, **kwargs)
            cut = method(view_as(cls, self, factors=factors), *args, **kwargs)
            # A layer of the user's may give several arrays: the first counts.
            (first, *rest), tree = jax.tree.flatten(whole)
            ends = (first, jax.tree.leaves(cut)[0])
            gone = jnp.subtract(*(end.astype(jnp.float32) for end in ends))
            lost = jnp.stack([jnp.sum(jnp.square(gone)), jnp.ones(())])
            noted = _noted(first, self.measured_lost[...], lost)
            return jax.tree.unflatten(tree, [noted, *rest])

        return call

    return wrapping_calls(cls, measuring)


@jax.custom_vjp
def _noted(outputs: Array, place: Array, lost: Array) -> Array:
    """The outputs; the gradient by `place` is `lost`, whatever is differentiated."""
    return outputs


def _noted_forward(outputs: Array, place: Array, lost: Array) -> tuple[Array, Array]:
    return outputs, lost


def _noted_backward(lost: Array, cotangent: Array) -> tuple[Array, Array, Array]:
    return cotangent, lost, jnp.zeros_like(lost)


_noted.defvjp(_noted_forward, _noted_backward)


def _sums(
    probe: nnx.Module,
    layers: Mapping[str, Any],
    batches: Iterable[Any],
    forward: Callable[[nnx.Module, Any], Any],
) -> dict[str, Float[np.ndarray, "n *outer 2"]]:
    """What the outputs of each layer lose at each of its settings, and how often they
    count, summed over the batches in float64."""
    graphdef, places, _, rest = split(probe, _Lost, _Cap, ...)

    @jax.jit
    def gradient(places: Any, caps: Any, rest: Any, batch: Any) -> Any:
        def total(places: Any) -> Array:
            model = nnx.merge(graphdef, places, caps, rest, copy=True)
            outputs = jax.tree.leaves(forward(model, batch))
            floats = [one for one in outputs if jnp.issubdtype(one.dtype, jnp.inexact)]
            return sum((jnp.sum(one).real for one in floats), start=jnp.zeros(()))

        return jax.grad(total)(places)

    settings = {
        path: len(layer.measured_record.settings) for path, layer in layers.items()
    }
    sums = {
        path: np.zeros((settings[path], *layer.measured_lost.shape))
        for path, layer in layers.items()
    }
    ran = False
    for batch in batches:
        ran = True
        for number in range(max(settings.values(), default=0)):
            for layer in layers.values():
                layer.measured_cap.set_value(
                    jnp.asarray(layer.measured_record.cap(number))
                )
            nnx.update(probe, gradient(places, nnx.state(probe, _Cap), rest, batch))
            for path, layer in layers.items():
                if number < settings[path]:
                    sums[path][number] += placement.to_host(layer.measured_lost[...])
    if not ran:
        raise UserError(
            "activations: batches must hold at least one batch, got none. Give held-out"
            " or training batches."
        )
    return sums


def _check(called: Mapping[str, Any], sums: Mapping[str, np.ndarray]) -> None:
    """Refuses the first layer, as the model calls them, that cannot be measured."""
    for path in sorted(called, key=lambda path: called[path].measured_record.calls[0]):
        if not np.isfinite(sums[path]).all():
            raise UserError(
                f"{name_of(path)}: activations must be finite, got NaN or infinity."
                " Train or load the model anew, and look at the batches."
            )
        if not sums[path][..., 1].all():
            raise UserError(
                f"{name_of(path)}: its outputs must reach those of the model by a"
                " derivative to be measured, got none. Keep the layer dense, or choose"
                " another curve."
            )


def _share(
    levels: Sequence[int], lost: Float[np.ndarray, " n"], active: int
) -> Float[np.ndarray, " m"]:
    """The share of what a matrix adds that goes, at each number of columns."""
    known = [level for level in levels if level < active]
    shares = lost[: len(known)] / (lost[0] if lost[0] > 0 else 1)
    return curves.falling(known, shares, active)
