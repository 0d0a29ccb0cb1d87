"""Writes text with a checkpoint: `python -m train.generate --checkpoint=DIR
--prompt=TEXT --rank_fraction=0.25`.

A language model goes on with a prompt, a translation model translates it. Several
prompts: `--prompt` again and again, or `--prompts_file`, a prompt a line. The ranks are
the checkpoint's, or lower ones (`--rank`, `--rank_fraction` or `--ranks`). Tokens are
the likeliest ones, or drawn at a `--temperature`; there is no beam search. The data set
is not needed. Prints the texts, a line each, or each below its prompt where one has
several lines, and ends with one line of JSON: `{"texts", "ranks", "params", "stored",
"macs"}`.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from train import early

    early.begin("train.generate")

import math
from pathlib import Path

import jax
from absl import flags

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import binary, selecting, writing
from train.report import logs

_EXAMPLES = (
    'train.generate --checkpoint=runs/text --prompt="ROMEO:"',
    'train.generate --checkpoint=runs/text --prompt="ROMEO:" --temperature=0.8',
)

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a checkpoint, of its steps, or of a run."
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "What to go on with or to translate; may be given several times."
)
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "A file of prompts in UTF-8, one a line."
)
_SELECTORS = selecting.define_value_flags(selecting.BY_RANKS)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 200, "Most tokens of a text.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    0.0,
    "Draw tokens at this temperature; 0 takes the likeliest.",
    lower_bound=0.0,
)
_TOP_K = flags.DEFINE_integer(
    "top_k",
    None,
    "With --temperature: draw among so many of the likeliest tokens.",
    lower_bound=1,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "With --temperature: of what is drawn.", lower_bound=0
)
_ALLOW = flags.DEFINE_list(
    "allow_imports", [], "Packages that names in the checkpoint may be imported from."
)


def _main() -> None:
    binary.check_companions(
        flags.FLAGS, {"top_k": ["temperature"], "seed": ["temperature"]}
    )
    if not math.isfinite(_TEMPERATURE.value):
        raise UserError(
            f"--temperature: must be a number of at least 0, got {_TEMPERATURE.value}."
            " Take 0 for the likeliest tokens."
        )
    selector = selecting.from_value_flags(_SELECTORS)
    prompts, where = _prompts()
    writer = writing.open_writer(
        _CHECKPOINT.value, selector, allow_imports=_ALLOW.value
    )
    with errors.at(where):
        result = writer.write(
            prompts,
            max_tokens=_MAX_TOKENS.value,
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            key=jax.random.key(_SEED.value),
        )
    apart = len(prompts) > 1 and any("\n" in text for text in result["texts"])
    for prompt, text in zip(prompts, result["texts"], strict=True):
        if apart:  # else a line each
            print(f"== {prompt}")
        print(text)
    logs.emit(result)


def _prompts() -> tuple[list[str], str]:
    """The prompts, and the flag that they come from."""
    path = _PROMPTS_FILE.value
    if bool(_PROMPT.value) == bool(path):
        raise UserError(
            "flags: exactly one of --prompt, --prompts_file must be given, got"
            f" {'both' if path else 'none'}. Keep one."
        )
    if not path:
        return _PROMPT.value, "--prompt"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not there, or not UTF-8
        raise UserError(
            f"--prompts_file: must be a file in UTF-8, got {path} ({error}). Check the"
            " path."
        ) from error
    if not text:
        raise UserError(f"--prompts_file: must hold a prompt, got {path}, empty. Add.")
    return text.removesuffix("\n").split("\n"), "--prompts_file"


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    binary.run(_main, examples=_EXAMPLES)
