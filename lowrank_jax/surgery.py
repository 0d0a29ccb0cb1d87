"""Surgery on low-rank models: cut them, bring them to canonical form, merge them.

Works on any Flax NNX model, without touching its code. Each function returns a new
model and leaves the one it is given alone.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import nnx

from lowrank_jax import placement
from lowrank_jax.active import check_ranks
from lowrank_jax.errors import UserError, at, raise_all
from lowrank_jax.factors import Factors
from lowrank_jax.forms import FORMS
from lowrank_jax.layers import LowRankLayer
from lowrank_jax.paths import Model, find_aliases, find_factors, replace
from lowrank_jax.ranks import Ranks, name_of, unknown_paths
from lowrank_jax.times import MERGED


def merge(model: Model, paths: Collection[str] | None = None) -> Model:
    """Returns a copy with low-rank layers dense again, at their active rank.

    Kernels are split over a mesh as the factors are: input axes as `u`, output as `v`.

    Args:
      model: A low-rank model.
      paths: Which factors, as in `find_factors`; None for all.

    Raises:
      UserError: A path that is unknown.
    """
    factors = find_factors(model)
    if unknown := [path for path in paths or () if path not in factors]:
        raise UserError(unknown_paths(unknown, list(factors)))
    model = nnx.clone(model)
    chosen = {
        id(factors)
        for path, factors in find_factors(model).items()
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

    return replace(model, dense)


def truncate(model: Model, ranks: Ranks, *, form: str = Factors.form) -> Model:
    """Returns a copy of the model cut to these ranks: smaller arrays, all active.

    They stay where they are, split over the same axes of a mesh where these divide.

    Args:
      model: A low-rank model.
      ranks: Rank of each layer by path; layers that are not named keep theirs. A stack
        of layers with different ranks is allocated at the largest, masked below it, and
        zero there; so is a layer whose active rank is traced, and below this one.
      form: What the layers are turned into after the cut, a key of `forms.FORMS`. In
        another form than the factored one all of them are cut to their active ranks,
        and none can be cut again; a traced rank has none.

    Raises:
      UserError: An unknown path or form, a rank outside [0, active], a layer that has
        no such form; all at once.
    """
    if form not in FORMS:
        raise UserError(
            f"form: must be one of {sorted(FORMS)}, got {form!r}. Choose one."
        )
    ranks = check_ranks(model, ranks)
    model = nnx.clone(model)
    for path, factors in find_factors(model).items():
        if path in ranks:
            factors.cut(ranks[path])
        elif form != Factors.form:
            factors.cut(factors.limits().active)
    return _turned(model, dict.fromkeys(find_factors(model), form))


def take_forms(model: Model, forms: Mapping[str, str]) -> Model:
    """Returns a copy of the model with layers in forms of their own.

    Args:
      model: A low-rank model, cut.
      forms: Form of each layer by path: a key of `forms.FORMS`, or `times.MERGED`;
        layers that are not named keep theirs.

    Raises:
      UserError: An unknown path or form, a layer that has no such form.
    """
    aliases, known = find_aliases(model), list(find_factors(model))
    forms = {aliases.get(path, path): form for path, form in forms.items()}
    if unknown := [path for path in forms if path not in known]:
        raise UserError(unknown_paths(unknown, known))
    for form in forms.values():
        if form not in (*FORMS, MERGED):
            raise UserError(
                f"form: must be one of {sorted((*FORMS, MERGED))}, got {form!r}. Choose"
                " one."
            )
    merged = [path for path, form in forms.items() if form == MERGED]
    kept = {path: form for path, form in forms.items() if form != MERGED}
    model = _turned(nnx.clone(model), kept)
    return merge(model, merged) if merged else model


def _turned(model: Model, forms: Mapping[str, str]) -> Model:
    """Replaces the factors of a model by those of other forms."""
    turned: dict[int, Factors] = {}
    problems = []
    for path, factors in find_factors(model).items():
        try:
            if path in forms:
                turned[id(factors)] = FORMS[forms[path]].from_factors(factors)
        except UserError as error:
            problems.append(f"{name_of(path)}: {error}")
    raise_all(problems)
    return replace(model, lambda node: turned.get(id(node)))


def canonicalize(model: Model) -> Model:
    """Returns a copy whose factors are the SVD of their product at the active rank.

    The singular values are in `s` where there is one, else shared equally; the square
    factors of a deeper product are multiplied back. The function stays, the columns
    come in order of their singular values, and every prefix is the best approximation
    of its rank (Eckart-Young). Not for models trained with ordered dropout: their own
    order is better for the loss. Arrays stay split over a mesh as they are.
    """
    model = nnx.clone(model)
    for path, factors in find_factors(model).items():
        product = [x for x in factors.arrays() if x is not None]
        if not any(isinstance(x, jax.core.Tracer) for x in product) and not all(
            placement.all_finite(x) for x in product
        ):
            raise UserError(
                f"{name_of(path)}: factors must be finite to have an SVD, got NaN or"
                " infinity. Train or load them anew, with a lower learning rate."
            )
        with at(name_of(path)):
            factors.canonicalize()
    return model
