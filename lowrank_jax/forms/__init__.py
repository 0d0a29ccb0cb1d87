"""The forms of a factored matrix: a file each, and a row of the table."""

from lowrank_jax.factors import Factors
from lowrank_jax.forms.gauge import GaugeCost, GaugeFactors

FORMS: dict[str, type[Factors]] = {kind.form: kind for kind in (Factors, GaugeFactors)}
"""Forms by the name that rules and `truncate` call them by."""

__all__ = ["FORMS", "GaugeCost", "GaugeFactors"]
