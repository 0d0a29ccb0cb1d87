"""Rank selectors: the ways to say how much of each layer stays.

A selector is a function `name(context, *, ...) -> Ranks` with plain keyword arguments;
those that everybody can name are rows of `SELECTORS`. `choose` runs one and checks what
it returns: no selector raises a rank. `ranks_for` does it for a model in one call.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, get_origin

import numpy as np
from flax import nnx
from jaxtyping import Float

from lowrank_jax import errors, families
from lowrank_jax.active import check_ranks, get_ranks
from lowrank_jax.counting import ModelCost, count
from lowrank_jax.errors import UserError
from lowrank_jax.families import Family
from lowrank_jax.paths import find_aliases, find_factors
from lowrank_jax.ranks import (
    Limits,
    Ranks,
    at_most,
    check_lower,
    largest,
    lowest,
)
from lowrank_jax.selection import curves, search, solvers

Score: TypeAlias = Callable[[Sequence[Ranks]], list[float]]
"""Scores of rank vectors on held-out data, higher is better."""


class Context(NamedTuple):
    """What a selector may look at.

    Args:
      ranks: Active rank of each layer: none is raised.
      cost: What the model costs.
      importances: Reads the weights: importance of each column by path.
      score: Scores rank vectors; None where there is nothing to score on.
      aliases: Further paths of shared factors, as of `find_aliases`.
      family: Ranks of sizes that the model was trained at, see `lowrank_jax.families`.
    """

    ranks: Ranks
    cost: ModelCost
    importances: Callable[[], Mapping[str, Float[np.ndarray, "*stack r"]]]
    score: Score | None = None
    aliases: Mapping[str, str] = {}
    family: Family = ()


def context_of(
    model: nnx.Module,
    cost: ModelCost,
    *,
    score: Score | None = None,
    family: Family = (),
) -> Context:
    """Makes the context of a model whose arrays are there."""
    return Context(
        get_ranks(model),
        cost,
        lambda: curves.column_importances(find_factors(model)),
        score,
        find_aliases(model),
        family,
    )


def rank(context: Context, *, value: int) -> Ranks:
    """Caps every layer at this rank."""
    return at_most(context.ranks, value)


def rank_fraction(context: Context, *, value: float) -> Ranks:
    """Keeps this fraction of each layer's rank, or this size of a trained family."""
    return families.member(context.family, context.ranks, value)


def ranks(context: Context, *, value: Ranks) -> Ranks:
    """Sets these ranks by path; layers that are not named keep theirs."""
    del context
    return value


def energy(context: Context, *, value: float) -> Ranks:
    """Keeps the least prefix of each layer with this share of squared importances."""
    return solvers.by_energy(context.importances(), value)


def energy_fraction(context: Context, *, value: float) -> Ranks:
    """Keeps one share of energy in all layers, at this fraction of all ranks' MACs."""
    return solvers.by_energy_at_fraction(
        context.cost.layers, context.ranks, context.importances(), value
    )


def params_fraction(context: Context, *, value: float) -> Ranks:
    """Keeps one fraction of all ranks, within this share of the dense parameters.

    The share is of the factored layers' parameters in their dense form.
    """
    return solvers.by_params_fraction(context.cost.layers, context.ranks, value)


def macs_fraction(context: Context, *, value: float) -> Ranks:
    """Keeps one fraction of all ranks, within this share of the dense MACs.

    The share is of the factored layers' MACs in their dense form.
    """
    return solvers.by_macs_fraction(context.cost.layers, context.ranks, value)


def energy_budget(context: Context, *, measure: str, fraction: float) -> Ranks:
    """Keeps one share of energy in all layers, within a share of "params" or "macs".

    The share is of the factored layers' cost in their dense form.
    """
    return solvers.by_energy_budget(
        context.cost.layers,
        context.ranks,
        context.importances(),
        fraction,
        measure=measure,
    )


def beam(
    context: Context, *, measure: str, fraction: float, width: int, steps: int
) -> Ranks:
    """Searches all ranks jointly by their score, within the same kind of budget.

    Beam search (BSR), see `search.beam_search`.
    """
    if context.score is None:
        raise UserError(
            "score: must be there, from held-out training data, got none. Give a"
            " function as score, or hold out training examples."
        )
    return search.beam_search(
        context.score,
        context.cost.layers,
        context.ranks,
        fraction,
        measure=measure,
        width=width,
        steps=steps,
    )


class Selector(NamedTuple):
    """A row of `SELECTORS`, with what a command line needs.

    Args:
      function: The selector.
      help: The first line of its docstring.
      value_type: `int`, `float` or `Mapping` (ranks by path) if it takes a single
        `value`; None if it takes several arguments by name.
    """

    function: Callable[..., Ranks]
    help: str
    value_type: type | None


def _row(function: Callable[..., Ranks]) -> Selector:
    parameters = dict(list(inspect.signature(function).parameters.items())[1:])
    kind = parameters["value"].annotation if [*parameters] == ["value"] else None
    return Selector(
        function, inspect.getdoc(function).splitlines()[0], get_origin(kind) or kind
    )


SELECTORS: dict[str, Selector] = {
    function.__name__: _row(function)
    for function in (
        rank,
        rank_fraction,
        ranks,
        energy,
        energy_fraction,
        params_fraction,
        macs_fraction,
        energy_budget,
        beam,
    )
}
"""The selectors by name; a new one is one more function here."""


def choose(
    function: Callable[..., Ranks], context: Context, args: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the ranks that a selector chooses, one for every layer.

    Messages do not name the selector: the caller does, as the user has named it.

    Args:
      function: A selector: of a row of `SELECTORS`, or one's own.
      context: What it may look at.
      args: Its arguments; scalars of NumPy are plain numbers to it.

    Raises:
      UserError: Arguments that it does not take, or ranks that are not legal: unknown
        paths, other shapes than the stack's, a rank above the active one.
    """
    found = function(context, **_plain_args(function, context, args))
    if not isinstance(found, Mapping):
        raise UserError(
            "a selector must return a mapping of paths to ranks, got"
            f" {found!r}. Return one."
        )
    found = {context.aliases.get(path, path): rank for path, rank in found.items()}
    limits = {
        path: Limits(active, largest(active)) for path, active in context.ranks.items()
    }
    check_lower(found, limits)
    return {
        path: lowest(active, found.get(path, active))
        for path, active in context.ranks.items()
    }


def ranks_for(
    model: nnx.Module, *example: Any, score: Score | None = None, **choice: Any
) -> dict[str, Any]:
    """Returns the ranks to cut a model at, by one of the `SELECTORS`.

    Args:
      model: A low-rank model.
      *example: Its inputs for a batch of one (arrays or `jax.ShapeDtypeStruct`), to
        count MACs on; other selectors need none.
      score: Scores rank vectors, for "beam".
      **choice: One selector by name, and its value: `rank=8`, `rank_fraction=0.5`,
        `energy=0.9`, `params_fraction=0.25`, `macs_fraction=0.25`; or its arguments as
        a mapping, `energy_budget={"measure": "params", "fraction": 0.25}`.

    Raises:
      UserError: Not exactly one selector, arguments out of bounds, a budget of MACs
        without an example, or a model without low-rank layers.

    >>> from lowrank_jax import factorize
    >>> model = factorize(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    >>> ranks_for(model, rank=3), ranks_for(model, params_fraction=0.5)
    ({'': 3}, {'': 2})
    """
    if len(choice) != 1 or not choice.keys() <= SELECTORS.keys():
        raise UserError(
            f"ranks_for: must be given exactly one of {', '.join(SELECTORS)}, got"
            f" {sorted(choice)}. Keep one of them."
        )
    ((name, value),) = choice.items()
    if not find_factors(model):
        raise UserError(
            "model: must have low-rank layers to choose ranks for, got none. Make them"
            " with factorize."
        )
    args = value if SELECTORS[name].value_type is None else {"value": value}
    # A model that is not run is counted all the same: its parameters, and no MACs.
    cost = count(model, *example, **({} if example else {"forward": lambda model: ()}))
    context = context_of(model, cost, score=score)
    with errors.at(name):
        return check_ranks(model, choose(SELECTORS[name].function, context, args))


def _plain_args(
    function: Callable[..., Ranks], context: Context, args: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns arguments with NumPy's scalars as plain numbers, checked to fit the
    signature by name and by type."""
    signature = inspect.signature(function)
    names = [*signature.parameters][1:]
    try:
        signature.bind(context, **args)
    except TypeError as error:
        raise UserError(
            f"must be given the arguments {names}, got {args!r} ({error})."
            " Correct them."
        ) from error
    plain = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in args.items()
    }
    for name, value in plain.items():
        kind = getattr(signature.parameters.get(name), "annotation", None)
        types, words = _PLAIN.get(kind, (object, ""))
        if not isinstance(value, types) or (words and isinstance(value, bool)):
            place = f"{name}: " if names != ["value"] else ""
            raise UserError(f"{place}must be {words}, got {value!r}. Give one.")
    return plain


_PLAIN: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a string"),
    Ranks: (Mapping, "a mapping of paths to ranks"),
}
"""What an argument may be, by its annotation, and how messages call it."""
