"""Factorization: put low rank into a model by rules, and read the rules back."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax import placement
from lowrank_jax.errors import UserError, raise_all, unknown
from lowrank_jax.factors import Factors
from lowrank_jax.folds import ConvFold, Fold
from lowrank_jax.forms import FORMS
from lowrank_jax.layers import LAYERS, LowRankLayer, LowRankParam, low_rank_type
from lowrank_jax.paths import (
    factors_of_layers,
    find_layers,
    find_own_matrices,
    param_sizes,
    replace,
)
from lowrank_jax.ranks import fraction_of, name_of
from lowrank_jax.rules import compile_pattern, match_rules

LayerRule: TypeAlias = str | Mapping[str, Any]
"""What a rule asks for: "dense", "full", or a mapping with any of

- `max_rank` (clipped to the layer's) or `rank_fraction`: what to allocate;
- `scheme`: how the kernel of a convolution folds (`folds.conv_fold`);
- `form`: a key of `forms.FORMS`, "factored" by default, which takes
- `with_s`: keep scales in `s` instead of sharing them between the factors;
- `depth`: number of factors, 2 or more (LoRITa);
- `param`: True for a matrix Param that a module holds itself: the pattern then stands
  for the Param's path (no other rule than one with `param` factors a Param);
- `init`: "svd" of the kernel (spectral initialisation where it is a fresh one, Khodak
  et al., 2021), or "random" factors of the kernel's variance.
"""

_COMMON_KEYS = {"max_rank", "rank_fraction", "scheme", "form", "param"}
_RULE_KEYS = _COMMON_KEYS.union(*(form.rule_options for form in FORMS.values()))


class DenseWarning(UserWarning):
    """Matrices that factorization left dense, since it does not know their layers."""


def factorize(
    model: nnx.Module,
    rules: Sequence[tuple[str, LayerRule]] = ((".*", "full"),),
    *,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """Returns a copy of the model with its layers in low-rank form.

    Every kernel becomes the product of its SVD (unless a rule says "random"), so that
    at full rank the function is unchanged. A module or a weight that is shared stays
    shared. Factors of a kernel that is split over a mesh are split alike: `u` as its
    input axes, `v` as its output axes, the rank axis whole (`Fold.to_matrix`).

    Args:
      model: Any NNX model; layers that are low-rank already stay as they are.
      rules: Ordered pairs of a pattern (a regular expression for the whole path) and
        what to make of these layers, a `LayerRule`.
      rngs: Source of keys for rules with "random".

    Warns:
      DenseWarning: Matrices that modules hold themselves stay dense, and no rule says
        so.

    Raises:
      UserError: A layer that no rule covers, a rule without a layer, a bad value, a
        layer that has no low-rank form, or a kernel with NaN or infinity; all offenders
        of a kind at once.

    >>> model = factorize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), [(".*", {"max_rank": 2})])
    >>> model.factors.max_rank
    2
    """
    _check_pairs(rules)
    model = nnx.clone(model)
    layers, matrices = find_layers(model), find_own_matrices(model)
    chosen = _chosen_rules(rules, model, layers, matrices)
    with_rules = {
        path: (node, chosen[path])
        for path, (node, _) in {**layers, **matrices}.items()
        if path in chosen and not isinstance(node, LowRankLayer)
    }
    twins = _make_twins(with_rules, rngs)
    _warn_of_dense(model, [path for path in matrices if path not in chosen])
    return replace(model, lambda node: twins.get(id(node)))


def _make_twins(
    with_rules: Mapping[str, tuple[nnx.Module | nnx.Param, LayerRule]],
    rngs: nnx.Rngs | None,
) -> dict[int, LowRankLayer]:
    """The low-rank twins by the `id` of what they replace."""
    shared: dict[Any, Factors] = {}
    twins: dict[int, LowRankLayer] = {}
    aliases: dict[int, LowRankLayer] = {}
    forms: dict[int, dict[Any, str]] = {}  # of each kernel: what is made of it, where
    problems = []
    for path, (node, rule) in with_rules.items():
        kernel, form = _kernel(node), "dense"
        if rule != "dense":
            try:
                twin = _twin(node, rule, shared, rngs)
            except UserError as error:  # any other is a bug in the code of a layer
                problems.append(f"{name_of(path)}: {error}")
                continue
            twins[id(node)], form = twin, id(twin.factors)
            # A module may also hold a layer's kernel itself: a tied head stays tied.
            aliases[id(kernel)] = LowRankParam.from_dense(
                kernel, factors=twin.factors, fold=twin.fold
            )
        forms.setdefault(id(kernel), {}).setdefault(form, path)
    problems += [
        f"{', '.join(map(name_of, paths.values()))}: layers with one kernel must have"
        " one form, got several ranks or schemes, or one of them dense. Give them the"
        " same rule."
        for paths in forms.values()
        if len(paths) > 1
    ]
    raise_all(problems)
    return {**aliases, **twins}


def _check_pairs(rules: Sequence[tuple[str, LayerRule]]) -> None:
    raise_all(
        [
            "rules: must be pairs of a pattern and what to make of its layers, got"
            f" {rule!r}. Write ('.*', 'full')."
            for rule in rules
            if not isinstance(rule, list | tuple)
            or len(rule) != 2
            or not isinstance(rule[0], str)
        ]
    )


def _chosen_rules(
    rules: Sequence[tuple[str, LayerRule]],
    model: nnx.Module,
    layers: Mapping[str, tuple[nnx.Module, list[str]]],
    matrices: Mapping[str, tuple[nnx.Param, list[str]]],
) -> dict[str, LayerRule]:
    """The rule of each layer, and of each Param that a rule is about."""
    names = {path: paths for path, (_, paths) in layers.items()}
    patterns = [(compile_pattern(pattern), rule) for pattern, rule in rules]
    for path, (_, paths) in matrices.items():
        rule = _first_match(patterns, paths)
        if rule == "dense" or (isinstance(rule, Mapping) and "param" in rule):
            names[path] = paths
    if rules and not names:
        types = {type(node).__name__ for _, node in nnx.iter_modules(model)}
        raise UserError(
            "the model must hold a layer to factor, one of"
            f" {sorted(kind.__name__ for kind in LAYERS)} or of their subclasses, got"
            f" {sorted(types)} with matrices of their own at {sorted(matrices)}. Add"
            " the layer's class by layers.register, or name a matrix in a rule with"
            " 'param': True."
        )
    return match_rules(rules, names)


def _first_match(
    rules: Sequence[tuple[re.Pattern[str], LayerRule]], paths: Sequence[str]
) -> LayerRule | None:
    for pattern, rule in rules:
        if any(pattern.fullmatch(path) for path in paths):
            return rule
    return None


def _warn_of_dense(model: nnx.Module, paths: Sequence[str]) -> None:
    """Warns once of the matrices of a model that no rule is about."""
    if not paths:
        return
    sizes, matrices = param_sizes(model), find_own_matrices(model)
    total = sum(sizes.values())
    shares = {path: sizes[id(matrices[path][0])] / total for path in paths}
    listed = ", ".join(f"{path} ({share:.1%})" for path, share in shares.items())
    warnings.warn(
        f"factorize: {sum(shares.values()):.1%} of the parameters stay dense in"
        f" matrices that modules hold themselves: {listed}. Add their class by"
        " layers.register, name them in a rule with 'param': True to factor them, or"
        " with 'dense'.",
        DenseWarning,
        stacklevel=3,
    )


def rules_of(model: nnx.Module) -> list[tuple[str, LayerRule]]:
    """Returns the rules by which `factorize` makes this model of its dense twin.

    >>> rules_of(factorize(nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))))
    [('layers/0', {'max_rank': 4, 'with_s': False, 'depth': 2})]
    """
    rules: list[tuple[str, LayerRule]] = []
    dense = False
    layers = find_layers(model)
    of_layers = factors_of_layers(layers)
    for path, (layer, _) in layers.items():
        if not isinstance(layer, LowRankLayer):
            dense = True
            continue
        if isinstance(layer, LowRankParam) and id(layer.factors) in of_layers:
            continue  # a Param that is a layer's kernel too follows the layer's rule
        rule = layer.factors.rule()
        if isinstance(layer.fold, ConvFold):
            rule["scheme"] = layer.fold.scheme
        if isinstance(layer, LowRankParam):
            rule["param"] = True
        rules.append((re.escape(path), rule))
    return [*rules, (".*", "dense")] if dense else rules


def kernel_matrices(model: nnx.Module) -> dict[str, Float[Array, "*stack i o"]]:
    """Returns the matrix of each layer that has, or can have, a low-rank form.

    Dense kernels fold as `factorize` folds them by default; factors are multiplied at
    their active rank.
    """
    matrices = {}
    for path, (layer, _) in find_layers(model).items():
        if isinstance(layer, LowRankLayer):
            matrices[path] = layer.factors.matrix()
            continue
        kind = low_rank_type(type(layer))
        try:
            fold = kind.fold_of(layer)
        except UserError:  # it has no low-rank form after all, such as a masked kernel
            continue
        matrices[path] = fold.to_matrix(getattr(layer, kind.kernel_name)[...])
    return matrices


def _twin(
    layer: nnx.Module | nnx.Param,
    rule: LayerRule,
    shared: dict[Any, Factors],
    rngs: nnx.Rngs | None,
) -> LowRankLayer:
    """The low-rank twin of one layer; `shared` holds the factors made so far."""
    is_param = isinstance(layer, nnx.Param)
    kind = LowRankParam if is_param else low_rank_type(type(layer))
    options = {} if rule == "full" else rule
    if not isinstance(options, Mapping) or not set(options) <= _RULE_KEYS:
        raise UserError(
            f"a rule must be 'dense', 'full' or a mapping of {sorted(_RULE_KEYS)}, got"
            f" {rule!r}."
            " Write one of these."
        )
    if options.get("param", is_param) is not is_param:
        raise UserError(
            "param: true is for a matrix that a module holds itself, got"
            f" {options['param']!r} for a {type(layer).__name__}. Leave it out."
        )
    fold_options = {"scheme": options["scheme"]} if "scheme" in options else {}
    if not fold_options.keys() <= kind.fold_options:
        raise UserError(
            f"scheme is for convolutions, got it for {type(layer)}."
            " Drop it for this layer."
        )
    fold = kind.fold_of(layer, **fold_options)
    max_rank = _allocated_rank(options, fold.full_rank)
    kernel = _kernel(layer)
    _check_differentiable(fold, kernel)
    form, form_options = _form(options)
    key = (id(kernel), fold, max_rank, form.form, repr(form_options))
    if key not in shared:
        matrix = fold.to_matrix(kernel[...])
        traced = isinstance(matrix, jax.core.Tracer)
        if not traced and not placement.all_finite(matrix):
            raise UserError(
                "the kernel must be finite to be factored, got NaN or infinity. Train"
                " or load it anew, with a lower learning rate."
            )
        shared[key] = form.from_rule(matrix, max_rank, rngs=rngs, **form_options)
    return kind.from_dense(layer, factors=shared[key], **fold_options)


def _kernel(layer: nnx.Module | nnx.Param) -> nnx.Param:
    """The Param that is factored: the kernel of a dense layer, or a Param itself."""
    if isinstance(layer, nnx.Param):
        return layer
    return getattr(layer, low_rank_type(type(layer)).kernel_name)


def _check_differentiable(fold: Fold, kernel: nnx.Param) -> None:
    """Refuses what XLA differentiates wrongly and JAX in part cannot on explicit axes.

    Of a grouped convolution, dense or not, whose batch is split over one of several
    axes of a mesh, the kernel's gradient is too large (JAX 0.10.2): on a mesh of Auto
    axes too, but there nobody sees how the batch is split.
    """
    if getattr(fold, "groups", 1) == 1 or not placement.is_explicit(kernel[...]):
        return
    sizes = jax.typeof(kernel[...]).sharding.mesh.axis_sizes
    if sum(size > 1 for size in sizes) > 1:
        raise UserError(
            "a convolution with feature groups must be on a mesh of one axis where axes"
            f" are explicit, since XLA sums its gradient too often, got axes {sizes}."
            " Split the batch over the one axis of a mesh."
        )


def _form(options: Mapping[str, Any]) -> tuple[type[Factors], dict[str, Any]]:
    """The form that a rule asks for, and what the rule chooses of it."""
    name = options.get("form", Factors.form)
    if not isinstance(name, str) or name not in FORMS:
        raise UserError(f"form {unknown('a known one', name, sorted(FORMS))}")
    form = FORMS[name]
    given = {key: value for key, value in options.items() if key in form.rule_options}
    if foreign := set(options) - set(given) - _COMMON_KEYS:
        raise UserError(
            f"form {name!r} must have options of {sorted(form.rule_options)}, got"
            f" {sorted(foreign)}. Leave them out."
        )
    return form, {**form.rule_options, **given}


def _allocated_rank(options: Mapping[str, Any], full_rank: int) -> int:
    if "max_rank" in options and "rank_fraction" in options:
        raise UserError(
            f"give max_rank or rank_fraction, not both, got {options}. Drop one."
        )
    if "max_rank" in options:
        rank = options["max_rank"]
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise UserError(
                f"max_rank must be a whole number >= 0, got {rank!r}. Correct it."
            )
        return min(rank, full_rank)
    if "rank_fraction" in options:
        fraction = options["rank_fraction"]
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise UserError(
                f"rank_fraction must be a number, got {fraction!r}. Give one in (0, 1]."
            )
        return fraction_of(fraction, full_rank)
    return full_rank
