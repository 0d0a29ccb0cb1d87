"""What tables count: parameters as the files hold them, and in the cheapest form."""

import jax
import numpy as np
import pytest
from flax import nnx
from support import stored_arrays

import lowrank_jax as lr
from lowrank_jax.surgery import take_forms
from lowrank_jax.times import MERGED
from train.evaluation import Evaluator

EXAMPLE = jax.ShapeDtypeStruct((1, 6), "float32")
UP, DOWN, BIASES = (6, 16), (16, 4), 16 + 4


class Model(nnx.Module):
    """A norm, whose statistics are no parameters, between two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(*UP, rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(*DOWN, rngs=rngs)

    def __call__(self, x):
        return self.down(self.norm(self.up(x)))


FIXED = BIASES + 16


def low_rank(**options) -> nnx.Module:
    return lr.factorize(Model(nnx.Rngs(0)), [(".*", {"max_rank": 6, **options})])


def masked() -> nnx.Module:
    model = low_rank()
    lr.set_ranks(model, {"up": 2, "down": 3})
    return model


def formed(form: str) -> nnx.Module:
    cut = lr.truncate(low_rank(), {"up": 3, "down": 2})
    return take_forms(cut, {"up": form, "down": form})


# what the files hold, and the smaller of the form and the dense matrix; by hand
ROWS = {
    "factored": (formed("factored"), 3 * 22 + 2 * 20, 3 * 22 + 2 * 20),
    "gauge": (formed("gauge"), 3 * (22 - 3) + 2 * (20 - 2), 3 * 19 + 2 * 18),
    "merged": (formed(MERGED), 6 * 16 + 16 * 4, 6 * 16 + 16 * 4),
    "masked": (masked(), 6 * 22 + 4 * 20, 2 * 22 + 3 * 20),
    "at full rank": (low_rank(), 6 * 22 + 4 * 20, 6 * 16 + 16 * 4),
    "with s": (low_rank(with_s=True), 6 * 23 + 4 * 21, 6 * 16 + 16 * 4),
}


@pytest.mark.parametrize("name", ROWS)
def test_stored_is_what_the_files_hold(tmp_path, name):
    """Read back from them; the summary and the count say the same."""
    model, held, cheapest = ROWS[name]
    lr.checkpoint.save(tmp_path / "saved", model)
    arrays = stored_arrays(lr.checkpoint.open_checkpoint(tmp_path / "saved"))
    in_files = [np.size(x) for key, x in arrays.items() if key.startswith("params/")]
    table, cost = lr.summary(model, EXAMPLE), lr.count(model, EXAMPLE)
    assert sum(in_files) == held + FIXED == table.stored == cost.allocated
    assert table.cheapest == cheapest + FIXED == cost.params(lr.get_ranks(model))
    assert table.dense == 6 * 16 + 16 * 4 + FIXED == cost.dense_params
    of_layers = sum(row.stored for row in table.rows)
    assert of_layers == held + BIASES


@pytest.mark.parametrize("options", [{}, {"with_s": True}, {"depth": 3}])
def test_stored_at_lower_ranks_is_what_a_cut_holds(options):
    """The row of an evaluation says it before anything is cut."""
    model = low_rank(**options)
    ranks = {"up": 2, "down": 3}
    cost = lr.count(model, EXAMPLE)
    cut = lr.truncate(model, ranks)
    sizes = [x.size for x in jax.tree.leaves(nnx.state(cut, nnx.Param))]
    assert cost.stored(ranks) == sum(sizes)
    evaluator = Evaluator(lambda *_: {"loss": 0.0}, None, cost, list, {})
    row = evaluator.at(None, None, ranks)
    assert (row["stored"], row["params"]) == (sum(sizes), cost.params(ranks))


def test_a_stack_is_stored_at_its_largest_rank():
    """Two convolution groups of ranks 1 and 2 are allocated at 2."""
    conv = nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=nnx.Rngs(0))
    model, ranks = lr.factorize(conv), {"": [1, 2]}
    cost = lr.count(model, jax.ShapeDtypeStruct((1, 7, 4), "float32"))
    cut = lr.truncate(model, ranks)
    sizes = [x.size for x in jax.tree.leaves(nnx.state(cut, nnx.Param))]
    assert cost.stored(ranks) == sum(sizes) == 2 * 2 * (6 + 2) + 4
