"""The normalization that follows convolutions, and the check of its options."""

from collections.abc import Sequence

from flax import nnx

from train.models.sizes import MOST_FEATURES

NORMS = ("batch", "group")


def make_norm(
    features: int, *, norm: str, groups: int, rngs: nnx.Rngs
) -> nnx.BatchNorm | nnx.GroupNorm:
    """Makes batch normalization, or group normalization of at most so many groups."""
    if norm == "batch":
        return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)
    groups = min(groups, features)
    return nnx.GroupNorm(features, num_groups=groups, epsilon=1e-5, rngs=rngs)


def problems(
    model: str, norm: str, groups: int, widths: Sequence[float], multiplier: float
) -> list[str]:
    """Lists what is wrong with these options of a model."""
    errors = []
    if norm not in NORMS:
        errors.append(
            f"{model}: norm must be one of {NORMS}, got {norm!r}. Choose one of them."
        )
    if not all(1 <= width <= MOST_FEATURES and width == int(width) for width in widths):
        errors.append(
            f"{model}: width_multiplier must give whole widths in "
            f"[1, {MOST_FEATURES:,}], got "
            f"{multiplier}, hence {sorted(set(widths))}. Choose another multiplier."
        )
    elif norm == "group" and (
        groups < 1 or any(width % min(groups, width) for width in widths)
    ):
        errors.append(
            f"{model}: groups must be at least 1 and divide every width above it, got "
            f"{groups} for the widths {sorted(set(widths))}. Choose another number."
        )
    return errors
