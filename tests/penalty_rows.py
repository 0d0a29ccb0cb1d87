"""The table of penalties: a row each, with its formula in float64 NumPy."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import penalty_formulas as formulas
from flax import nnx
from penalty_formulas import C
from spectra import product

from lowrank_jax.paths import find_factors
from lowrank_jax.penalties import PENALTIES, AnyPenalty, stateful

WEIGHT = 0.3


@dataclasses.dataclass(frozen=True)
class Row:
    """A penalty and the direct formula of one matrix.

    Args:
      reference: From `u, s, v` of one matrix in float64.
      arguments: Beside the weight, for layers of these paths.
      needs_s: Whether layers without `s` are refused.
      slope_of: What the gradient is that of, where it is not the reference's.
    """

    reference: Callable[..., float]
    arguments: Callable[[Iterable[str]], dict[str, Any]] = lambda paths: {}
    needs_s: bool = False
    slope_of: Callable[..., float] | None = None

    def kinds(self) -> list[bool]:
        return [True] if self.needs_s else [False, True]


ROWS = {
    "hierarchical_group_lasso": Row(formulas.numpy_hierarchical),
    "group_lasso": Row(formulas.numpy_group),
    "orthogonality": Row(formulas.numpy_orthogonality),
    "l1": Row(lambda u, s, v: np.linalg.norm(s, 1), needs_s=True),
    "hoyer": Row(
        lambda u, s, v: np.linalg.norm(s, 1) / np.linalg.norm(s) - 1, needs_s=True
    ),
    "hoyer_square": Row(
        lambda u, s, v: (np.linalg.norm(s, 1) / np.linalg.norm(s)) ** 2 - 1,
        needs_s=True,
    ),
    "stable_rank": Row(
        lambda *x: (np.linalg.norm(product(*x)) / np.linalg.norm(product(*x), 2)) ** 2
    ),
    "modified_stable_rank": Row(
        formulas.numpy_modified,
        lambda paths: {"target_ranks": dict.fromkeys(paths, 1)},
    ),
    "nuclear": Row(formulas.numpy_nuclear),
    "frobenius_decay": Row(lambda *x: np.linalg.norm(product(*x)) ** 2 / 2),
    "funnel": Row(
        formulas.numpy_funnel,
        lambda paths: {"start": C, "end": 0.1, "anneal_steps": 10},
    ),
    "log_determinant": Row(
        formulas.numpy_surrogate,
        lambda paths: {"every_steps": 3, "start": C, "end": 0.1, "anneal_steps": 10},
        slope_of=formulas.numpy_log_determinant,
    ),
}


def make(name: str, paths: Iterable[str] = (), weight: float = WEIGHT) -> AnyPenalty:
    return PENALTIES[name](weight=weight, **ROWS[name].arguments(paths))


def evaluate(name: str, model: nnx.Module, step=0) -> jax.Array:
    """The value of a row at the first step, with a new state where there is one."""
    penalty = stateful(make(name, find_factors(model)))
    return penalty.apply(model, penalty.init(model), step)[0]
