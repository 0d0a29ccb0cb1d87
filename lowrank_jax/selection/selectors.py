"""Rank selectors: the ways to say how much of each layer stays.

A selector is a function `name(context, *, ...) -> Ranks` with plain keyword arguments;
those that everybody can name are rows of `SELECTORS`. `choosing` runs them.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_origin

from lowrank_jax import families, linalg
from lowrank_jax.ranks import Ranks, at_most, lowest
from lowrank_jax.selection import budgets, search, solvers, spectral
from lowrank_jax.selection.context import Context


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
    return spectral.by_energy(context.importances(), value)


def entropy(context: Context, *, value: float) -> Ranks:
    """Keeps the least prefix of each layer with this share of its entropy (ARSVD)."""
    return spectral.by_entropy(context.importances(), value)


def threshold(context: Context, *, value: float) -> Ranks:
    """Cuts the columns behind the last with this share of its layer's largest."""
    return spectral.by_threshold(context.importances(), value)


def stable_rank(context: Context, *, value: float) -> Ranks:
    """Keeps this multiple of each layer's stable rank."""
    spectra = context.spectra()
    measured = {path: linalg.stable_rank(one) for path, one in spectra.items()}
    return spectral.by_scale(measured, value, context.ranks)


def effective_rank(context: Context, *, value: float) -> Ranks:
    """Keeps this multiple of each layer's effective rank, exp of the entropy."""
    spectra = context.spectra()
    measured = {path: linalg.effective_rank(one) for path, one in spectra.items()}
    return spectral.by_scale(measured, value, context.ranks)


def evbmf(context: Context) -> Ranks:
    """Keeps as many columns as singular values stand out of the noise (EVBMF).

    For layers at their full rank: of lower ones little or nothing is cut.
    """
    sizes = {
        path: (cost.in_size, cost.out_size)
        for path, cost in context.cost.layers.items()
        if path in context.ranks
    }
    found = spectral.by_noise(context.spectra(), sizes)
    return {path: lowest(rank, context.ranks[path]) for path, rank in found.items()}


def energy_fraction(context: Context, *, value: float) -> Ranks:
    """Keeps one share of energy in all layers, at this fraction of all ranks' MACs."""
    return solvers.by_energy_at_fraction(
        context.cost.layers, context.ranks, context.errors("energy"), value
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


def energy_budget(
    context: Context, *, measure: str, fraction: float, multiple_of: int = 1
) -> Ranks:
    """Keeps one share of energy in all layers, within a share of a cost.

    Of "params" or "macs" the share is of the factored layers in their dense form, of
    "latency" of the whole dense model's time. So it is below.
    """
    return _within(solvers.by_level, context, measure, fraction, "energy", multiple_of)


def minimax(
    context: Context, *, measure: str, fraction: float, multiple_of: int = 1
) -> Ranks:
    """Keeps s / s_1 above one threshold in all layers, within the budget (ALDS)."""
    return _within(
        solvers.by_level, context, measure, fraction, "operator_norm", multiple_of
    )


def welore(
    context: Context, *, measure: str, fraction: float, multiple_of: int = 1
) -> Ranks:
    """Keeps min-max normalised s above one threshold, within the budget (WeLore)."""
    return _within(solvers.by_level, context, measure, fraction, "min_max", multiple_of)


def lc(
    context: Context,
    *,
    measure: str,
    fraction: float,
    curve: str = "squares",
    multiple_of: int = 1,
) -> Ranks:
    """Weighs error against one price of cost for all, within the budget (LC).

    The error is a key of `tails.TAILS`; "loss", what the score loses when one layer
    alone is cut; or "activations", the share of its outputs' energy that goes with a
    cut of it (`activations.output_losses`). So it is below.
    """
    return _within(solvers.by_price, context, measure, fraction, curve, multiple_of)


def knapsack(
    context: Context,
    *,
    measure: str,
    fraction: float,
    curve: str = "energy",
    multiple_of: int = 1,
) -> Ranks:
    """Finds the least sum of errors within the budget (L-GreCo)."""
    return _within(solvers.by_knapsack, context, measure, fraction, curve, multiple_of)


def nested_knapsack(
    context: Context,
    *,
    measure: str,
    fractions: Sequence[float],
    curve: str = "energy",
    multiple_of: int = 1,
) -> list[Ranks]:
    """Finds nested ranks, for each of several budgets, with the least errors in all."""
    found = solvers.by_chain(
        context.costs(measure),
        context.ranks,
        context.errors(curve),
        [context.share(measure, fraction) for fraction in fractions],
        measure=measure,
        multiple_of=multiple_of,
    )
    return [context.raised(measure, ranks, multiple_of) for ranks in found]


def family(context: Context, *, measure: str, fraction: float) -> Ranks:
    """Keeps the largest size of the trained family, or between two, in the budget."""
    costs, share = context.costs(measure), context.share(measure, fraction)
    found = families.within(
        context.family,
        context.ranks,
        lambda ranks: budgets.total_cost(costs, ranks, measure),
        budgets.check_budget(costs, context.ranks, share, measure),
    )
    return context.raised(measure, found)


def greedy(context: Context, *, measure: str, fraction: float, steps: int) -> Ranks:
    """Lowers the layer whose cut costs the least score, step by step (Maestro)."""
    return beam(context, measure=measure, fraction=fraction, width=1, steps=steps)


def beam(
    context: Context, *, measure: str, fraction: float, width: int, steps: int
) -> Ranks:
    """Searches all ranks jointly by their score, within the same kind of budget.

    Beam search (BSR), see `search.beam_search`.
    """
    found = search.beam_search(
        context.scorer(),
        context.costs(measure),
        context.ranks,
        context.share(measure, fraction),
        measure=measure,
        width=width,
        steps=steps,
    )
    return context.raised(measure, found)


def swaps(
    context: Context, *, measure: str, fraction: float, rounds: int = 20
) -> Ranks:
    """Improves the best of the other rules by swaps of rank, by score.

    Local search, see `search.local_search`. It begins with one fraction of all ranks,
    the trained family, `energy_budget`, `minimax`, `knapsack` of losses, and `greedy`.
    """
    budget: dict[str, Any] = {"measure": measure, "fraction": fraction}
    starts = [
        family(context._replace(family=()), **budget),
        family(context, **budget),
        energy_budget(context, **budget),
        minimax(context, **budget),
        knapsack(context, **budget, curve="loss"),
        greedy(context, **budget, steps=20),
    ]
    found = search.local_search(
        context.scorer(),
        context.costs(measure),
        context.ranks,
        starts,
        context.share(measure, fraction),
        measure=measure,
        rounds=rounds,
    )
    return context.raised(measure, found)


def _within(
    solver: Callable[..., Ranks],
    context: Context,
    measure: str,
    fraction: float,
    curve: str,
    multiple_of: int,
) -> Ranks:
    """Runs one of the solvers for a budget."""
    found = solver(
        context.costs(measure),
        context.ranks,
        context.errors(curve),
        context.share(measure, fraction),
        measure=measure,
        multiple_of=multiple_of,
    )
    return context.raised(measure, found, multiple_of)


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
    (about, *_) = (inspect.getdoc(function) or "").splitlines()
    return Selector(function, about, get_origin(kind) or kind)


SELECTORS: dict[str, Selector] = {
    function.__name__: _row(function)
    for function in (
        rank,
        rank_fraction,
        ranks,
        energy,
        energy_fraction,
        entropy,
        threshold,
        stable_rank,
        effective_rank,
        evbmf,
        params_fraction,
        macs_fraction,
        energy_budget,
        minimax,
        welore,
        lc,
        knapsack,
        family,
        greedy,
        beam,
        swaps,
    )
}
"""The selectors by name; a new one is one more function here."""

CHAINS: dict[Callable[..., Ranks], Callable[..., list[Ranks]]] = {
    knapsack: nested_knapsack
}
"""What chooses for several budgets at once, better than the selector for each by
itself."""
