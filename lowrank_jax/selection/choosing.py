"""Runs selectors, and checks what they return: no selector raises a rank."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from lowrank_jax import errors
from lowrank_jax.active import check_ranks, get_ranks
from lowrank_jax.counting import ModelCost, count
from lowrank_jax.errors import UserError
from lowrank_jax.families import Family, check_nested
from lowrank_jax.paths import find_aliases, find_factors
from lowrank_jax.ranks import Limits, Ranks, check_lower, largest, lowest
from lowrank_jax.selection import curves
from lowrank_jax.selection.context import Context, Score
from lowrank_jax.selection.selectors import CHAINS, SELECTORS
from lowrank_jax.selection.tails import Errors
from lowrank_jax.times import ModelTimes


def context_of(
    model: nnx.Module,
    cost: ModelCost,
    *,
    score: Score | None = None,
    family: Family = (),
    times: Callable[[], ModelTimes] | None = None,
    activations: Callable[[], Errors] | None = None,
) -> Context:
    """Makes the context of a model whose arrays are there."""
    return Context(
        get_ranks(model),
        cost,
        lambda: curves.column_importances(find_factors(model)),
        lambda: curves.singular_values(find_factors(model)),
        score,
        find_aliases(model),
        family,
        times,
        activations,
    )


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
    return _checked(function(context, **_plain_args(function, context, args)), context)


def choose_family(
    function: Callable[..., Ranks],
    context: Context,
    args: Mapping[str, Any],
    fractions: Sequence[float],
) -> list[dict[str, Any]]:
    """Returns the ranks that a selector chooses for several budgets, nested.

    Args:
      function: A selector with an argument `fraction`. One of `CHAINS` finds the best
        chain; any other chooses for each budget by itself.
      context: What it may look at.
      args: Its other arguments.
      fractions: The budgets; the ranks come in their order.

    Raises:
      UserError: As `choose`; no budget, or one that comes twice; ranks that are not
        nested.
    """
    if not fractions or len(set(fractions)) < len(fractions):
        raise UserError(
            f"family: must have budgets, none twice, got {list(fractions)}. Name each"
            " once."
        )
    given = [{**args, "fraction": fraction} for fraction in fractions]
    plain = [_plain_args(function, context, one) for one in given]
    if function in CHAINS:
        several = {key: value for key, value in plain[0].items() if key != "fraction"}
        fractions = [one["fraction"] for one in plain]
        found = CHAINS[function](context, fractions=fractions, **several)
    else:
        found = [function(context, **one) for one in plain]
    profiles = [_checked(ranks, context) for ranks in found]
    order = sorted(range(len(fractions)), key=lambda number: fractions[number])
    check_nested([profiles[number] for number in order])
    return profiles


def ranks_for(
    model: nnx.Module,
    *example: Any,
    score: Score | None = None,
    times: Callable[[], ModelTimes] | None = None,
    activations: Callable[[], Errors] | None = None,
    **choice: Any,
) -> dict[str, Any]:
    """Returns the ranks to cut a model at, by one of the `SELECTORS`.

    Args:
      model: A low-rank model.
      *example: Its inputs for a batch of one (arrays or `jax.ShapeDtypeStruct`), to
        count MACs on; other selectors need none.
      score: Scores rank vectors, for "beam" and what else searches.
      times: Measures how long the model takes, for budgets of "latency": see
        `lowrank_jax.latency`.
      activations: Measures what ranks lose of layers' outputs, for the curve of this
        name: see `selection.activations`.
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
    context = context_of(model, cost, score=score, times=times, activations=activations)
    with errors.at(name):
        return check_ranks(model, choose(SELECTORS[name].function, context, args))


def _checked(found: Any, context: Context) -> dict[str, Any]:
    """What a selector has found as legal ranks, one for every layer."""
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
