"""Every key of a config has a meaning, and no other has; the defaults are true."""

import ast
import importlib
import re

from configs import common
from train import config
from train.meanings import MEANINGS, NAMES


def test_every_key_has_a_meaning_and_nothing_else_has():
    """In the order of the schema, too: the lists read alike."""
    assert list(MEANINGS) == config.keys()


def test_a_meaning_is_a_short_sentence():
    wrong = {
        key: text
        for key, text in MEANINGS.items()
        if len(text) > 220 or not text.endswith(".") or "\n" in text
    }
    assert not wrong


def test_the_defaults_are_those_of_the_shared_parts_of_configs():
    """What a config gets that names only what it must."""
    phase = common.phase(
        name="only", until={}, optimizer=common.optimizer("sgd", learning_rate=0.1)
    )
    data = common.data("digits", batch_size=1, validation_examples=0)
    known = common.base(seed=0).to_dict() | {"data": data}
    found = []
    for key, text in MEANINGS.items():
        stated = re.search(r" Default: (.*)\.$", text)
        if not stated:
            continue
        value = known | {"phases[]": phase}
        for part in key.replace("phases[].", "phases[]/").replace(".", "/").split("/"):
            value = value[part]
        assert ast.literal_eval(stated[1]) == value, key
        found.append(key)
    assert len(found) > 30  # the walk sees them


def test_every_table_of_names_is_there():
    for key, place in NAMES.items():
        module, _, table = place.partition(":")
        assert key in MEANINGS and getattr(importlib.import_module(module), table)
