"""Parts that the configs on text share: methods, and how long they train."""

from collections.abc import Mapping
from typing import Any

from configs import common, sizes
from lowrank_jax.errors import UserError

DENSE_SHARE = 0.5
"""Of the steps, before the layers are factorized."""
_SHRINKS = 8
"""How often Maestro cuts in its phase."""


def options(arg: str, **known: common.Known) -> dict[str, Any]:
    """Reads a config's argument with the methods' words; nested training without one.

    `energy` gives a size ranks that keep one share of energy in all layers, `uniform`
    one fraction of every rank, where the config does the other.

    Args:
      arg: What stands after the colon.
      **known: Further names that the config takes, with their defaults.

    Raises:
      UserError: As `common.options`, more than one method, or a number out of bounds.
    """
    options = sizes.options(
        arg,
        dense=common.Option(False, "dense all along, cut by SVD"),
        maestro=common.Option(False, "Maestro's lasso and shrinking"),
        energy=common.Option(False, "sizes whose ranks keep one share of energy"),
        uniform=common.Option(False, "sizes of one fraction of every rank"),
        lasso=common.Option(float, "with maestro: lambda of the group lasso"),
        **known,
    )
    if options["lasso"] is not None and not options["maestro"]:
        raise UserError(
            f"config argument: 'lasso' needs 'maestro' beside it, got {arg!r}. Add it."
        )
    return options


def phases(
    options: Mapping[str, Any],
    *,
    steps: int,
    optimizer: Mapping[str, Any],
    lasso: float,
    step: str = "one",
    by_energy: bool = False,
    warmup_share: float = 0.05,
) -> tuple[dict[str, Any], ...]:
    """Makes the phases of a method: dense training, and then the low-rank part.

    Transformers whose layers are factorized from the start learn late to attend, with
    Adam at the learning rates that dense ones need (docs/LOG.md); so all methods share
    a dense warm-up, after which every layer but the embedding is factorized by its SVD.

    Args:
      options: Of the config's argument.
      steps: How long all phases train together.
      optimizer: The recipe, which all methods share; its learning rate is halved where
        layers are low-rank, and its schedule is set here.
      lasso: Maestro's lambda where the argument gives none.
      step: Of nested training, a word of `sizes.STEPS`, where the argument gives none.
      by_energy: What a size is where the argument does not say it, see `options`.
      warmup_share: Of all steps, in which the learning rate rises.
    """
    warm_up = round(warmup_share * steps)
    whole = common.cosine(warmup_steps=warm_up, final_fraction=0.1)
    if options["dense"]:
        return (
            common.phase(
                name="train",
                until={"steps": steps},
                optimizer={**optimizer, "schedule": whole},
            ),
        )
    by_energy = options["energy"] or (by_energy and not options["uniform"])
    dense_steps = int(DENSE_SHARE * steps)
    constant = common.named("constant", warmup_steps=warm_up)
    first = common.phase(
        name="warm_up",
        until={"steps": dense_steps},
        optimizer={**optimizer, "schedule": constant},
        on_end=_factorized(options, by_energy),
    )
    rest = steps - dense_steps
    slower = {
        **optimizer,
        "learning_rate": optimizer["learning_rate"] / 2,
        "schedule": common.cosine(warmup_steps=rest // 20, final_fraction=0.05),
    }
    return first, common.phase(
        until={"steps": rest},
        optimizer=slower,
        **_low_rank(options, rest, lasso, step, by_energy),
    )


def _factorized(
    options: Mapping[str, Any], by_energy: bool
) -> tuple[dict[str, Any], ...]:
    """The actions that make layers low-rank, and say what a size is."""
    rules = rank_rules(sizes.rank(options))
    actions = (common.named("factorize", rules=rules),)
    if not (by_energy and sizes.is_nested(options)):
        return actions
    smaller = sizes.FRACTIONS[1:]
    return *actions, common.named("select_family", fractions=smaller)


def rank_rules(rank: Any) -> tuple[tuple[str, Any], ...]:
    """Gives every layer but the embedding this rule; logits are the embedding's."""
    return (("embedding", "dense"), (".*", rank))


def _low_rank(
    options: Mapping[str, Any], steps: int, lasso: float, step: str, by_energy: bool
) -> dict[str, Any]:
    """What a method's phase of so many steps has of its own."""
    if options["maestro"]:
        weight = lasso if options["lasso"] is None else options["lasso"]
        return {
            "name": "maestro",
            "sampler": common.named("single_layer"),
            "penalties": (common.named("hierarchical_group_lasso", weight=weight),),
            "shrink": {
                "every_epochs": 0,
                "every_steps": max(1, steps // _SHRINKS),
                "threshold": 1e-5,
                "multiple": 1,
                "least_share": 0.0,
            },
        }
    if options["alone"]:
        return {"name": "alone"}
    return {"name": "nested", **sizes.nested(options, step, by_energy=by_energy)}


def by_steps(config: Any, every: int) -> None:
    """Evaluates and saves by the step: an epoch of a text is long or means little."""
    config.eval_every_epochs = config.checkpoint_every_epochs = 0
    config.eval_every_steps = config.checkpoint_every_steps = every
    config.eval_fractions = sizes.FRACTIONS
