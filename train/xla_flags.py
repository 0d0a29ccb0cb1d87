"""Flags of XLA that binaries set, where the environment does not."""

import os

import jax

FUSION = "--xla_cpu_experimental_ynn_fusion_type"
"""Which products XLA fuses on CPUs by YNNPACK; without a value none."""


def leave_products_apart() -> None:
    """Has XLA fuse no products on CPUs, before jax 0.12; before the first array.

    Fused products of three matrices are wrong there for some shapes
    (`lowrank_jax.linalg.apart`), and gradients take longer (docs/LOG.md).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.__version_info__ < (0, 12) and FUSION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FUSION}=".strip()
