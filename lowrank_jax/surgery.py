"""Surgery: put low rank into a model, read and set its ranks, cut it, take it out
again.

Works on any Flax NNX model, without touching its code. A path is the `"/"`-joined NNX
path of a layer, the same in rules, logs, errors, rank files and checkpoints. Functions
that change the model's shape return a new model and leave the one they are given alone.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lowrank_jax.cost import RankValue, flatten_rank, fraction_of
from lowrank_jax.factors import Factors
from lowrank_jax.folds import ConvFold
from lowrank_jax.layers import LAYERS, LowRankLayer
from lowrank_jax.rules import match_rules

Ranks: TypeAlias = Mapping[str, RankValue]
"""Ranks outside jit: `{path: int}`, or nested lists of ints for stacked layers."""

LayerRule: TypeAlias = str | Mapping[str, Any]
"""What a rule asks for: "dense", "full", or a mapping with any of

- `max_rank` (clipped to the layer's) or `rank_fraction`: what to allocate;
- `scheme`: how the kernel of a convolution folds (`folds.conv_fold`);
- `with_s`: keep scales in `s` instead of sharing them between the factors;
- `depth`: number of factors, 2 or more (LoRITa);
- `init`: "svd" of the kernel (spectral initialisation where it is a fresh one, Khodak
  et al., 2021), or "random" factors of the kernel's variance.
"""

_RULE_KEYS = {"max_rank", "rank_fraction", "scheme", "with_s", "depth", "init"}


def find_layers(model: nnx.Module) -> dict[str, tuple[nnx.Module, list[str]]]:
    """All layers that have, or can have, a low-rank form.

    Returns:
      For each layer, under its first path in sorted order, the layer and all its paths
      (a module that is shared has several).
    """
    found: dict[int, tuple[nnx.Module, list[str]]] = {}
    for path, node in _walk(model):
        if type(node) in LAYERS or isinstance(node, LowRankLayer):
            found.setdefault(id(node), (node, []))[1].append(path)
    return {paths[0]: (layer, paths) for layer, paths in found.values()}


def find_factors(model: nnx.Module) -> dict[str, Factors]:
    """All `Factors` of a model by the path of their layer, each once.

    Factors that several layers share stand under their first path.
    """
    found: dict[int, tuple[str, Factors]] = {}
    for path, node in _walk(model):
        if isinstance(node, Factors):
            found.setdefault(id(node), (_layer_path(path), node))
    return dict(found.values())


def find_aliases(model: nnx.Module) -> dict[str, str]:
    """The further paths of shared factors: `{path: path in find_factors}`."""
    first: dict[int, str] = {}
    aliases = {}
    for path, node in _walk(model):
        if isinstance(node, Factors):
            path = _layer_path(path)
            if first.setdefault(id(node), path) != path:
                aliases[path] = first[id(node)]
    return aliases


def factorize(
    model: nnx.Module,
    rules: Sequence[tuple[str, LayerRule]] = ((".*", "full"),),
    *,
    rngs: nnx.Rngs | None = None,
    where: str = "rank_rules",
) -> nnx.Module:
    """A copy of the model with its layers in low-rank form.

    Every kernel becomes the product of its SVD (unless a rule says "random"), so that
    at full rank the function is unchanged. A module or a weight that is shared stays
    shared.

    Args:
      model: Any NNX model; layers that are low-rank already stay as they are.
      rules: Ordered pairs of a pattern (a regular expression for the whole path) and
        what to make of these layers, a `LayerRule`.
      rngs: Source of keys for rules with "random".
      where: What to call the rules in errors.

    Raises:
      ValueError: A layer that no rule covers, a rule without a layer, a bad value, a
        layer that has no low-rank form, or a kernel with NaN or infinity; all offenders
        of a kind at once.

    >>> model = factorize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), [(".*", {"max_rank": 2})])
    >>> find_factors(model)[""].max_rank
    2
    """
    model = nnx.clone(model)
    layers = find_layers(model)
    chosen = match_rules(
        rules, {path: paths for path, (_, paths) in layers.items()}, where=where
    )
    shared: dict[Any, Factors] = {}
    twins: dict[int, nnx.Module] = {}
    forms: dict[int, dict[Any, str]] = {}  # of each kernel: what is made of it, where
    problems = []
    for path, (layer, _) in layers.items():
        if isinstance(layer, LowRankLayer):
            continue
        kernel, form = getattr(layer, LAYERS[type(layer)].kernel_name), "dense"
        if chosen[path] != "dense":
            try:
                twin = _twin(layer, chosen[path], shared, rngs)
            except (TypeError, ValueError) as error:
                problems.append(f"{path}: {error}")
                continue
            twins[id(layer)], form = twin, id(twin.factors)
        forms.setdefault(id(kernel), {}).setdefault(form, path)
    problems += [
        f"{', '.join(paths.values())}: layers with one kernel must have one form, got"
        " several ranks or schemes, or one of them dense. Give them the same rule."
        for paths in forms.values()
        if len(paths) > 1
    ]
    if problems:
        raise ValueError(f"{where}: " + "\n".join(problems))
    return _replace(model, lambda node: twins.get(id(node)))


def rules_of(model: nnx.Module) -> list[tuple[str, LayerRule]]:
    """The rules by which `factorize` makes this model's structure from its dense twin.

    >>> rules_of(factorize(nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))))
    [('layers/0', {'max_rank': 4, 'with_s': False, 'depth': 2})]
    """
    rules: list[tuple[str, LayerRule]] = []
    dense = False
    for path, (layer, _) in find_layers(model).items():
        if not isinstance(layer, LowRankLayer):
            dense = True
            continue
        rule = {
            "max_rank": layer.factors.max_rank,
            "with_s": layer.factors.s is not None,
            "depth": layer.factors.depth,
        }
        if isinstance(layer.fold, ConvFold):
            rule["scheme"] = layer.fold.scheme
        rules.append((re.escape(path), rule))
    return [*rules, (".*", "dense")] if dense else rules


def kernel_matrices(model: nnx.Module) -> dict[str, Float[Array, "*stack i o"]]:
    """The matrix of each layer that has, or can have, a low-rank form.

    Dense kernels fold as `factorize` folds them by default; factors are multiplied at
    their active rank.
    """
    matrices = {}
    for path, (layer, _) in find_layers(model).items():
        if isinstance(layer, LowRankLayer):
            matrices[path] = layer.factors.matrix()
            continue
        kind = LAYERS[type(layer)]
        try:
            fold = kind.fold_of(layer)
        except ValueError:  # it has no low-rank form after all, such as a masked kernel
            continue
        matrices[path] = fold.to_matrix(getattr(layer, kind.kernel_name)[...])
    return matrices


def merge(model: nnx.Module, paths: Collection[str] | None = None) -> nnx.Module:
    """A copy of the model with low-rank layers dense again, at their active rank.

    Args:
      model: A low-rank model.
      paths: Which factors, as in `find_factors`; None for all.

    Raises:
      ValueError: A path that is unknown.
    """
    factors = find_factors(model)
    if unknown := [path for path in paths or () if path not in factors]:
        raise ValueError(_unknown(unknown, factors))
    model = nnx.clone(model)
    chosen = {
        id(one)
        for path, one in find_factors(model).items()
        if paths is None or path in paths
    }
    kernels: dict[Any, nnx.Param] = {}

    def dense(node: Any) -> nnx.Module | None:
        if not isinstance(node, LowRankLayer) or id(node.factors) not in chosen:
            return None
        key = (id(node.factors), node.fold)
        if key not in kernels:
            kernels[key] = nnx.Param(node.merged_kernel())
        return node.to_dense(kernels[key])

    return _replace(model, dense)


def truncate(model: nnx.Module, ranks: Ranks) -> nnx.Module:
    """A copy of the model cut to these ranks: smaller arrays, all of them active.

    Args:
      model: A low-rank model.
      ranks: Rank of each layer by path; layers that are not named keep theirs. A stack
        of layers with different ranks is allocated at the largest and masked below it.

    Raises:
      ValueError: An unknown path or a rank outside [0, allocated], all at once.
    """
    ranks = check_ranks(model, ranks)
    model = nnx.clone(model)
    for path, factors in find_factors(model).items():
        if path in ranks:
            factors.cut(ranks[path])
    return model


def canonicalize(model: nnx.Module) -> nnx.Module:
    """A copy whose factors are the SVD of their product at the active rank.

    The singular values are in `s` where there is one, else shared equally; the square
    factors of a deeper product are multiplied back. The function stays, the columns
    come in order of their singular values, and every prefix is the best approximation
    of its rank (Eckart-Young). Not for models trained with ordered dropout: their own
    order is better for the loss.
    """
    model = nnx.clone(model)
    for path, factors in find_factors(model).items():
        product = [x for x in factors.arrays() if x is not None]
        if not any(isinstance(x, jax.core.Tracer) for x in product) and not all(
            np.isfinite(x).all() for x in product
        ):
            raise ValueError(
                f"{path}: factors must be finite to have an SVD, got NaN or infinity."
                " Train or load them anew, with a lower learning rate."
            )
        factors.canonicalize()
    return model


def get_ranks(model: nnx.Module) -> dict[str, RankValue]:
    """The active rank of each layer, as plain numbers."""
    return {path: factors.get_rank() for path, factors in find_factors(model).items()}


def max_ranks(model: nnx.Module) -> dict[str, RankValue]:
    """The allocated rank of each layer, in the shape of its active one."""
    return {
        path: np.full(factors.stack_shape, factors.max_rank).tolist()
        for path, factors in find_factors(model).items()
    }


def set_ranks(
    model: nnx.Module, ranks: Ranks | Mapping[str, Int[Array, "..."]]
) -> None:
    """Sets the active ranks, in place; nothing recompiles.

    Args:
      model: A low-rank model.
      ranks: By path: plain numbers (checked), or arrays, traced ones included (not
        checked), with a trailing axis for one rank per example. Layers that are not
        named keep theirs.
    """
    plain = {p: r for p, r in ranks.items() if not isinstance(r, jax.Array)}
    values = {**ranks, **check_ranks(model, plain)} if plain else ranks
    factors, aliases = find_factors(model), None
    for path, rank in values.items():
        if path not in factors:
            aliases = find_aliases(model) if aliases is None else aliases
            path = aliases.get(path, path)
        if path not in factors:
            raise ValueError(_unknown([path], factors))
        factors[path].set_rank(rank)


def check_ranks(model: nnx.Module, ranks: Ranks) -> dict[str, RankValue]:
    """The ranks under the paths of `find_factors`, checked against the model.

    Raises:
      ValueError: Unknown paths, ranks that are not whole numbers in [0, allocated] or
        not of the stack's shape; all offenders at once.
    """
    factors, aliases = find_factors(model), find_aliases(model)
    named = {aliases.get(path, path): rank for path, rank in ranks.items()}
    limits = {path: (one.max_rank, one.stack_shape) for path, one in factors.items()}
    problems = rank_problems(named, limits)
    if problems:
        raise ValueError("\n".join(problems))
    return named


def rank_problems(
    ranks: Ranks, limits: Mapping[str, tuple[int, tuple[int, ...]]]
) -> list[str]:
    """What is wrong with ranks, a line for each offender; empty if nothing is.

    Args:
      ranks: Ranks by path.
      limits: The allocated rank and the stack's shape of each layer.
    """
    unknown = [path for path in ranks if path not in limits]
    problems = [_unknown(unknown, limits)] if unknown else []
    for path, rank in ranks.items():
        if path in limits:
            problems += _rank_problem(path, rank, *limits[path])
    return problems


def _rank_problem(
    path: str, rank: RankValue, limit: int, stack: tuple[int, ...]
) -> list[str]:
    try:
        array = np.asarray(rank)
    except ValueError:  # lists of unequal length
        array = np.asarray(None)
    if array.dtype.kind not in "iu" or array.shape not in ((), stack):
        shape = f" or nested lists of shape {stack}" if stack else ""
        return [
            f"{path}: rank must be a whole number{shape}, got {rank!r}. Correct it."
        ]
    if any(not 0 <= number <= limit for number in flatten_rank(array.tolist())):
        return [
            f"{path}: rank must be in [0, {limit}], got {rank}. Lower it; columns that"
            " were cut away or never allocated cannot come back."
        ]
    return []


def _unknown(paths: Sequence[str], known: Mapping[str, Any]) -> str:
    return (
        f"paths: must name low-rank layers, got {list(paths)}. The model has"
        f" {list(known)}."
    )


def _twin(
    layer: nnx.Module,
    rule: LayerRule,
    shared: dict[Any, Factors],
    rngs: nnx.Rngs | None,
) -> LowRankLayer:
    """The low-rank twin of one layer; `shared` holds the factors made so far."""
    kind = LAYERS[type(layer)]
    options = {} if rule == "full" else rule
    if not isinstance(options, Mapping) or not set(options) <= _RULE_KEYS:
        raise ValueError(
            f"a rule must be 'dense', 'full' or a mapping of {sorted(_RULE_KEYS)}, got"
            f" {rule!r}."
        )
    fold_options = {"scheme": options["scheme"]} if "scheme" in options else {}
    if fold_options and type(layer) is not nnx.Conv:
        raise ValueError(f"scheme is for convolutions, got it for {type(layer)}.")
    fold = kind.fold_of(layer, **fold_options)
    max_rank = _allocated_rank(options, fold.full_rank)
    kernel = getattr(layer, kind.kernel_name)
    form = _form(options)
    key = (id(kernel), fold, max_rank, *form)
    if key not in shared:
        shared[key] = _factors(fold.to_matrix(kernel[...]), max_rank, *form, rngs)
    return kind.from_dense(
        layer, max_rank=max_rank, factors=shared[key], **fold_options
    )


def _form(options: Mapping[str, Any]) -> tuple[bool, int, str]:
    """`with_s`, `depth` and `init` of a rule, checked."""
    with_s, depth = options.get("with_s", False), options.get("depth", 2)
    init = options.get("init", "svd")
    if not isinstance(with_s, bool):
        raise ValueError(f"with_s must be true or false, got {with_s!r}.")
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise ValueError(f"depth must be a whole number >= 2, got {depth!r}.")
    if init not in ("svd", "random"):
        raise ValueError(f"init must be 'svd' or 'random', got {init!r}.")
    return with_s, depth, init


def _factors(
    matrix: Array,
    max_rank: int,
    with_s: bool,
    depth: int,
    init: str,
    rngs: nnx.Rngs | None,
) -> Factors:
    """The factors that a rule makes of a kernel's matrix."""
    if not isinstance(matrix, jax.core.Tracer) and not np.isfinite(matrix).all():
        raise ValueError(
            "the kernel must be finite to be factored, got NaN or infinity. Train or"
            " load it anew, with a lower learning rate."
        )
    if init == "svd":
        return Factors.from_matrix(matrix, max_rank, with_s=with_s, depth=depth)
    if rngs is None or depth != 2:
        raise ValueError(
            "init 'random' needs rngs and a depth of 2, got"
            f" rngs={rngs}, depth={depth}. Pass factorize(..., rngs=)."
        )
    return Factors.random(rngs.params(), matrix, max_rank, with_s=with_s)


def _allocated_rank(options: Mapping[str, Any], full_rank: int) -> int:
    if "max_rank" in options and "rank_fraction" in options:
        raise ValueError(f"give max_rank or rank_fraction, not both, got {options}.")
    if "max_rank" in options:
        rank = options["max_rank"]
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"max_rank must be a whole number >= 0, got {rank!r}.")
        return min(rank, full_rank)
    if "rank_fraction" in options:
        fraction = options["rank_fraction"]
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise ValueError(f"rank_fraction must be a number, got {fraction!r}.")
        return fraction_of(fraction, full_rank)
    return full_rank


def _layer_path(path: str) -> str:
    return path.removesuffix("factors").removesuffix("/")


def _walk(root: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Every reference to a node in sorted order, a shared one at each of its paths."""

    def visit(node: Any, parts: tuple[str, ...], parents: tuple[int, ...]):
        if id(node) in parents:  # a cycle in the graph
            return
        yield "/".join(parts), node
        for key, child in _children(node):
            yield from visit(child, (*parts, str(key)), (*parents, id(node)))

    yield from visit(root, (), ())


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, Mapping):  # keys may be of several types
        return sorted(node.items(), key=lambda item: str(item[0]))
    if isinstance(node, list | tuple | nnx.List):
        return enumerate(node)
    if isinstance(node, nnx.Module):
        return sorted(
            (name, value)
            for name, value in vars(node).items()
            if not name.startswith("_pytree")
        )
    return ()


def _replace(
    root: nnx.Module, replacement: Callable[[Any], nnx.Module | None]
) -> nnx.Module:
    """Replaces nodes in place, shared ones by the same new one; returns the root."""
    done: dict[int, Any] = {}

    def visit(node: Any) -> Any:
        if id(node) in done:
            return done[id(node)]
        new = replacement(node)
        done[id(node)] = node if new is None else new
        if new is not None:
            return new
        children = [(key, child, visit(child)) for key, child in _children(node)]
        if isinstance(node, tuple):
            done[id(node)] = tuple(new for _, _, new in children)
            return done[id(node)]
        for key, child, new in children:
            if new is child:
                continue
            if isinstance(node, list | Mapping | nnx.List):
                node[key] = new
            else:
                setattr(node, key, nnx.data(new))
        return node

    return visit(root)
