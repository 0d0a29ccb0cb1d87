"""Parts that several configs share. A config sets every key; nothing is hidden in
train/."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lowrank_jax.errors import UserError, unknown


class Option(NamedTuple):
    """A name that the argument of a config may hold.

    Args:
      default: What it is without; a word sets a bool, a type stands for no number.
      meaning: A line for `--config=FILE.py:help`.
    """

    default: float | bool | type
    meaning: str = ""

    @property
    def is_word(self) -> bool:
        """Whether it is given as a word, without a number."""
        return isinstance(self.default, bool)


Known = Option | float | bool | type
"""An option, or its default alone."""

SMOKE = Option(False, "a few steps, to see that it runs")
CIFAR10 = Option(False, "ResNet-18 on CIFAR-10 in the place of LeNet on MNIST")


def options(arg: str, **known: Known) -> dict[str, Any]:
    """Reads what stands after the colon of `--config=FILE:ARG`.

    "help" prints what there is, and ends the program.

    Args:
      arg: Words and `name=number`, separated by commas, such as "smoke,lasso=1e-4".
      **known: The names a config takes beside "smoke".

    Returns:
      A value for each name; None where there is no default and no number.

    Raises:
      UserError: A word or name that the config does not take.

    >>> options("smoke,lasso=1e-4", lasso=Option(0.0, "weight of the penalty"))
    {'smoke': True, 'lasso': 0.0001}
    """
    table = {
        name: option if isinstance(option, Option) else Option(option)
        for name, option in {"smoke": SMOKE, **known}.items()
    }
    values = {
        name: None if isinstance(option.default, type) else option.default
        for name, option in table.items()
    }
    parts = list(filter(None, arg.split(",")))
    if "help" in parts:
        print(_listed(table))
        raise SystemExit(0)
    for part in parts:
        name, equals, text = part.partition("=")
        if name not in table:
            fix = "What they mean: --config=FILE.py:help."
            problem = unknown("a name that the config takes", name, table, fix=fix)
            raise UserError(f"config argument: {problem}")
        is_word = table[name].is_word
        if is_word == bool(equals):
            written = name if is_word else f"{name}=NUMBER"
            raise UserError(
                f"config argument: must be written as {written}, got {part!r}. Correct"
                " it."
            )
        values[name] = True if is_word else _number(name, text, table[name].default)
    return values


def _listed(table: Mapping[str, Option]) -> str:
    """The options, a line each."""
    lines = []
    for name, (default, meaning) in table.items():
        number = {bool: "", int: "=INTEGER"}.get(
            default if isinstance(default, type) else type(default), "=NUMBER"
        )
        stated = "" if isinstance(default, bool | type) else f" (default {default:g})"
        lines.append(f"  :{name + number:18} {meaning}{stated}".rstrip())
    return "\n".join(lines)


def _number(name: str, text: str, default: float | type) -> float:
    """A number of the default's type."""
    kind = default if isinstance(default, type) else type(default)
    try:
        return kind(text)
    except ValueError as error:
        kind = "a whole number" if kind is int else "a number"
        raise UserError(
            f"config argument: {name} must be {kind}, got {text!r}. Correct it."
        ) from error


def base(*, seed: int) -> ConfigDict:
    """Makes everything but data, task, model and phases."""
    config = ConfigDict()
    config.seed = seed
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.data = ConfigDict()
    config.task = ConfigDict()
    config.model = ConfigDict()
    config.rank_rules = ((".*", "full"),)
    config.init_from = ""
    config.phases = ()
    config.accumulation_steps = 1
    config.steps_per_call = 1
    config.compute_dtype = "float32"
    config.log_every_steps = 50
    config.eval_every_epochs = 1
    config.eval_every_steps = 0
    config.eval_fractions = (1.0, 0.5, 0.25, 0.125)
    config.recalibration_batches = 0
    config.scoring_batches = 2
    config.checkpoint_every_epochs = 1
    config.checkpoint_every_steps = 0
    config.checkpoint_every_minutes = 0.0
    config.keep_checkpoints = 2
    config.keep_best = 1
    return config


def digits(config: ConfigDict, *, batch_size: int) -> None:
    """Sets data and task: scikit-learn's digits, 8x8, pixels 0 to 16; 1,437 to train
    on, of them 137 for validation, 360 to test on."""
    config.data = data("digits", batch_size=batch_size, validation_examples=137)
    config.task = images()


def mnist(config: ConfigDict, *, batch_size: int) -> None:
    """Sets data and task: MNIST, 5,000 of the 60,000 training images held out for
    validation."""
    config.data = data("mnist", batch_size=batch_size, validation_examples=5000)
    config.task = images()


def cifar10(config: ConfigDict, *, batch_size: int) -> None:
    """Sets data and task: CIFAR-10 with crop and flip, 5,000 of the 50,000 training
    images held out for validation."""
    config.data = data("cifar10", batch_size=batch_size, validation_examples=5000)
    config.task = images(
        augment=(("random_crop", {"padding": 4}), ("random_flip", {})),
    )


def data(
    name: str,
    *,
    batch_size: int,
    validation_examples: int,
    args: Mapping[str, Any] | None = None,
    eval_batch_size: int = 500,
    train_examples: int = 0,
) -> dict[str, Any]:
    """Makes a data set with every key, by its name or the import path of a function."""
    return {
        "name": name,
        "args": dict(args or {}),
        "data_dir": "",
        "batch_size": batch_size,
        "eval_batch_size": eval_batch_size,
        "validation_examples": validation_examples,
        "train_examples": train_examples,
    }


def images(
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    augment: Sequence[Any] = (),
) -> dict[str, Any]:
    """Makes the classification of images whose pixels have this mean and deviation, of
    each channel; () for those of the data set."""
    return named(
        "classification", mean=tuple(mean), std=tuple(std), augment=tuple(augment)
    )


def phase(
    *,
    name: str,
    until: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    sampler: Mapping[str, Any] | None = None,
    sizes: str = "masked",
    pass_parts: int = 1,
    teacher: Mapping[str, Any] | None = None,
    passes_loss: str = "mean",
    pass_weights: Sequence[float] = (),
    penalties: Sequence[Mapping[str, Any]] = (),
    projections: Sequence[Mapping[str, Any]] = (),
    trainable: Sequence[str] = (".*",),
    optimizer_state: str = "new",
    shrink: Mapping[str, Any] | None = None,
    on_end: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Makes a phase with every key; plain training at full ranks by default."""
    return {
        "name": name,
        "until": dict(until),
        "sampler": dict(sampler or named("full")),
        "sizes": sizes,
        "pass_parts": pass_parts,
        "teacher": dict(teacher or named("none")),
        "passes_loss": passes_loss,
        "pass_weights": tuple(pass_weights),
        "penalties": tuple(penalties),
        "projections": tuple(projections),
        "trainable": tuple(trainable),
        "optimizer": dict(optimizer),
        "optimizer_state": optimizer_state,
        "shrink": dict(shrink or {}),
        "on_end": tuple(on_end),
    }


def named(name: str, **args: Any) -> dict[str, Any]:
    """Makes a choice from a table with its arguments."""
    return {"name": name, "args": args}


def optimizer(
    name: str,
    *,
    learning_rate: float,
    args: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
    weight_decay: float = 0.0,
    decayed: str = r".*/(kernel|embedding|u|v|middle)",
    decay_columns: str = "all",
    clip_norm: float = 0.0,
) -> dict[str, Any]:
    """Makes an optimizer with every key; kernels and factors decay, biases and norms do
    not."""
    return {
        "name": name,
        "args": dict(args or {}),
        "learning_rate": learning_rate,
        "schedule": dict(schedule or named("constant", warmup_steps=0)),
        "weight_decay": weight_decay,
        "decayed": decayed,
        "decay_columns": decay_columns,
        "clip_norm": clip_norm,
    }


def cosine(*, warmup_steps: int, final_fraction: float = 0.0) -> dict[str, Any]:
    """Makes a warm-up, then half a cosine down."""
    return named("cosine", warmup_steps=warmup_steps, final_fraction=final_fraction)


def steps_down(*, factor: float, at_fractions: Sequence[float]) -> dict[str, Any]:
    """Multiplies the learning rate by a factor at these fractions of the phase."""
    return named("steps", factor=factor, at_fractions=tuple(at_fractions))


def mnist_lenet() -> ConfigDict:
    """Makes LeNet on MNIST, where all methods are compared."""
    config = base(seed=0)
    mnist(config, batch_size=128)
    config.model = named("lenet")
    return config


LENET_EPOCHS = 6


def lenet_optimizer(
    *, constant: bool = False, warmup_steps: int = 200, **changes: Any
) -> dict[str, Any]:
    """Makes SGD with momentum, cosine to zero; `constant` where a phase follows."""
    schedule = named("constant", warmup_steps=warmup_steps) if constant else None
    values = {
        "learning_rate": 0.05,
        "args": {"momentum": 0.9},
        "schedule": schedule or cosine(warmup_steps=warmup_steps),
        "weight_decay": 1e-4,
        **changes,
    }
    return optimizer("sgd", **values)


def resnet(depth: int, *, batch_size: int) -> ConfigDict:
    """Makes a ResNet for CIFAR-10."""
    config = base(seed=0)
    cifar10(config, batch_size=batch_size)
    config.model = named("resnet", depth=depth)
    config.recalibration_batches = 20
    config.checkpoint_every_epochs = 5
    config.eval_every_epochs = 5
    return config


def cifar10_sgd(
    *, constant: bool = False, warmup_steps: int = 0, **changes: Any
) -> dict[str, Any]:
    """Makes SGD 0.1, momentum 0.9, decay 1e-4, x0.1 at 1/2 and 3/4 (Horvath et
    al., 2024)."""
    schedule = named("constant", warmup_steps=warmup_steps) if constant else None
    values = {
        "learning_rate": 0.1,
        "args": {"momentum": 0.9},
        "schedule": schedule or steps_down(factor=0.1, at_fractions=(0.5, 0.75)),
        "weight_decay": 1e-4,
        **changes,
    }
    return optimizer("sgd", **values)


NESTED = (
    named("factorize", rules=((".*", "full"),)),
    named("canonicalize"),
)
"""How a run ends whose layers are partly dense or not in order: every layer low-rank,
the function unchanged, every prefix the best of its rank."""


def length(epochs: int, *, smoke: bool) -> dict[str, int]:
    """Returns the length of a phase; a few steps for a smoke run."""
    return {"steps": SMOKE_STEPS} if smoke else {"epochs": epochs}


SMOKE_STEPS = 100
