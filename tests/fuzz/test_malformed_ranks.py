"""Malformed ranks, rules and rank files: taken, or refused with one error of ours."""

import mutations
import optax
import saved_models
from flax import nnx
from hypothesis import strategies as st

from lowrank_jax import active, errors, factorization, selection, shrinking
from lowrank_jax.surgery import truncate

RANKS = {"again": 3, "conv": [0, 2], "first": 0, "half": 2}
RULES = [
    ["conv", {"rank_fraction": 0.5, "scheme": 0}],
    ["first", {"max_rank": 3, "with_s": True}],
    ["again|tied", {"form": "factored", "depth": 3, "init": "svd"}],
    ["ha.*", "full"],
    [".*", "dense"],
]
"""Of `saved_models.Net`, but for the last, which finds nothing left."""


@mutations.TIMES
def test_ranks_of_a_model(times):
    """To set, cut, shrink and choose; a model is left alone where they are refused."""
    model = saved_models.low_rank()
    active.set_ranks(model, saved_models.ACTIVE)
    optimizer = optax.sgd(0.1)
    before = active.get_ranks(model)

    def check(case: tuple[str, mutations.Edits]) -> None:
        what, edits = case
        wanted = mutations.changed(RANKS, edits)
        if what == "set":
            mutations.refused(lambda: active.set_ranks(model, wanted))
            active.set_ranks(model, before)
        elif what == "check":
            mutations.refused(lambda: active.check_ranks(model, wanted))
        elif what == "cut":
            mutations.refused(lambda: nnx.eval_shape(lambda: truncate(model, wanted)))
        elif what == "shrink":
            mutations.refused(lambda: shrinking.shrink(model, wanted, (), optimizer))
        else:
            mutations.refused(lambda: selection.ranks_for(model, ranks=wanted))
        assert active.get_ranks(model) == before

    whats = st.sampled_from(["set", "check", "cut", "shrink", "choose"])
    cases = st.tuples(whats, mutations.edits(RANKS))
    mutations.campaign(check, cases, 60 * times)


@mutations.TIMES
def test_rules_of_a_model(times):
    def check(edits: mutations.Edits) -> None:
        rules = mutations.changed(RULES, edits)
        dense = saved_models.Net(nnx.Rngs(0))

        def factorize() -> nnx.Module:
            with errors.at("rules"):  # messages name the layer, the caller the place
                return factorization.factorize(dense, rules, rngs=nnx.Rngs(0))

        mutations.refused(lambda: nnx.eval_shape(factorize))

    mutations.campaign(check, mutations.edits(RULES), 60 * times)
