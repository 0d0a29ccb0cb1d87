"""Factors as NumPy arrays: random ones, and ones of a known spectrum."""

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = np.array([4.0, 3.0, 2.0, 1.0])


def columns(u, s, v) -> list[np.ndarray]:
    """Columns of `u diag(|s|)`, then the rows of `v`."""
    return [*(u if s is None else u * np.abs(s)).T, *v]


def product(u, s, v) -> np.ndarray:
    return (u if s is None else u * np.abs(s)) @ v


def spectrum(u, s, v) -> np.ndarray:
    return np.linalg.svd(product(u, s, v), compute_uv=False)


def arrays(
    seed: int, with_s: bool, stack: tuple[int, ...] = (), sizes=(4, 3, 2)
) -> dict[str, np.ndarray]:
    """Random `u (4, 3)`, `v (3, 2)` and `s`, float64."""
    random = np.random.default_rng(seed)
    in_size, rank, out_size = sizes
    shapes = {"u": (*stack, in_size, rank), "v": (*stack, rank, out_size)}
    if with_s:
        shapes["s"] = (*stack, rank)
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def matrices(parts: dict[str, np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """`u, s, v` of each matrix of a stack."""
    found = []
    for index in np.ndindex(parts["u"].shape[:-2]):
        s = parts["s"][index] if "s" in parts else None
        found.append((parts["u"][index], s, parts["v"][index]))
    return found


def single(layer) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.float32, layer)


def golden(size: int = 4) -> dict[str, jax.Array]:
    """Factors with the spectrum 4, 3, 2, 1 in `s` and random singular vectors."""
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.normal(size=(n, 4)))[0] for n in (size + 2, size))
    return single({"u": u, "s": GOLDEN * [1, -1, 1, -1], "v": v.T})


def balanced(parts) -> dict[str, jax.Array]:
    root = jnp.sqrt(jnp.abs(parts["s"]))
    return {"u": parts["u"] * root[None], "v": root[:, None] * parts["v"]}
