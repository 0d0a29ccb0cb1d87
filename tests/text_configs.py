"""A language model of a few numbers on a text that the test writes."""

import random
from pathlib import Path

from support import put

from configs import shakespeare
from train.config import to_json

CHARACTERS = "abc \n"


def write(file: Path, characters: str = CHARACTERS, length: int = 4000) -> Path:
    """A text in which every tenth part holds every character."""
    draw = random.Random(0)
    file.write_text("".join(draw.choice(characters) for _ in range(length)))
    return file


def make_config(file: Path) -> dict:
    """The smoke run of the language model, smaller, on this file."""
    config = to_json(shakespeare.get_config("smoke"))
    put(config, "data/args/text", {"file": str(file)})
    put(config, "data/args/context", 8)
    config["model"]["args"] |= {"depth": 1, "embed_dim": 8, "num_heads": 2}
    return config
