"""What a rank sampler is, and what several samplers are made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lowrank_jax import families
from lowrank_jax.active import rank_limits
from lowrank_jax.errors import UserError
from lowrank_jax.families import Family
from lowrank_jax.paths import find_factors
from lowrank_jax.ranks import Limits, Ranks, largest, name_of

SampledRanks: TypeAlias = dict[str, Int[Array, "..."]]


class Choice(NamedTuple):
    """Where a pass runs.

    Args:
      among: The numbers of the rungs that it is drawn from; a rung that comes twice is
        twice as likely. Empty: no rung bounds its ranks.
      drawn: The place of the rung in `among`.
      ranks: Of the pass, up to those of the rung. None: just these.
    """

    among: Sequence[int] = ()
    drawn: Int[Array, ""] | int = 0
    ranks: SampledRanks | None = None


ModelOrRanks: TypeAlias = nnx.Module | Ranks
"""A model, which stands for its active ranks, or the ranks themselves."""


class RankSampler(NamedTuple):
    """Ranks for each step.

    Args:
      init: Makes the state, a pytree of arrays, for a model or its ranks.
      sample: Draws the ranks of one step from the state, a key and the step, an int32
        array that counts from the start of the phase. Traced.
      keep: Carries the state over a cut, to the model or the ranks after it; called
        outside jit. None: the state is made anew by `init`.
      check: Refuses arguments that do not fit the model that training starts from,
        before step 0. None where there are none such.
      passes: Forward passes per step; more than one puts a leading axis on the ranks.
      full_first: Whether the first pass always runs at the full ranks.
      per_example: Whether the ranks carry a trailing batch axis.
      rungs: Lists the ranks, of all layers and plain, that passes may run at, for a
        model or its ranks. None for a sampler whose ranks are known in the step alone.
      choose: As `sample`, but returns a `Choice` for each pass; the numbers are places
        among the rungs. So a pass can run on factors that are cut, not masked.
      bind: Makes the sampler of a family that is known later, for one whose family is
        `SELECTED`; until then its sizes are fractions of every rank. Else None.
    """

    init: Callable[[ModelOrRanks], Any]
    sample: Callable[
        [Any, PRNGKeyArray, Int[Array, ""] | int], tuple[SampledRanks, Any]
    ]
    keep: Callable[[Any, ModelOrRanks], Any] | None = None
    check: Callable[[ModelOrRanks], None] | None = None
    passes: int = 1
    full_first: bool = False
    per_example: bool = False
    rungs: Callable[[ModelOrRanks], Sequence[Ranks]] | None = None
    choose: (
        Callable[[Any, PRNGKeyArray, Int[Array, ""] | int], tuple[list[Choice], Any]]
        | None
    ) = None
    bind: Callable[[Family], Any] | None = None


SELECTED = "selected"
"""In the place of a family: the one that an action has chosen."""


class LimitsState(NamedTuple):
    """The full ranks, for samplers that remember nothing else."""

    limits: dict[str, Int[Array, "*stack"]]


class TableState(NamedTuple):
    """Ranks of each layer at each of a list of levels."""

    tables: dict[str, Int[Array, "..."]]  # (level, *stack)


def carry(sampler: RankSampler, state: Any, model: ModelOrRanks) -> Any:
    """Returns a sampler's state for the model after a cut, kept where it can be."""
    return sampler.init(model) if sampler.keep is None else sampler.keep(state, model)


def limits_of(model: ModelOrRanks) -> dict[str, Limits]:
    """Reads what bounds the ranks: of a model, or given ranks as they are.

    Layers come in the order of their paths as text ("layers/10" before "layers/2"), in
    which JAX rebuilds a dictionary: samplers that number layers draw the same in jit.
    """
    if not isinstance(model, nnx.Module):  # before Mapping, which nnx.Dict is as well
        return {
            path: Limits(model[path], largest(model[path])) for path in sorted(model)
        }
    if sampled := [
        p for p, factors in find_factors(model).items() if factors.per_example
    ]:
        raise UserError(
            f"{', '.join(map(name_of, sampled))}: a sampler needs one rank a matrix to"
            " start from, got one per example. Set ranks with set_ranks first."
        )
    return dict(sorted(rank_limits(model).items()))


def init_limits(model: ModelOrRanks) -> LimitsState:
    """Makes the state that is the full ranks alone."""
    return LimitsState(
        {
            path: jnp.asarray(limits.active, jnp.int32)
            for path, limits in limits_of(model).items()
        }
    )


def levels_at(
    fractions: Sequence[float], model: ModelOrRanks, family: Family = ()
) -> list[Ranks]:
    """Lists the exact ranks at each fraction: no rounding happens in jit."""
    ranks = {path: limits.active for path, limits in limits_of(model).items()}
    return [families.member(family, ranks, fraction) for fraction in fractions]


def table_of(levels: Sequence[Ranks]) -> TableState:
    """Makes the table of the ranks at each level, of the same layers."""
    return TableState(
        {
            path: jnp.asarray([level[path] for level in levels], jnp.int32)
            for path in levels[0]
        }
    )


def table_at(fractions: Sequence[float], model: ModelOrRanks) -> TableState:
    """Makes the table of the ranks at each fraction."""
    return table_of(levels_at(fractions, model))


def ranks_of(choice: Choice, tables: Mapping[str, Int[Array, "..."]]) -> SampledRanks:
    """Returns the ranks that a choice stands for, from the table of the rungs."""
    if choice.ranks is not None:
        return choice.ranks
    rung = jnp.asarray(choice.among)[choice.drawn]
    return {path: table[rung] for path, table in tables.items()}


def any_of(among: Sequence[int], key: PRNGKeyArray) -> Choice:
    """Draws one of these rungs, all equally likely."""
    return Choice(among, jax.random.randint(key, (), 0, len(among)))


def of_rungs(
    rungs: Callable[[ModelOrRanks], Sequence[Ranks]],
    choose: Callable[[TableState, PRNGKeyArray], list[Choice]],
    *,
    passes: int = 1,
    full_first: bool = False,
) -> RankSampler:
    """Makes a sampler whose passes run at rungs, at least some of them.

    Args:
      rungs: As of `RankSampler`.
      choose: From the table of the rungs and a key to a choice for each pass.
      passes: As of `RankSampler`.
      full_first: As of `RankSampler`.
    """

    def choices(
        state: TableState, key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> tuple[list[Choice], TableState]:
        del step
        return choose(state, key), state

    def sample(
        state: TableState, key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> tuple[SampledRanks, TableState]:
        del step
        each = [ranks_of(choice, state.tables) for choice in choose(state, key)]
        if passes == 1:
            return each[0], state
        return jax.tree.map(lambda *ranks: jnp.stack(ranks), *each), state

    return RankSampler(
        lambda model: table_of(rungs(model)),
        sample,
        passes=passes,
        full_first=full_first,
        rungs=rungs,
        choose=choices,
    )


def of_fractions(
    fractions: Sequence[float],
    choose: Callable[[TableState, PRNGKeyArray], list[Choice]],
    *,
    family: Family | str,
    passes: int,
) -> RankSampler:
    """Makes a sampler whose rungs are sizes, the whole model first.

    Args:
      fractions: The sizes.
      choose: As of `of_rungs`.
      family: What the fractions stand for: see `families`, or `SELECTED`.
      passes: As of `RankSampler`.
    """

    def make(family: Family) -> RankSampler:
        sampler = of_rungs(
            lambda model: levels_at(fractions, model, family),
            choose,
            passes=passes,
            full_first=True,
        )
        if not family:
            return sampler
        return sampler._replace(
            check=lambda model: families.check(family, limits_of(model))
        )

    if isinstance(family, str):
        if family != SELECTED:
            raise UserError(
                f"family: must be {SELECTED!r}, or pairs of a fraction and ranks, got"
                f" {family!r}. Use () for one fraction of every rank."
            )
        return make(())._replace(bind=make)
    return make(families.of_pairs(family))


def is_cut(
    limits: Mapping[str, Int[Array, "*stack"]],
    before: Mapping[str, Int[Array, "*stack"]],
) -> bool:
    """Tells whether full ranks are of the same layers as before, and nowhere higher."""
    return limits.keys() == before.keys() and all(
        np.shape(limit) == np.shape(before[path]) and np.all(limit <= before[path])
        for path, limit in limits.items()
    )


def ranks_at(
    fraction: Float[Array, ""], limits: Mapping[str, Int[Array, "*stack"]]
) -> SampledRanks:
    """Takes one random fraction of all ranks, rounded up."""
    return {path: round_up(fraction, limit) for path, limit in limits.items()}


def round_up(
    fraction: Float[Array, "..."], limit: Int[Array, "..."]
) -> Int[Array, "..."]:
    """Returns ceil(fraction * limit), at least 1 where there is a rank."""
    rank = jnp.ceil(fraction * limit).astype(jnp.int32)
    return jnp.clip(rank, jnp.minimum(limit, 1), limit)


def layer_keys(key: PRNGKeyArray, paths: Mapping[str, Any]) -> dict[str, PRNGKeyArray]:
    """Makes a key of its own for each layer, by its place among the sorted paths."""
    return {path: jax.random.fold_in(key, n) for n, path in enumerate(sorted(paths))}
