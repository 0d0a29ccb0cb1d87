"""Factorization: put low rank into a model by rules, and read the rules back."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lowrank_jax.errors import UserError
from lowrank_jax.factors import Factors
from lowrank_jax.folds import ConvFold
from lowrank_jax.forms import FORMS
from lowrank_jax.layers import LAYERS, LowRankLayer
from lowrank_jax.paths import find_layers, replace
from lowrank_jax.ranks import fraction_of
from lowrank_jax.rules import match_rules

LayerRule: TypeAlias = str | Mapping[str, Any]
"""What a rule asks for: "dense", "full", or a mapping with any of

- `max_rank` (clipped to the layer's) or `rank_fraction`: what to allocate;
- `scheme`: how the kernel of a convolution folds (`folds.conv_fold`);
- `form`: a key of `forms.FORMS`, "factored" by default, which takes
- `with_s`: keep scales in `s` instead of sharing them between the factors;
- `depth`: number of factors, 2 or more (LoRITa);
- `init`: "svd" of the kernel (spectral initialisation where it is a fresh one, Khodak
  et al., 2021), or "random" factors of the kernel's variance.
"""

_COMMON_KEYS = {"max_rank", "rank_fraction", "scheme", "form"}
_RULE_KEYS = _COMMON_KEYS.union(*(form.rule_options for form in FORMS.values()))


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
        raise UserError(f"{where}: " + "\n".join(problems))
    return replace(model, lambda node: twins.get(id(node)))


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
        rule = layer.factors.rule()
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
        raise UserError(
            f"a rule must be 'dense', 'full' or a mapping of {sorted(_RULE_KEYS)}, got"
            f" {rule!r}."
        )
    fold_options = {"scheme": options["scheme"]} if "scheme" in options else {}
    if fold_options and type(layer) is not nnx.Conv:
        raise UserError(f"scheme is for convolutions, got it for {type(layer)}.")
    fold = kind.fold_of(layer, **fold_options)
    max_rank = _allocated_rank(options, fold.full_rank)
    kernel = getattr(layer, kind.kernel_name)
    form, form_options = _form(options)
    key = (id(kernel), fold, max_rank, form.form, repr(form_options))
    if key not in shared:
        matrix = fold.to_matrix(kernel[...])
        if not isinstance(matrix, jax.core.Tracer) and not np.isfinite(matrix).all():
            raise UserError(
                "the kernel must be finite to be factored, got NaN or infinity. Train"
                " or load it anew, with a lower learning rate."
            )
        shared[key] = form.from_rule(matrix, max_rank, rngs=rngs, **form_options)
    return kind.from_dense(
        layer, max_rank=max_rank, factors=shared[key], **fold_options
    )


def _form(options: Mapping[str, Any]) -> tuple[type[Factors], dict[str, Any]]:
    """The form that a rule asks for, and what the rule chooses of it."""
    name = options.get("form", Factors.form)
    if name not in FORMS:
        raise UserError(f"form must be one of {sorted(FORMS)}, got {name!r}.")
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
        raise UserError(f"give max_rank or rank_fraction, not both, got {options}.")
    if "max_rank" in options:
        rank = options["max_rank"]
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise UserError(f"max_rank must be a whole number >= 0, got {rank!r}.")
        return min(rank, full_rank)
    if "rank_fraction" in options:
        fraction = options["rank_fraction"]
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise UserError(f"rank_fraction must be a number, got {fraction!r}.")
        return fraction_of(fraction, full_rank)
    return full_rank
