"""How one step trains several sizes of a model: parts that nested configs share.

The first pass is always the whole model on the whole batch; the others learn from its
outputs. What each costs and reaches stands in docs/results.md.
"""

from collections.abc import Mapping
from typing import Any

from configs import common
from lowrank_jax.errors import UserError
from lowrank_jax.samplers import SAMPLERS

FRACTIONS = (1.0, 0.5, 0.25, 0.125)

_ALL = common.named("matryoshka", fractions=FRACTIONS)
_OFTEN_SMALL = (0.5, 0.25, 0.125, 0.125, 0.125)
"""Of which one is drawn: the smallest most often, as it is the farthest from a model
trained for its size alone."""
_FINE = ((0.75, 0.625, 0.5, 0.4375, 0.375), (0.3125, 0.25, 0.1875), (0.125,))

STEPS: dict[str, dict[str, Any]] = {
    "masked": {"sampler": _ALL},
    "all": {"sampler": _ALL, "sizes": "static"},
    "parts": {"sampler": _ALL, "sizes": "static", "pass_parts": 4},
    "one": {
        "sampler": common.named("strata", fractions=(_OFTEN_SMALL,)),
        "sizes": "static",
    },
    "halves": {
        "sampler": common.named("strata", fractions=((0.5, 0.25), (0.125,))),
        "sizes": "static",
        "pass_parts": 2,
    },
    "any": {
        "sampler": common.named("strata", fractions=_FINE, between="layers"),
        "sizes": "static",
        "pass_parts": 4,
    },
}
"""By word, the keys of a phase that a step is made of."""

WORDS = {
    "masked": "four sizes under masks, at the price of four whole passes",
    "all": "the same four sizes, by cut factors",
    "parts": "each smaller size on its own quarter of the batch",
    "one": "one of the smaller sizes, on the whole batch",
    "halves": "a half or a quarter, and an eighth, each on half of the batch",
    "any": "any ranks: a large, a middle, and the smallest size",
}
"""What the words mean."""


def options(arg: str, **known: common.Known) -> dict[str, Any]:
    """Reads a config's argument with the words of the steps; `alone=0.5` trains at this
    fraction of the ranks alone, `dense` and `maestro`, where a config takes them, as
    they say; `smallest=3` weighs the smallest size three times in the loss.

    Raises:
      UserError: As `common.options`, more than one method, or a fraction out of bounds.
    """
    words = {word: common.Option(False, WORDS[word]) for word in STEPS}
    alone = common.Option(float, "train at this fraction of the ranks alone")
    smallest = common.Option(float, "weight of the smallest size in the loss")
    options = common.options(arg, **words, alone=alone, smallest=smallest, **known)
    methods = ("dense", "maestro", "alone", *STEPS)
    chosen = [word for word in methods if options.get(word) not in (None, False)]
    if len(chosen) > 1:
        raise UserError(
            f"config argument: must name at most one of {methods}, got {arg!r}. Remove"
            " the others."
        )
    alone = options["alone"]
    if alone is not None and not 0 < alone <= 1:
        raise UserError(
            f"config argument: alone must be in (0, 1], got {arg!r}. It is the fraction"
            " of the ranks to train at."
        )
    return options


def is_nested(options: Mapping[str, Any]) -> bool:
    """Returns whether several sizes are trained."""
    others = ("dense", "maestro")
    return options["alone"] is None and not any(map(options.get, others))


def nested(
    options: Mapping[str, Any], default: str, *, by_energy: bool = False
) -> dict[str, Any]:
    """Returns the keys of a phase that trains several sizes; none where one is trained
    alone.

    Args:
      options: Of the config's argument; it may name the step.
      default: The step where it does not.
      by_energy: Whether the sizes are a family that an earlier phase has selected.
    """
    if not is_nested(options):
        return {}
    (*_, word) = [default, *(word for word in STEPS if options[word])]
    taught = common.named("full", target_weight=0.0)
    step = {"teacher": taught, **STEPS[word]}
    if by_energy:
        sampler = step["sampler"]
        args = {**sampler["args"], "family": "selected"}
        step["sampler"] = common.named(sampler["name"], **args)
    if options["smallest"] is not None:
        sampler = step["sampler"]
        passes = SAMPLERS[sampler["name"]](**sampler["args"]).passes
        step["pass_weights"] = (*[1.0] * (passes - 1), options["smallest"])
    return step


def rank(options: Mapping[str, Any]) -> Any:
    """Returns the rank rule of all layers that shall be low-rank."""
    if options.get("dense"):
        return "dense"
    return "full" if options["alone"] is None else {"rank_fraction": options["alone"]}
