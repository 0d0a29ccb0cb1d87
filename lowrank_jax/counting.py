"""Parameters and MACs of a whole model, at any ranks, without running it.

MACs are those of one example in the layers that hold a kernel (linear, convolution,
einsum, attend); activations, norms and attention scores are not counted, as in the
literature. Matrices that modules hold themselves are counted in parameters only, and
named in `ModelCost.unseen`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from lowrank_jax.cost import LayerCost
from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.layers import LowRankLayer, LowRankParam, twin_type
from lowrank_jax.nnx_internals import change_type, wrapping_calls
from lowrank_jax.paths import (
    factors_of_layers,
    find_factors,
    find_layers,
    find_own_matrices,
    param_sizes,
    shape_of,
    walk,
)
from lowrank_jax.ranks import Ranks, largest

FactorArrays = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""The shapes of a layer's factors, each with its rank axes, from the end."""


class ModelCost(NamedTuple):
    """What a model costs as a function of its ranks.

    Args:
      layers: The cost of each factored layer by path; of layers that share their
        factors the MACs add up.
      fixed_params: Parameters outside the factors: dense kernels, biases, norms.
      fixed_macs: MACs of the layers that stay dense.
      unseen: Parameters of each matrix that a module holds itself, dense or factored,
        by path. What is multiplied by them is not in the MACs. Matrices that are added
        (`paths.find_own_matrices`), such as positions, are not among them.
      arrays: The arrays of the factors by path: their shapes, and which of the axes are
        of the rank.
    """

    layers: dict[str, LayerCost]
    fixed_params: int
    fixed_macs: int
    unseen: dict[str, int] = {}
    arrays: dict[str, FactorArrays] = {}

    def params(self, ranks: Ranks) -> int:
        """Counts all parameters, each factored layer in the smaller of its forms."""
        layers = sum(self.layers[path].params(rank) for path, rank in ranks.items())
        return self.fixed_params + layers

    def stored(self, ranks: Ranks) -> int:
        """Counts the parameters in a checkpoint that is cut to these ranks, each layer
        in the form that it has; a stack is allocated at its largest rank."""
        return self.fixed_params + sum(
            math.prod(
                largest(rank) if axis - len(shape) in axes else size
                for axis, size in enumerate(shape)
            )
            for path, rank in ranks.items()
            for shape, axes in self.arrays[path]
        )

    @property
    def allocated(self) -> int:
        """Counts the parameters of the model as it is, those beyond its active ranks
        too."""
        shapes = [shape for arrays in self.arrays.values() for shape, _ in arrays]
        return self.fixed_params + sum(map(math.prod, shapes))

    def macs(self, ranks: Ranks) -> int:
        """Counts the MACs of one example, each layer in the cheaper of its forms."""
        layers = sum(self.layers[path].macs(rank) for path, rank in ranks.items())
        return self.fixed_macs + layers

    @property
    def dense_params(self) -> int:
        """Counts the parameters of the dense twin of the model."""
        return self.fixed_params + sum(c.dense_params for c in self.layers.values())

    @property
    def dense_macs(self) -> int:
        """Counts the MACs of the dense twin of the model."""
        return self.fixed_macs + sum(cost.dense_macs for cost in self.layers.values())


def count(
    model: nnx.Module, *example: Any, forward: Callable[..., Any] | None = None
) -> ModelCost:
    """Counts what a model costs, from tracing it once on abstract input.

    A call counts where it is traced: a layer that `nnx.scan` runs several times without
    stacking it, or that a cached `nnx.jit` or `nnx.remat` runs again, counts once.

    Args:
      model: Any model, dense or low-rank.
      *example: Arguments for a batch of one example (arrays or `jax.ShapeDtypeStruct`).
      forward: How to call the model, `model(*example)` by default.

    >>> inputs = jax.ShapeDtypeStruct((1, 8), "float32")
    >>> cost = count(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), inputs)
    >>> cost.dense_params, cost.dense_macs
    (36, 32)
    """
    # What there is: factors by the path they count under, layers, matrices of modules.
    factors = find_factors(model)
    owners = {id(product): path for path, product in factors.items()}
    layers, sizes = find_layers(model), param_sizes(model)
    unseen = {
        path: sizes[id(param)] for path, (param, _) in find_own_matrices(model).items()
    }
    # MACs, where layers were called; those with the same factors add up.
    factored: dict[str, LayerCost] = {}
    fixed_macs = 0
    for path, cost in layer_costs(model, *example, forward=forward).items():
        layer = layers[path][0]
        if cost is None:
            unseen[path] = sizes[id(_kernel(layer))]
            continue
        if not isinstance(layer, LowRankLayer):
            fixed_macs += cost.dense_macs
            continue
        owner = owners[id(layer.factors)]
        shared_cost = factored.get(owner)
        factored[owner] = _add_positions(shared_cost, cost) if shared_cost else cost
    # What nobody saw: factored Params, unless they are a layer's kernel as well.
    of_layers = factors_of_layers(layers)
    for path, (layer, _) in layers.items():
        if isinstance(layer, LowRankParam) and id(layer.factors) not in of_layers:
            unseen[path] = factored[owners[id(layer.factors)]].dense_params
    # Parameters that no rank changes: all but those of the factors.
    in_factors = {id(node) for product in factors.values() for _, node in walk(product)}
    fixed_params = sum(size for key, size in sizes.items() if key not in in_factors)
    arrays = {path: _arrays_of(product) for path, product in factors.items()}
    return ModelCost(factored, fixed_params, fixed_macs, unseen, arrays)


def _arrays_of(factors: Factors) -> FactorArrays:
    axes = factors.rank_axes
    return tuple(
        (shape_of(param), axes.get(name, ()))
        for name, param in walk(factors)
        if isinstance(param, nnx.Param)
    )


def layer_costs(
    model: nnx.Module, *example: Any, forward: Callable[..., Any] | None = None
) -> dict[str, LayerCost | None]:
    """Returns the cost of each layer by path, as in `paths.find_layers`.

    None stands for a dense layer whose kernel is no matrix, such as a masked one.

    Args:
      model: Any model, dense or low-rank.
      *example: As for `count`.
      forward: As for `count`.
    """
    recorded = trace_calls(model, *example, forward=forward)
    costs: dict[str, LayerCost | None] = {}
    for path, (layer, _) in find_layers(model).items():
        try:
            costs[path] = layer_cost(layer, recorded[path])
        except UserError:  # it has no low-rank form
            costs[path] = None
    return costs


def _kernel(layer: nnx.Module) -> nnx.Param:
    return getattr(layer, twin_type(layer).kernel_name)


class Call(NamedTuple):
    """A call of a layer while a model is traced.

    Args:
      inputs: Shape of what it was given; of several arrays, the first.
      outputs: Shape of what it gave.
      method: Its name, "__call__" or "attend".
    """

    inputs: jax.ShapeDtypeStruct
    outputs: jax.ShapeDtypeStruct
    method: str


class _Recorder:
    """Keeps the calls of a layer; a static attribute of it while it is traced."""

    def __init__(self) -> None:
        self.calls: list[Call] = []


def trace_calls(
    model: nnx.Module, *example: Any, forward: Callable[..., Any] | None = None
) -> dict[str, list[Call]]:
    """Records every call of every layer, by path, as in `paths.find_layers`.

    Args:
      model: Any model, dense or low-rank.
      *example: Its arguments (arrays or `jax.ShapeDtypeStruct`).
      forward: As for `count`.
    """
    forward = forward or (lambda model, *inputs: model(*inputs))
    probe = nnx.clone(model)
    probe.eval()
    recorders = {}
    for path, (layer, _) in find_layers(probe).items():
        recording = change_type(layer, _recording_type(type(layer)))
        recording.recorder = recorders[path] = _Recorder()
    graphdef, state = nnx.split(probe)
    jax.eval_shape(
        lambda s, args: forward(nnx.merge(graphdef, s), *args), state, example
    )
    return {path: recorder.calls for path, recorder in recorders.items()}


@functools.cache
def _recording_type(cls: type[nnx.Module]) -> type[nnx.Module]:
    """Makes a subclass that notes each call; NNX transforms keep it, scans included."""

    def recording(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = method(self, *args, **kwargs)
            # A layer of the user's may take and give several arrays: the first counts.
            first = [jax.tree.leaves(tree)[0] for tree in ((args, kwargs), outputs)]
            given, got = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in first)
            self.recorder.calls.append(Call(given, got, method.__name__))
            return outputs

        return call

    return wrapping_calls(cls, recording)


def layer_cost(layer: nnx.Module, recorded: Sequence[Call] = ()) -> LayerCost:
    """Adds up the cost of one layer over all its calls.

    Without calls only its parameters count.

    Args:
      layer: A dense layer that has a low-rank form, or a low-rank one.
      recorded: Its calls, of `trace_calls`.

    Raises:
      UserError: The layer has no low-rank form.
    """
    if isinstance(layer, LowRankLayer):
        kind, fold = type(layer), layer.fold
        stacked = math.prod(layer.factors.stack_shape) // math.prod(fold.stack_shape)
    else:
        kind = twin_type(layer)
        fold = kind.fold_of(layer)
        stacked = math.prod(_kernel(layer).shape) // math.prod(fold.kernel_shape)
    calls = recorded[:1] if stacked > 1 else recorded  # a scan's one body
    costs = [kind.cost_of(layer, fold, *call[:2]) for call in calls] or [
        LayerCost(
            fold.input_size, fold.output_size, math.prod(fold.stack_shape), 0, 0, 0
        )
    ]
    total = functools.reduce(_add_positions, costs)
    total = dataclasses.replace(total, matrices=total.matrices * stacked)
    return layer.factors.cost(total) if isinstance(layer, LowRankLayer) else total


def _add_positions(cost: LayerCost, more: LayerCost) -> LayerCost:
    """Adds the calls of a second cost to a first one's, of the same matrices."""
    return dataclasses.replace(
        cost,
        dense_positions=cost.dense_positions + more.dense_positions,
        first_positions=cost.first_positions + more.first_positions,
        second_positions=cost.second_positions + more.second_positions,
        spared_positions=cost.spared_positions + more.spared_positions,
    )
