"""The README's examples run as they stand there."""

import re
from pathlib import Path
from typing import Any

from flax import nnx

import lowrank_jax as lr

ROOT = Path(__file__).parents[1]
FIRST, FUNCTIONAL = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_first_example_cuts_what_it_trained(capsys):
    """Ranks are whole again after the loop; the cut model keeps its budget, and turns
    into plain Flax layers."""
    names = run(FIRST)
    assert lr.get_ranks(names["model"]) == lr.max_ranks(names["model"])
    small, dense = (lr.count(names[n], names["x"][:1]) for n in ("small", "dense"))
    factored = 64 * 256 + 256 * 10
    biases = 256 + 10
    assert small.params(lr.get_ranks(names["small"])) <= 0.25 * factored + biases
    assert dense.fixed_params == factored + biases
    kinds = [type(layer) for layer in names["dense_again"].layers]
    assert kinds[0] is nnx.Linear and kinds[2] is nnx.Linear
    assert "layers/0" in capsys.readouterr().out


def test_the_functional_loop_shrinks_its_state():
    """The optimizer's moments have the shapes of the cut parameters."""
    names = run(FUNCTIONAL)
    rank = names["model"].factors.max_rank
    assert rank < 10 and names["restarted"] == []
    assert names["opt_state"][0].mu["factors"]["u"].shape == (64, rank)
