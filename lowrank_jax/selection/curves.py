"""What each rank of each layer keeps: curves from factors, as plain numbers."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from lowrank_jax import linalg
from lowrank_jax.factors import Factors


def column_importances(
    factors: Mapping[str, Factors],
) -> dict[str, Float[np.ndarray, "*stack r"]]:
    """`||u_b|| ||v_b||` of each allocated column, `|s_b|` included where there is
    one."""
    importances = {}
    for path, one in factors.items():
        left, right = linalg.column_norms(*one.arrays())
        product = np.asarray(left, np.float64) * np.asarray(right, np.float64)
        importances[path] = np.sqrt(product)
    return importances
