"""The README's example runs as it stands there."""

from typing import Any

import pages
from flax import nnx

import lowrank_jax as lr

(FIRST,) = (
    block
    for block in pages.blocks((pages.ROOT / "README.md").read_text(), "README.md")
    if block.language == "python"
)


def run(block: pages.Block) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block.text, block.where, "exec"), names)
    return names


def test_the_first_example_cuts_what_it_trained(capsys):
    """In 20 lines; ranks are whole again after the loop, the cut keeps its budget."""
    assert len([line for line in FIRST.text.splitlines() if line.strip()]) <= 20
    names = run(FIRST)
    model, small = names["model"], names["small"]
    assert lr.get_ranks(model) == lr.max_ranks(model) == {"": 10}
    rank, biases = small.factors.max_rank, 10
    assert rank * (64 + 10) <= 0.5 * 64 * 10 < (rank + 1) * (64 + 10)
    cost = lr.count(small, names["x"][:1])
    assert cost.params(lr.get_ranks(small)) == rank * (64 + 10) + biases
    assert str(rank) in capsys.readouterr().out
    assert type(lr.merge(small)) is nnx.Linear
