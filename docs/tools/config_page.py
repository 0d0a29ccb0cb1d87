"""The page of config keys, made from the schema and the tables of names."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lowrank_jax.penalties import PENALTIES
from lowrank_jax.projections import PROJECTIONS
from lowrank_jax.samplers import SAMPLERS
from train import config, meanings, optim, phases, registry, selecting
from train.actions import ACTIONS
from train.data import DATASETS
from train.data.augmentation import AUGMENTATIONS
from train.data.tokenizers import TOKENIZERS
from train.models import MODELS
from train.tasks import TASKS
from train.teachers import TEACHERS
from train.until import CONDITIONS

HEAD = """# Config keys

A config is a Python file in `configs/`, or one of your own, with a function
`get_config(arg="")` that returns a `ml_collections.ConfigDict`. **Every key is there
and no other**: a misspelled key is an error, nothing has a hidden default. The defaults
below are those of `configs/common.py`, whose functions `base`, `data`, `phase` and
`optimizer` write every key; "given" stands where you must say it yourself. A flag
changes a place: `--config.seed=1`, `--config.data.batch_size=64`, an entry of a list by
its number: `"--config.phases[0].until.epochs=3"`; what has no place yet is written in
the file. Words after the file's colon are its own arguments
(`configs/nested.py:smoke,alone=0.5`); `--config=configs/nested.py:help` lists them.

The config in a checkpoint has every argument of what it names written out, defaults
included. Beside it stands the structure that its rank rules made, layer by layer.

`[]` stands for every entry of a list. This page is made from the code; the choices by
name follow [below](#names), each with its arguments.
"""

SECTIONS = (
    ("The run", ""),
    ("The mesh of devices", "mesh"),
    ("Data", "data"),
    ("Task and model", "task model rank_rules init_from"),
    ("Phases", "phases"),
)
"""A table for each: its title, and how its keys begin; the first has the others."""


class Choices(NamedTuple):
    """A table of names that configs choose from.

    Args:
      title: Of its section.
      key: Where in a config.
      table: Functions, or their import paths, by name.
      skipped: How many positional arguments the caller gives.
      supplied: Arguments that the caller gives by name.
      about: A sentence or two.
    """

    title: str
    key: str
    table: Mapping[str, str | Callable[..., Any]]
    skipped: int = 0
    supplied: tuple[str, ...] = ()
    about: str = ""


BUILT_WITH = (
    ("rngs", "image_shape", "num_classes", "vocab_size", "context")
    + ("source_length", "target_length")
)  # fmt: skip
"""What tasks and the loop give a model."""

CHOICES = (
    Choices("Samplers", "phases[].sampler", SAMPLERS),
    Choices("Penalties", "phases[].penalties", PENALTIES),
    Choices("Projections", "phases[].projections", PROJECTIONS),
    Choices("Teachers", "phases[].teacher", TEACHERS),
    Choices("Conditions", "phases[].until.condition", CONDITIONS),
    Choices("Actions", "phases[].on_end", ACTIONS),
    Choices(
        "Selectors",
        "`args.selector` of the actions `select`, `select_family` and `truncate`",
        selecting.TABLE,
        skipped=1,
        about="Also flags of [`train.truncate`](commands.md#traintruncate): those with"
        " one `value` as `--NAME=VALUE`, the others as `--select=NAME`. In configs"
        ' `{"name": "selected"}` stands for what an earlier `select` chose.',
    ),
    Choices(
        "Optimizers",
        "phases[].optimizer",
        optim.OPTIMIZERS,
        supplied=("learning_rate", "weight_decay", "mask"),
        about="As optax has them; learning rate and decay are keys beside `args`.",
    ),
    Choices("Schedules", "phases[].optimizer.schedule", optim.SCHEDULES, skipped=2),
    Choices("Models", "model", MODELS, supplied=BUILT_WITH),
    Choices("Tasks", "task", TASKS, skipped=1),
    Choices(
        "Augmentations",
        "`task.args.augment` of `classification`",
        AUGMENTATIONS,
        skipped=2,
        about='Pairs of a name and arguments: `(("random_crop", {"padding": 4}),)`.',
    ),
    Choices(
        "Data sets with arguments",
        "data",
        DATASETS,
        supplied=("data_dir",),
        about="Beside these, `digits` and the names of TFDS image sets; see"
        " [your own data](../guides/own_data.md).",
    ),
    Choices(
        "Tokenizers",
        "`data.args.tokenizer` of the data sets of text",
        TOKENIZERS,
        skipped=1,
    ),
)


def page() -> str:
    """Returns the page.

    Raises:
      ValueError: A key has no meaning, or a meaning no key.
    """
    known, told = config.keys(), meanings.MEANINGS
    if sorted(known) != sorted(told):
        raise ValueError(
            "train/meanings.py: must have the keys of the schema, got others:"
            f" {sorted({*known} ^ {*told})}. Add or drop them."
        )
    return "\n".join([HEAD, *_key_tables(known), *_names()]) + "\n"


def _key_tables(known: list[str]) -> Iterator[str]:
    of_section = {
        title: [key for key in known if key.partition(".")[0].strip("[]") in parts]
        for title, parts in ((title, text.split()) for title, text in SECTIONS)
    }
    taken = {key for keys in of_section.values() for key in keys}
    of_section[SECTIONS[0][0]] = [key for key in known if key not in taken]
    for title, keys in of_section.items():
        yield f"## {title}\n"
        yield "| key | type | meaning | default |"
        yield "|---|---|---|---|"
        yield from map(_key_row, keys)
        yield ""


def _key_row(key: str) -> str:
    meaning, _, default = meanings.MEANINGS[key].partition(" Default: ")
    kind = _type_of(key)
    shown = f"`{_escape(default.removesuffix('.'))}`" if default else "given"
    if kind in ("mapping", "entry"):
        shown = ""
    least = config.LEAST.get(key)
    bound = "" if least is None else f", at least {least}"
    table = _link_of(key)
    return f"| `{key}` | {kind}{bound} | {_escape(meaning)}{table} | {shown} |"


def _type_of(key: str) -> str:
    """The type of a key as the schema has it; of keys of their own, none."""
    place: Any = config.CONFIG
    for part in key.split("."):
        if not isinstance(place, Mapping):
            return ""
        place = place.get(part.removesuffix("[]"))
        if part == "phases[]":
            place = phases.SCHEMA
    if isinstance(place, Mapping):
        return "mapping"
    return getattr(place, "__name__", "")


def _link_of(key: str) -> str:
    """A link to the choices that a key takes."""
    for choices in CHOICES:
        if f"{choices.key}.name" == key.replace("penalties[]", "penalties").replace(
            "projections[]", "projections"
        ).replace("on_end[]", "on_end"):
            return f" [{choices.title}](#{_slug(choices.title)})."
    return ""


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _names() -> Iterator[str]:
    yield "## Names\n"
    yield (
        "In the place of each name an import path of your own works,"
        " `my_package.module:function`. A choice is"
        ' `{"name": NAME, "args": {ARGUMENT: VALUE}}`; arguments without a value below'
        " must be given.\n"
    )
    for choices in CHOICES:
        where = choices.key if "`" in choices.key else f"`{choices.key}`"
        yield f"### {choices.title}\n"
        yield f"In {where}. {choices.about}\n".replace(". \n", ".\n")
        yield "| name | arguments | what it does |"
        yield "|---|---|---|"
        for name in choices.table:
            function = registry.resolve(name, choices.table, allow_imports=None)
            arguments = "<br>".join(_arguments(function, choices)) or "-"
            yield f"| `{name}` | {arguments} | {_escape(first_sentence(function))} |"
        yield ""


def _arguments(function: Callable[..., Any], choices: Choices) -> Iterator[str]:
    parameters = list(inspect.signature(function).parameters.items())
    for name, parameter in parameters[choices.skipped :]:
        if name in choices.supplied or parameter.kind is parameter.VAR_KEYWORD:
            continue
        text = name
        if parameter.default is not parameter.empty:
            default = parameter.default
            shown = getattr(default, "__name__", None) or repr(default)
            text += f"={shown}"
        yield f"`{_escape(text)}`"


def first_sentence(function: Callable[..., Any]) -> str:
    """Returns the first sentence of a docstring, on one line.

    Args:
      function: Or a class.

    Raises:
      ValueError: It has none.
    """
    paragraph = (inspect.getdoc(function) or "").partition("\n\n")[0]
    if not paragraph:
        raise ValueError(f"{function}: must have a docstring, got none. Write one.")
    sentence, stop, _ = " ".join(paragraph.split()).partition(". ")
    return sentence + stop.strip()


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
