"""The table of a model's layers against the count and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax.active import set_ranks
from lowrank_jax.counting import count
from lowrank_jax.factorization import factorize
from lowrank_jax.summary import summary


class Model(nnx.Module):
    """A tied layer, a norm, a matrix of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.grouped = nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=rngs)
        self.again = self.first
        self.mixer = nnx.Param(rngs.params.normal((5, 4)))

    def __call__(self, inputs):
        hidden = self.norm(self.first(inputs))
        return self.grouped(hidden @ self.mixer)


EXAMPLE = jax.ShapeDtypeStruct((1, 7, 6), jnp.float32)
RULES = [("mixer", "dense"), ("first|again", {"max_rank": 4}), (".*", "full")]


def low_rank() -> nnx.Module:
    model = factorize(Model(nnx.Rngs(0)), RULES)
    set_ranks(model, {"again": 2, "grouped": [1, 2]})
    return model


def effective_rank(matrix: np.ndarray) -> float:
    s = np.linalg.svd(np.asarray(matrix, float), compute_uv=False)
    shares = s[s > 1e-7 * s[0]] / s.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_rows_are_the_layers_at_their_active_ranks():
    """Totals are those of the arrays and of the count."""
    model = low_rank()
    table = summary(model, EXAMPLE)
    rows = {row.path: row for row in table.rows}
    assert list(rows) == ["again", "grouped", "mixer"]
    assert [(r.form, r.rank, r.max_rank) for r in table.rows] == [
        ("factored", 2, 4),
        ("factored", 2, 2),
        ("own", None, None),
    ]
    again, grouped, mixer = (rows[path] for path in ("again", "grouped", "mixer"))
    assert again.stored == 4 * (6 + 5) + 5  # what is allocated
    assert again.cheapest == 2 * (6 + 5) + 5  # what acts
    assert again.dense == 6 * 5 + 5
    assert grouped.cheapest == 1 * (6 + 2) + 6 * 2 + 4  # r(m+n) is more at rank 2
    assert (mixer.stored, mixer.cheapest, mixer.dense) == (20, 20, 20)
    assert mixer.macs is mixer.dense_macs is None
    sizes = [x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert table.stored == sum(sizes)
    cost, ranks = count(model, EXAMPLE), {"again": 2, "grouped": [1, 2]}
    assert (table.macs, table.dense_macs) == (cost.macs(ranks), cost.dense_macs)
    assert (table.cheapest, table.dense) == (cost.params(ranks), cost.dense_params)
    assert table.stored == cost.allocated


@pytest.mark.parametrize("build", [low_rank, lambda: Model(nnx.Rngs(0))])
def test_effective_ranks_are_those_of_the_spectra(build):
    model = build()
    rows = {row.path: row for row in summary(model).rows}
    assert all(row.macs is None for row in rows.values())
    kernel = model.first.kernel[...]
    assert rows["again"].effective_rank == pytest.approx(effective_rank(kernel), 1e-4)
    mixer = model.mixer[...]
    assert rows["mixer"].effective_rank == pytest.approx(effective_rank(mixer), 1e-4)
    halves = np.split(np.asarray(model.grouped.kernel[...]), 2, axis=-1)
    mean = np.mean([effective_rank(half.reshape(6, 2)) for half in halves])
    assert rows["grouped"].effective_rank == pytest.approx(mean, 1e-4)


def test_an_abstract_model_has_no_spectra():
    rows = summary(nnx.eval_shape(low_rank), EXAMPLE).rows
    assert {row.effective_rank for row in rows} == {None}
    assert rows[0].macs is not None


def test_it_prints_as_a_plain_table():
    """A header, a row for each layer, what is in none, the totals and their shares of
    the dense model, and what the columns count."""
    lines = str(summary(low_rank(), EXAMPLE)).splitlines()
    headers = "path type form rank stored cheapest dense MACs dense MACs effective rank"
    assert lines[0].split() == headers.split()
    first = ["again", "LowRankLinear", "factored", "2", "of", "4", "49", "27", "35"]
    assert lines[1].split()[:9] == first
    assert [line.split()[0] for line in lines[1:6]] == [
        *("again", "grouped", "mixer"),
        *("other", "total"),
    ]
    assert lines[4].split() == ["other", "10", "10", "10", "0", "0"]
    assert lines[6].split()[:5] == ["of", "dense", "124%", "87%", "100%"]
    assert lines[7].startswith("stored: parameters in the checkpoint; cheapest: ")
    assert lines[8].endswith("MACs of one example")


def test_columns_of_which_nothing_is_known_are_left_out():
    """Without an example and without spectra; ranks before a cut stand beside those
    after it."""
    table = summary(low_rank(), spectra=False)
    lines = table.table(before={"again": 4, "mixer": 4}, unit="token").splitlines()
    assert lines[0].split() == "path type form rank stored cheapest dense".split()
    assert lines[1].split()[3:6] == ["4", "->", "2"]
    assert "4 -> merged" in lines[3]
    assert lines[-1].endswith("MACs of one token")


def test_a_rank_of_zero_has_no_spectrum_left():
    model = factorize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    set_ranks(model, {"": 0})
    (row,) = summary(model).rows
    assert (row.path, row.rank, row.effective_rank) == ("", 0, 0.0)
    assert "(root)" in str(summary(model))
