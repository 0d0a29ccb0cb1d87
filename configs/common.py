"""Parts that several configs share. A config sets every key; nothing is hidden in
train/."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict


def options(arg: str, **known: float | bool) -> dict[str, Any]:
    """What stands after the colon of `--config=FILE:ARG`.

    Args:
      arg: Words and `name=number`, separated by commas, such as "smoke,lasso=1e-4".
      **known: The names a config takes, with their defaults; a word sets a bool.

    Raises:
      ValueError: A word or name that the config does not take.

    >>> options("smoke,lasso=1e-4", lasso=0.0)
    {'smoke': True, 'lasso': 0.0001}
    """
    values: dict[str, Any] = {"smoke": False, **known}
    for part in filter(None, arg.split(",")):
        name, equals, text = part.partition("=")
        is_word = isinstance(values.get(name), bool)
        if name not in values or is_word == bool(equals):
            words = [
                n if isinstance(v, bool) else f"{n}=NUMBER" for n, v in values.items()
            ]
            raise ValueError(
                f"config argument: must be of {words}, got {part!r}. Separate several"
                " with commas."
            )
        values[name] = True if is_word else float(text)
    return values


def base(*, seed: int) -> ConfigDict:
    """Everything but data, model and phases."""
    config = ConfigDict()
    config.seed = seed
    config.data = ConfigDict()
    config.model = ConfigDict()
    config.rank_rules = ((".*", "full"),)
    config.init_from = ""
    config.phases = ()
    config.log_every_steps = 50
    config.eval_every_epochs = 1
    config.eval_fractions = (1.0, 0.5, 0.25, 0.125)
    config.checkpoint_every_epochs = 1
    config.keep_checkpoints = 2
    return config


def digits(*, batch_size: int) -> ConfigDict:
    """scikit-learn's digits: 8x8, pixels 0 to 16; 1,437 to train on, 360 to test on."""
    return _data("digits", batch_size, 137, mean=(4.88,), std=(6.02,), augment=())


def mnist(*, batch_size: int, augment: Sequence[Any] = ()) -> ConfigDict:
    """MNIST, 5,000 of the 60,000 training images held out for validation."""
    return _data("mnist", batch_size, 5000, mean=(33.3,), std=(78.6,), augment=augment)


def phase(
    *,
    name: str,
    until: Mapping[str, int],
    sampler: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    teacher: Mapping[str, Any] | None = None,
    passes_loss: str = "mean",
    penalties: Sequence[Mapping[str, Any]] = (),
    shrink: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One phase with every key."""
    return {
        "name": name,
        "until": dict(until),
        "sampler": dict(sampler),
        "teacher": dict(teacher or {"name": "none", "args": {}}),
        "passes_loss": passes_loss,
        "penalties": tuple(penalties),
        "optimizer": dict(optimizer),
        "shrink": dict(shrink or {}),
    }


def optimizer(
    name: str,
    *,
    learning_rate: float,
    args: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> dict[str, Any]:
    """An optimizer with every key; kernels and factors decay, biases and norms do
    not."""
    constant = {"name": "constant", "args": {"warmup_steps": 0}}
    return {
        "name": name,
        "args": dict(args or {}),
        "learning_rate": learning_rate,
        "schedule": dict(schedule or constant),
        "weight_decay": weight_decay,
        "decayed": r".*/(kernel|embedding|u|v)",
        "clip_norm": clip_norm,
    }


def cosine(*, warmup_steps: int, final_fraction: float = 0.0) -> dict[str, Any]:
    """Warm-up, then half a cosine down."""
    args = {"warmup_steps": warmup_steps, "final_fraction": final_fraction}
    return {"name": "cosine", "args": args}


def _data(
    name: str,
    batch_size: int,
    validation_examples: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    augment: Sequence[Any],
) -> ConfigDict:
    data = ConfigDict()
    data.name = name
    data.args = ConfigDict()
    data.data_dir = ""
    data.batch_size = batch_size
    data.eval_batch_size = 500
    data.validation_examples = validation_examples
    data.mean = tuple(mean)
    data.std = tuple(std)
    data.augment = tuple(augment)
    return data
