"""Tokenizers: text to whole numbers and back, without loss.

A tokenizer is trained on the training split alone. It stands in the facts of its data
set, hence in every checkpoint, as JSON that says all there is to say.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from train import registry, schema
from train.data.byte_pairs import BytePairs, byte_pairs
from train.data.characters import Characters, characters
from train.data.token_ids import Ids


class Tokenizer(Protocol):
    """Numbers for text: ids in [reserved, size), those below it stand for no text."""

    reserved: int

    @property
    def size(self) -> int:
        """Returns how many ids there are."""
        ...

    def encode(self, text: str) -> Ids:
        """Returns the ids of a text, in the smallest unsigned type that holds all.

        Raises:
          UserError: The text holds what has no id.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Returns the ids of each text, as `encode`, faster."""
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " t"]) -> str:
        """Returns the text of ids; reserved ones are left out.

        Raises:
          UserError: Ids that are none.
        """
        ...

    def lengths(self) -> Int[np.ndarray, " size"]:
        """Returns how many characters each token begins: over the tokens of a text
        they add up to its characters."""
        ...

    def to_facts(self) -> dict[str, Any]:
        """Returns JSON that `from_facts` rebuilds it of."""
        ...


TOKENIZERS = {"byte_pairs": byte_pairs, "characters": characters}
"""What makes a tokenizer of training texts, by name: `make(texts, *, reserved)` and the
arguments of the config."""

_KINDS = {"byte_pairs": BytePairs, "characters": Characters}


def check(spec: Any) -> None:
    """Raises UserError where a config's choice of a tokenizer names none."""
    errors.raise_all(schema.compare(spec, schema.NAMED, "tokenizer"))
    if spec["name"] not in TOKENIZERS:
        problem = errors.unknown("a tokenizer", spec["name"], sorted(TOKENIZERS))
        raise UserError(f"tokenizer.name: {problem}")


def build(
    spec: Mapping[str, Any], texts: Sequence[str], *, reserved: int = 0
) -> Tokenizer:
    """Trains a tokenizer.

    Args:
      spec: Its name in `TOKENIZERS` and arguments, `{"name": ..., "args": {...}}`.
      texts: What to train it on: the training split, no other.
      reserved: How many ids to keep for what is no text; they come first.

    Raises:
      UserError: No such tokenizer, or arguments that it does not take.
    """
    check(spec)
    with errors.at("tokenizer"):
        if "reserved" in spec["args"]:
            raise UserError(
                "args: must not hold reserved, which the data set says, got"
                f" {spec['args']}. Leave it out."
            )
        return registry.build(spec, TOKENIZERS, texts, reserved=reserved)


def from_facts(facts: Any) -> Tokenizer:
    """Rebuilds a tokenizer from what `to_facts` returned.

    The facts may come from a stranger's file: they are checked, and nothing in them is
    executed.

    Raises:
      UserError: They are of no tokenizer.
    """
    with errors.at("tokenizer"):
        name = facts.get("name") if isinstance(facts, Mapping) else None
        if not isinstance(name, str) or name not in _KINDS:
            raise UserError(
                "facts: must be a mapping with a name of"
                f" {', '.join(sorted(_KINDS))}, got {str(facts)[:80]}. The file is"
                " damaged; take another."
            )
        return _KINDS[name].from_facts(facts)
