"""Parts that the configs on text share: methods, and how long they train."""

from collections.abc import Mapping
from typing import Any

from configs import common
from lowrank_jax.errors import UserError

FRACTIONS = (1.0, 0.5, 0.25, 0.125)
METHODS = ("dense", "maestro", "alone")
_SHRINKS = 8
"""How often Maestro cuts in a run."""


def options(arg: str, **known: float | bool) -> dict[str, Any]:
    """Reads a config's argument with the methods' words; nested training without one.

    Args:
      arg: What stands after the colon.
      **known: Further names that the config takes, with their defaults.

    Raises:
      UserError: As `common.options`, or more than one method.
    """
    options = common.options(
        arg, dense=False, maestro=False, lasso=0.0, alone=0.0, **known
    )
    chosen = [method for method in METHODS if options[method]]
    if len(chosen) > 1:
        raise UserError(
            f"config argument: must name at most one of {METHODS}, got {arg!r}. Remove"
            " the others."
        )
    if options["lasso"] and not options["maestro"]:
        raise UserError(
            f"config argument: 'lasso' needs 'maestro' beside it, got {arg!r}. Add it."
        )
    return options


def rank_rules(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Makes every layer but the embedding low-rank, unless the method is dense."""
    rule = "dense" if options["dense"] else "full"
    if options["alone"]:
        rule = {"rank_fraction": options["alone"]}
    return (("embedding", "dense"), (".*", rule))


def phase(
    options: Mapping[str, Any],
    *,
    steps: int,
    optimizer: Mapping[str, Any],
    lasso: float,
) -> dict[str, Any]:
    """Makes the one phase of a method.

    Args:
      options: Of the config's argument.
      steps: How long it trains.
      optimizer: The recipe, which all methods share.
      lasso: Maestro's lambda where the argument gives none.
    """
    if options["maestro"]:
        return common.phase(
            name="maestro",
            until={"steps": steps},
            sampler=common.named("single_layer"),
            penalties=(
                common.named(
                    "hierarchical_group_lasso", weight=options["lasso"] or lasso
                ),
            ),
            optimizer=optimizer,
            shrink={
                "every_epochs": 0,
                "every_steps": max(1, steps // _SHRINKS),
                "threshold": 1e-5,
                "multiple": 1,
            },
        )
    if options["dense"] or options["alone"]:
        return common.phase(name="train", until={"steps": steps}, optimizer=optimizer)
    return common.phase(
        name="nested",
        until={"steps": steps},
        sampler=common.named("matryoshka", fractions=FRACTIONS),
        teacher=common.named("full", target_weight=0.0),
        optimizer=optimizer,
    )


def by_steps(config: Any, every: int) -> None:
    """Evaluates and saves by the step: an epoch of a text is long or means little."""
    config.eval_every_epochs = config.checkpoint_every_epochs = 0
    config.eval_every_steps = config.checkpoint_every_steps = every
    config.eval_fractions = FRACTIONS
