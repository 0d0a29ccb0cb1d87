"""Passes on factors that are cut, and on parts of the batch: the step of masked passes,
at the price of the sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import relative_error
from steps import (
    full_teacher,
    log_softmax,
    logits_at,
    matryoshka,
    named,
    step_parts,
)

from configs import common
from lowrank_jax.errors import UserError
from train.phases import build_phases

FEW = named("uniform_fraction", fractions=(1.0, 0.5, 0.25, 0.25))
FAMILY = named(
    "family", profiles=[{"hidden/0": 9, "head": 7}, {"hidden/0": 9, "head": 2}]
)
BETWEEN = named("strata", fractions=((0.75, 0.25), (0.125,)), between="layers")
TAUGHT = {"teacher": full_teacher(0.25)}
LASSO = {"penalties": [named("group_lasso", weight=0.01)]}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all levels": ("mlp", matryoshka(1.0, 0.5, 0.25), TAUGHT),
    "one of few": ("mlp", FEW, {}),
    "one of few, taught": ("mlp", FEW, TAUGHT),
    "a family": ("mlp", FAMILY, {}),
    "levels between": (
        "mlp",
        named("sandwich", passes=3, smallest=0.25, fractions=(0.5, 0.75)),
        TAUGHT,
    ),
    "any ranks between": ("mlp", named("sandwich", passes=3, smallest=0.25), {}),
    "a size of each stratum": (
        "mlp",
        named("strata", fractions=((0.75, 0.5), (0.25,))),
        TAUGHT,
    ),
    "any ranks below a rung": ("mlp", BETWEEN, TAUGHT),
    "in parts": ("mlp", FEW, {**TAUGHT, "parts": 3}),
    "one factor trained": ("mlp", FEW, {"trainable": (".*/u",)}),
    "decay of what acts": (
        "mlp",
        FEW,
        {
            "optimizer": common.optimizer(
                "sgd", learning_rate=1.0, weight_decay=0.1, decay_columns="active"
            )
        },
    ),
    "BatchNorm, all levels": ("convnet", matryoshka(1.0, 0.5), LASSO),
    "BatchNorm, one of few": ("convnet", FEW, LASSO),
    "BatchNorm, below a rung": ("convnet", BETWEEN, LASSO),
    "dropout": ("vit", matryoshka(1.0, 0.25), {}),
}


def nested(**changes: Any) -> dict[str, Any]:
    optimizer = common.optimizer("sgd", learning_rate=0.1)
    return common.phase(
        name="nested", until={"steps": 1}, optimizer=optimizer, **changes
    )


def three_steps(case: str, sizes: str) -> tuple[np.ndarray, dict[str, Any]]:
    """All arrays of the model after three steps, and the last one's metrics."""
    model, sampler, changes = CASES[case]
    _, _, state, batch, step = step_parts(model, sampler, sizes=sizes, **changes)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert step._cache_size() <= 2  # one for the first state, which lies otherwise
    return ravel_pytree((state.params, state.model_state))[0], metrics


QUICK = (
    "all levels",
    "one of few, taught",
    "any ranks below a rung",
    "decay of what acts",
    "BatchNorm, below a rung",
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES],
)
def test_a_cut_pass_is_the_masked_one(case):
    """Parameters, BatchNorm's statistics and losses, pass by pass."""
    arrays, metrics = three_steps(case, "masked")
    found, others = three_steps(case, "static")
    assert relative_error(found, arrays) <= 1e-6
    assert others.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("sizes", ["masked", "static"])
def test_passes_on_parts_are_passes_on_these_examples(sizes):
    """Two parts of the six rows, each pass after the first on its own; the teacher on
    the same."""
    levels, changes = matryoshka(1.0, 0.5, 0.25), {**TAUGHT, "sizes": sizes}
    network, _, state, batch, step = step_parts("mlp", levels, pass_parts=2, **changes)
    full, *others = (logits_at(network, f, batch["image"]) for f in (1.0, 0.5, 0.25))
    labels = np.asarray(batch["label"])

    def losses(logits: np.ndarray) -> np.ndarray:
        """Of each example: a quarter the label's, the rest the teacher's."""
        logs, taught = log_softmax(logits), np.exp(log_softmax(full))
        hard = -logs[np.arange(6), labels]
        return 0.25 * hard - 0.75 * (taught * logs).sum(axis=-1)

    seen = set()
    for number in range(12):
        at = jax.tree.map(jnp.copy, state)._replace(step=jnp.int32(number))
        _, metrics = step(at, batch)
        found = [float(metrics[f"loss_pass_{n}"]) for n in (1, 2)]
        even, odd = (
            [losses(x)[rows].mean() for x in others]
            for rows in (slice(0, 6, 2), slice(1, 6, 2))
        )
        orders = [(even[0], odd[1]), (odd[0], even[1])]
        (which,) = [
            n for n, order in enumerate(orders) if np.allclose(found, order, rtol=1e-5)
        ]
        seen.add(which)
    assert seen == {0, 1}  # the parts change hands


@pytest.mark.parametrize(
    ("sampler", "parts", "message"),
    [
        (matryoshka(1.0, 0.5, 0.25), 0, "pass_parts: must be at least 1, got 0"),
        (matryoshka(1.0, 0.5, 0.25, 0.125), 2, "number of passes after the first"),
        (FEW, 2, "got 2 for 1 passes"),
    ],
)
def test_parts_that_do_not_fit_the_passes_are_refused(sampler, parts, message):
    with pytest.raises(UserError, match=rf"\(nested\).*{message}"):
        build_phases([nested(sampler=sampler, pass_parts=parts)])


def flops(sampler: dict[str, Any], sizes: str) -> float:
    """Operations of a step, as XLA counts them."""
    _, _, state, batch, step = step_parts("convnet", sampler, sizes=sizes)
    return step.lower(state, batch).compile().cost_analysis()["flops"]


def test_a_cut_pass_costs_what_its_size_costs():
    """Three masked passes cost as much as three full ones; cut ones far less."""
    alone = flops(named("full"), "masked")
    levels = matryoshka(1.0, 0.25, 0.125)
    masked, cut = flops(levels, "masked"), flops(levels, "static")
    assert masked > 2.8 * alone
    assert cut < 2.2 * alone


def test_what_is_drawn_runs_alone():
    """One program holds every rung; a step runs one branch of it."""
    _, _, state, batch, step = step_parts("mlp", FEW, sizes="static")
    text = step.lower(state, batch).as_text()
    assert text.count("stablehlo.case") == 1
    masked = step_parts("mlp", FEW)[-1].lower(state, batch).as_text()
    assert "stablehlo.case" not in masked


@pytest.mark.parametrize("sampler", ["single_layer", "uniform_fraction", "independent"])
def test_a_sampler_of_any_ranks_is_refused(sampler):
    with pytest.raises(UserError, match=r"\(nested\): sizes: 'static' needs a sampler"):
        build_phases([nested(sampler=named(sampler), sizes="static")])
