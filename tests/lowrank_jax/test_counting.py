"""Parameters and MACs of whole models: the literature's, by hand, and what XLA
reports."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lowrank_jax.active import get_ranks, max_ranks, set_ranks
from lowrank_jax.counting import count
from lowrank_jax.factorization import factorize
from lowrank_jax.surgery import truncate
from train.models import convnet, lenet, vit


def image(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def abstract(build, *args, **options) -> nnx.Module:
    """A model without numbers: counting needs none."""
    return nnx.eval_shape(lambda: build(*args, **options, rngs=nnx.Rngs(0)))


def factored(model: nnx.Module, *args) -> nnx.Module:
    return nnx.eval_shape(lambda model: factorize(model, *args), model)


MODELS = {
    "lenet": (lenet.build, {"image_shape": (28, 28, 1), "num_classes": 10}),
    "convnet": (
        convnet.build,
        {"image_shape": (9, 8, 3), "num_classes": 5, "widths": (4, 8)},
    ),
    "vit": (
        vit.build,
        {
            "image_shape": (8, 8, 3),
            "num_classes": 5,
            "embed_dim": 12,
            "depth": 2,
            "num_heads": 3,
            "mlp_dim": 20,
        },
    ),
}


def test_lenet_has_the_counts_of_the_literature():
    """methods.md section 1: dense, and factored at full rank, where nothing is
    merged."""
    model = factored(abstract(lenet.build, **MODELS["lenet"][1]))
    cost, ranks = count(model, image(28, 28, 1)), max_ranks(model)
    assert (cost.dense_params, cost.dense_macs) == (44_426, 281_640)
    params = sum(
        cost.layers[path].factored_params(rank) for path, rank in ranks.items()
    )
    macs = sum(cost.layers[path].factored_macs(rank) for path, rank in ranks.items())
    assert (cost.fixed_params + params, cost.fixed_macs + macs) == (66_274, 340_316)
    assert (cost.params(ranks), cost.macs(ranks)) == (44_426, 281_640)  # merged there


def test_vit_and_convnet_have_the_counts_of_their_formulas():
    """By hand: a ViT's tokens, a convnet's strides with padding counted."""
    cost = count(abstract(vit.build, **MODELS["vit"][1]), image(8, 8, 3))
    tokens, wide, block = 16, 12, 4 * 12 * 12 + 2 * 12 * 20
    assert cost.dense_macs == tokens * (12 * wide + 2 * block) + wide * 5
    biases = 2 * (4 * wide + 20 + wide + 2 * 2 * wide) + wide + 2 * wide + 5
    products = 12 * wide + 2 * block + wide * 5
    assert cost.dense_params == products + biases + tokens * wide
    cost = count(abstract(convnet.build, **MODELS["convnet"][1]), image(9, 8, 3))
    first, second = 9 * 3 * 4, 9 * 4 * 8
    assert cost.dense_macs == 72 * first + 5 * 4 * second + 8 * 5
    assert cost.dense_params == first + second + 2 * (4 + 8) + 8 * 5 + 5


@pytest.mark.parametrize("name", MODELS)
def test_a_factored_model_knows_its_dense_twins_counts(name):
    """Whatever part of it is factored, and whatever it was cut to."""
    build, options = MODELS[name]
    model, example = abstract(build, **options), image(*options["image_shape"])
    dense = count(model, example)
    assert not dense.layers
    assert dense.params({}) == dense.dense_params == dense.fixed_params
    assert dense.macs({}) == dense.dense_macs == dense.fixed_macs
    for rules in (
        [(".*", "full")],
        [(".*(1|up|conv)", {"max_rank": 2}), (".*", "dense")],
    ):
        model_low = factored(model, rules)
        cost = count(model_low, example)
        assert (cost.dense_params, cost.dense_macs) == (
            dense.params({}),
            dense.macs({}),
        )
        ranks = max_ranks(model_low)
        one = {path: 1 for path in ranks}
        small = sum(c.in_size + c.out_size for c in cost.layers.values())
        assert cost.params(one) <= cost.fixed_params + small
        assert cost.params(dict.fromkeys(ranks, 0)) == cost.fixed_params
        assert cost.macs(dict.fromkeys(ranks, 0)) == cost.fixed_macs
        assert cost.params(one) <= cost.params(ranks) <= cost.dense_params
        assert cost.macs(one) <= cost.macs(ranks) <= cost.dense_macs


def test_counts_are_those_of_the_arrays_after_the_cut():
    """The parameters of a truncated model are the sizes of its arrays."""
    model = factored(abstract(lenet.build, **MODELS["lenet"][1]))
    cost, ranks = count(model, image(28, 28, 1)), {p: 2 for p in max_ranks(model)}
    small = nnx.eval_shape(lambda model: truncate(model, ranks), model)
    sizes = sum(x.size for x in jax.tree.leaves(nnx.state(small, nnx.Param)))
    assert cost.params(ranks) == sizes
    assert count(small, image(28, 28, 1)).params(ranks) == sizes
    assert count(small, image(28, 28, 1)).macs(ranks) == cost.macs(ranks)


class Tied(nnx.Module):
    """A table that is also the head, a layer that runs twice, a kernel in two
    layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(11, 6, rngs=rngs)
        self.twice = nnx.Linear(6, 6, rngs=rngs)
        self.again = self.twice
        self.one = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        self.other = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        self.other.kernel = self.one.kernel

    def __call__(self, words):
        hidden = self.again(self.twice(self.table(words)))
        return self.table.attend(self.other(self.one(hidden)))


def test_shared_weights_count_once_in_parameters_and_each_call_in_macs():
    """Looking a row up is free when dense, and `rank * features` when factored."""
    words = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    model = abstract(Tied)
    dense, low = count(model, words), factored(model)
    assert dense.dense_params == 11 * 6 + 6 * 6 + 6 + 6 * 6
    assert dense.dense_macs == 5 * (4 * 6 * 6 + 11 * 6)
    cost = count(low, words)
    assert set(cost.layers) == {"again", "one", "table"} == set(max_ranks(low))
    assert (cost.dense_params, cost.dense_macs) == (dense.params({}), dense.macs({}))
    ranks = {"again": 1, "one": 2, "table": 2}
    assert cost.macs(ranks) == 5 * (2 * 2 * 12 + 2 * 12 + 2 * (6 + 11 + 6))
    assert cost.params(ranks) == 2 * 12 + 12 + 6 + 2 * 17


class Block(nnx.Module):
    """Attention and a perceptron."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, tokens):
        return self.down(self.up(tokens + self.attention(tokens)))


class Scanned(nnx.Module):
    """Blocks stacked by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs, layers: int):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def build(rngs):
            return Block(rngs)

        self.blocks = build(rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, tokens):
            return block(tokens)

        return run(self.blocks, tokens)


@pytest.mark.parametrize("layers", [1, 3])
def test_stacked_layers_count_as_often_as_they_are_stacked(layers):
    """As many blocks one after the other, dense and at a rank for each layer."""
    tokens = image(5, 4)
    one = count(abstract(Block), tokens)
    model = abstract(Scanned, layers=layers)
    for stacked in (count(model, tokens), count(factored(model), tokens)):
        assert stacked.dense_params == layers * one.dense_params
        assert stacked.dense_macs == layers * one.dense_macs
    cost = count(factored(model), tokens)
    ranks = {path: list(range(layers)) for path in cost.layers}
    total = sum(range(layers))
    assert cost.macs(ranks) == 5 * total * (4 * 8 + 2 * 10)
    biases = layers * (4 * 4 + 6 + 4)
    assert cost.params(ranks) == total * (4 * 8 + 2 * 10) + biases


def test_spatial_scheme_has_the_formula_of_the_literature():
    """methods.md 0.1, scheme 2: Ho (s Wo)(k c j) + Ho Wo (k j f), with stride 2."""
    conv = abstract(nnx.Conv, 3, 8, (5, 5), 2)
    model = factored(conv, [(".*", {"max_rank": 4, "scheme": 2})])
    cost = count(model, image(16, 12, 3)).layers[""]
    high, wide, k, c, f, j, s = 8, 6, 5, 3, 8, 4, 2
    expected = high * (s * wide) * (k * c * j) + high * wide * (k * j * f)
    assert cost.factored_macs(4) == expected
    assert cost.dense_macs == high * wide * k * k * c * f
    assert cost.factored_params(4) == 4 * (k * c + k * f)
    plain = count(factored(conv), image(16, 12, 3)).layers[""]  # scheme 0
    assert plain.factored_macs(4) == high * wide * (k * k * c * j + j * f)


class Plain(nnx.Module):
    """Convolutions without padding and products: no bias, no mask, no nonlinearity."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), padding="VALID", use_bias=False, rngs=rngs)
        self.strided = nnx.Conv(
            8, 8, (2, 3), 2, padding="VALID", use_bias=False, rngs=rngs
        )
        self.grouped = nnx.Conv(
            8,
            8,
            (1, 2),
            padding="VALID",
            feature_group_count=2,
            use_bias=False,
            rngs=rngs,
        )
        self.head = nnx.Linear(8 * 3 * 2, 20, use_bias=False, rngs=rngs)

    def __call__(self, images):
        features = self.grouped(self.strided(self.conv(images)))
        return self.head(features.reshape(len(features), -1))


def flops(model: nnx.Module, example) -> float:
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, inputs: nnx.merge(graph, state)(inputs))
    return run.lower(state, example).compile().cost_analysis()["flops"]


def test_xla_reports_the_same():
    """(8) Twice the MACs, dense exactly; factored up to masks, which XLA counts."""
    model, example = abstract(Plain), image(8, 9, 3)
    dense = count(model, example)
    assert flops(model, example) == 2 * dense.dense_macs
    ranks = {"conv": 2, "strided": 2, "grouped": [1, 1], "head": 2}
    low = nnx.eval_shape(lambda model: truncate(factorize(model), ranks), model)
    cost = count(low, example)
    assert cost.macs(ranks) < cost.dense_macs
    reported = flops(low, example)
    masks = sum(x.size for x in jax.tree.leaves(nnx.state(low, nnx.Param)))
    assert 2 * cost.macs(ranks) <= reported <= 2 * cost.macs(ranks) + 2 * masks


def test_counting_runs_and_changes_nothing():
    """The model stays as it was; layers that never run cost parameters, no MACs."""

    class Idle(nnx.Module):
        def __init__(self, rngs):
            self.used = nnx.Linear(4, 3, rngs=rngs)
            self.idle = nnx.Linear(4, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, inputs, *, scale):
            return self.dropout(self.used(inputs)) * scale

    model = Idle(nnx.Rngs(0))
    graph = nnx.graphdef(model)
    cost = count(model, image(4), forward=lambda model, x: model(x, scale=2))
    assert (cost.dense_params, cost.dense_macs) == (30, 12)
    assert nnx.graphdef(model) == graph and type(model.used) is nnx.Linear
    low = count(factorize(model), image(4), forward=lambda m, x: m(x, scale=2))
    assert (low.dense_params, low.dense_macs) == (30, 12)
    assert low.macs({"used": 1, "idle": 1}) == 7


def test_a_lookup_has_parameters_and_macs_of_one_form():
    """Merged where that has fewer parameters, and then free; else `r * features`."""
    model = factored(abstract(nnx.Embed, 11, 6))
    cost = count(model, jax.ShapeDtypeStruct((1, 5), jnp.int32))
    pairs = [(cost.params({"": rank}), cost.macs({"": rank})) for rank in range(5)]
    factored_pairs = [(17 * rank, 5 * rank * 6) for rank in range(4)]
    assert pairs == [*factored_pairs, (66, 0)]


def test_a_transposed_convolution_counts_the_positions_of_its_input():
    """Zeros between them are not multiplied, in the first of two nor in the second."""
    conv = abstract(nnx.ConvTranspose, 8, 3, (4, 2), (2, 3))
    inputs, between = 5 * 6, {0: 10 * 18, 1: 5 * 18, 2: 10 * 6, 3: 5 * 6}
    assert count(conv, image(5, 6, 8)).dense_macs == inputs * 4 * 2 * 8 * 3
    for scheme, (first, second) in enumerate(
        [(4 * 2 * 8, 3), (2 * 8, 4 * 3), (4 * 8, 2 * 3), (8, 4 * 2 * 3)]
    ):
        model = factored(conv, [(".*", {"max_rank": 2, "scheme": scheme})])
        cost = count(model, image(5, 6, 8)).layers[""]
        expected = inputs * first + between[scheme] * second
        assert (cost.factored_macs(1), cost.factored_params(1)) == (
            expected,
            first + second,
        )


def test_what_the_count_cannot_see_is_named():
    """A matrix of the module's own, and a kernel with a mask; positions are added."""

    class Own(nnx.Module):
        def __init__(self, rngs):
            self.mixer = nnx.Param(jnp.ones((4, 5)))
            self.position = nnx.Param(jnp.ones((3, 4)))
            self.masked = nnx.Conv(
                5, 2, (1,), mask=jnp.ones((1, 5, 2)), use_bias=False, rngs=rngs
            )

        def __call__(self, inputs):
            return self.masked((inputs + self.position[None]) @ self.mixer)

    cost = count(abstract(Own), image(3, 4))
    assert cost.unseen == {"mixer": 20, "masked": 10}
    assert (cost.dense_params, cost.dense_macs) == (20 + 12 + 10, 0)


@pytest.mark.parametrize(
    "ranks",
    [{"conv": [2, 2], "head": 3}, {"conv": [1, 2], "head": 2}, {"conv": 0, "head": 0}],
    ids=["masked", "masked, different in a stack", "masked to nothing"],
)
def test_a_masked_model_costs_what_its_cut_costs(ranks):
    """Costs speak of the active ranks, whatever is allocated."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.conv = nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=rngs)
            self.head = nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, images):
            return self.head(self.conv(images).mean(axis=(1, 2)))

    model = factorize(Net(nnx.Rngs(0)))
    set_ranks(model, ranks)
    costs = [count(m, image(5, 5, 4)) for m in (model, truncate(model, ranks))]
    masked, cut = (
        (cost.params(get_ranks(model)), cost.macs(get_ranks(model))) for cost in costs
    )
    full = costs[0].params(max_ranks(model)), costs[0].macs(max_ranks(model))
    assert masked == cut and masked < full
