"""Rules: what they leave dense is named, and wrong ones are refused."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from foreign_models import Bare

from lowrank_jax.errors import UserError
from lowrank_jax.factorization import DenseWarning, factorize
from lowrank_jax.paths import find_factors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*value' access:DeprecationWarning"),
    pytest.mark.usefixtures("registered"),
]


def test_what_stays_dense_is_named_in_one_warning():
    """With its share of the parameters; a position table and norms are no matrices."""
    model = Bare(nnx.Rngs(0))
    total = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    with pytest.warns(DenseWarning) as caught:
        low = factorize(model)
    (warning,) = caught
    message = str(warning.message)
    for path, size in (("again", 25), ("mixers/0", 25), ("projection", 30)):
        assert f"{path} ({size / total:.1%})" in message
    assert f"{80 / total:.1%} of the parameters" in message
    assert "position" not in message and set(find_factors(low)) == {"body"}
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "rules",
    [
        [("body", "full"), (".*", "dense")],
        [("projection|mixers/.", "dense"), (".*", "full")],
        [("projection", {"param": True}), ("mixers/.", "dense"), (".*", "full")],
    ],
    ids=["all the rest", "by name", "some"],
)
def test_a_rule_that_says_dense_is_silent(rules):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseWarning)
        low = factorize(Bare(nnx.Rngs(0)), rules)
    named = {"projection"} & {pattern for pattern, rule in rules if "param" in rule}
    assert set(find_factors(low)) == {"body"} | named


WRONG = {
    "a layer": ([("body", {"param": True}), (".*", "full")], "body: param: true is"),
    "everything": ([(".*", {"param": True})], "body: param: true is for a matrix"),
    "not for Params": ([("projection", {"param": False}), (".*", "full")], "got False"),
    "scheme": (
        [("projection", {"param": True, "scheme": 1}), (".*", "dense")],
        "projection: scheme is for convolutions",
    ),
    "positions": (
        [("position_embedding", {"param": True}), (".*", "full")],
        "no match for",
    ),
    "without param": ([("projection", {"max_rank": 2}), (".*", "full")], "no match fo"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_for_params_are_refused(case):
    rules, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        factorize(Bare(nnx.Rngs(0)), rules)


PAIRS = {
    "three": [(".*", "full", 1)],
    "one": [(".*",)],
    "text": ["ab"],
    "no pattern": [(3, "full")],
    "a mapping": {".*": "full"},
}


@pytest.mark.parametrize("case", PAIRS)
def test_rules_that_are_no_pairs_are_refused(case):
    with pytest.raises(UserError, match="rules: must be pairs of a pattern .*, got"):
        factorize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), PAIRS[case])


@pytest.mark.parametrize(
    ("model", "rule", "message"),
    [
        (nnx.Linear, {"max_rank": -1}, "^the model itself: max_rank must be a whole"),
        (nnx.Linear, 3, "^the model itself: a rule must be 'dense', 'full' or a map"),
    ],
)
def test_a_model_that_is_a_layer_is_named_so(model, rule, message):
    with pytest.raises(UserError, match=message):
        factorize(model(4, 3, rngs=nnx.Rngs(0)), [(".*", rule)])


def test_a_model_without_layers_is_told_what_is_known():
    """The types of the table, those of the model, and its matrices."""

    class Own(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones((3, 4)))

    with pytest.raises(UserError) as error:
        factorize(nnx.Sequential(Own()))
    for part in ("ConvTranspose", "Linear", "Own", "Sequential", "layers/0/weight"):
        assert part in str(error.value)
