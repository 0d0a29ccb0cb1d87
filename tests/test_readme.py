"""The README's example runs as it stands there."""

import re
from pathlib import Path

from flax import nnx

ROOT = Path(__file__).parents[1]


def test_example_runs():
    """The code block of "Your own model and loop" ends with a dense model again."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    kinds = [type(layer) for layer in names["dense_again"].layers]
    assert kinds[0] is nnx.Linear and kinds[2] is nnx.Linear
    assert names["small"].layers[0].factors.max_rank == 16
