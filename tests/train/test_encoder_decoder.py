"""The translation model: packed rows, padding, decoding, costs, initial values."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error

from lowrank_jax import active, counting, factorization
from train.models import encoder_decoder
from train.models.encoder_decoder import positions_in
from train.state import split_model

VOCAB, LENGTH, DEPTH, WIDTH, MLP = 13, 8, 2, 8, 12
ONE_TOKEN = (jax.ShapeDtypeStruct((1, 1), jnp.int32),) * 4

# Two sentences, 3 -> 2 and 2 -> 4 tokens: packed into one row, and each in its own.
RANDOM = np.random.default_rng(0)
SOURCE = RANDOM.integers(3, VOCAB, (1, LENGTH)).astype(np.int32)
TARGET = RANDOM.integers(3, VOCAB, (1, LENGTH)).astype(np.int32)
SOURCE_SEGMENT = np.array([[1, 1, 1, 2, 2, 0, 0, 0]], np.uint8)
TARGET_SEGMENT = np.array([[1, 1, 2, 2, 2, 2, 0, 0]], np.uint8)
PACKED = (SOURCE, TARGET, SOURCE_SEGMENT, TARGET_SEGMENT)


def alone(tokens: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sentences of a packed row, one in a row, with their segments."""
    rows = np.zeros((2, LENGTH), np.int32)
    for number in (1, 2):
        sentence = tokens[segments == number]
        rows[number - 1, : len(sentence)] = sentence
    return rows, (rows > 0).astype(np.uint8)


(SOURCES, SOURCES_SEGMENT), (TARGETS, TARGETS_SEGMENT) = (
    alone(SOURCE, SOURCE_SEGMENT),
    alone(TARGET, TARGET_SEGMENT),
)
SINGLE = (SOURCES, TARGETS, SOURCES_SEGMENT, TARGETS_SEGMENT)


def build(**options) -> encoder_decoder.EncoderDecoder:
    sizes = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": 2, "mlp_dim": MLP}
    lengths = {"source_length": LENGTH, "target_length": LENGTH}
    return encoder_decoder.build(
        vocab_size=VOCAB, **lengths, rngs=nnx.Rngs(0), **{**sizes, **options}
    )


@functools.cache
def parts():
    """A factored model in evaluation mode."""

    @nnx.jit
    def make():
        model = build(dropout_rate=0.0)
        model.eval()
        return factorization.factorize(model)

    return nnx.split(make(), nnx.Param, ...)


def merged(params, ranks) -> encoder_decoder.EncoderDecoder:
    graphdef, _, rest = parts()
    model = nnx.merge(graphdef, params, rest, copy=True)
    active.set_ranks(model, ranks)
    return model


def ranks_at(rank: int) -> dict[str, jax.Array]:
    model = nnx.merge(*parts(), copy=True)
    most = active.max_ranks(model)
    return {path: jnp.int32(min(rank, limit)) for path, limit in most.items()}


@jax.jit
def full(params, ranks, *inputs):
    return merged(params, ranks)(*inputs)


@jax.jit
def decode(params, ranks, tokens, cache):
    return merged(params, ranks).decode(tokens, cache)


@jax.jit
def start(params, ranks, source, segment):
    return merged(params, ranks).start(source, segment)


@jax.jit
def losses(params, ranks, inputs):
    """The summed loss of all tokens that are no padding, and its gradient."""

    def loss(params):
        logits = merged(params, ranks)(*inputs)
        values = jnp.sin(logits).sum(-1)
        return jnp.sum(values * (inputs[3] > 0))

    return jax.value_and_grad(loss)(params)


def of_sentences(packed) -> tuple[np.ndarray, np.ndarray]:
    """What belongs to both sentences of the packed row."""
    return packed[TARGET_SEGMENT == 1], packed[TARGET_SEGMENT == 2]


@pytest.mark.parametrize("rank", [3, WIDTH])
def test_a_packed_sentence_has_the_logits_that_it_has_alone(rank):
    """Encoder, decoder and cross attention, gradients too; 1e-5."""
    _, params, _ = parts()
    ranks = ranks_at(rank)
    packed, single = full(params, ranks, *PACKED), full(params, ranks, *SINGLE)
    pairs = list(zip(of_sentences(packed), (single[0, :2], single[1, :4]), strict=True))
    assert max(relative_error(*pair) for pair in pairs) <= 1e-5
    packed, grads = losses(params, ranks, PACKED)
    single, expected = losses(params, ranks, SINGLE)
    assert relative_error(packed, single) <= 1e-5
    for pair in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        assert relative_error(*pair) <= 1e-5


@pytest.mark.parametrize("side", [2, 3], ids=["source", "target"])
def test_without_segments_sentences_mix(side):
    """The control of the test above: segments tell them apart, on both sides."""
    _, params, _ = parts()
    ranks = ranks_at(WIDTH)
    mixed = list(PACKED)
    mixed[side] = np.minimum(mixed[side], 1)
    pair = full(params, ranks, *PACKED), full(params, ranks, *mixed)
    assert relative_error(*(of_sentences(logits)[1] for logits in pair)) > 1e-2


def test_positions_restart_in_each_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [0] * 8])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [*range(8)]]
    assert positions_in(segments).tolist() == expected


def test_padding_counts_nothing():
    """What stands there changes nothing; a row of padding alone is finite."""
    _, params, _ = parts()
    ranks = ranks_at(WIDTH)
    others = [
        np.where(s == 0, 5, x) for x, s in zip(PACKED[:2], PACKED[2:], strict=True)
    ]
    before, after = (full(params, ranks, *x, *PACKED[2:]) for x in (PACKED[:2], others))
    for pair in zip(of_sentences(before), of_sentences(after), strict=True):
        np.testing.assert_array_equal(*pair)
    empty = [np.concatenate([x, np.zeros_like(x)]) for x in PACKED]
    assert np.isfinite(full(params, ranks, *empty)).all()
    value, grads = losses(params, ranks, tuple(empty))
    expected_value, expected = losses(params, ranks, PACKED)
    assert relative_error(value, expected_value) <= 1e-6
    for pair in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        assert relative_error(*pair) <= 1e-5


def test_a_later_token_changes_no_earlier_logits():
    _, params, _ = parts()
    ranks = ranks_at(WIDTH)
    changed = TARGET.copy()
    changed[:, 4] = 3 + (changed[:, 4] - 2) % (VOCAB - 3)
    before = full(params, ranks, *PACKED)
    after = full(params, ranks, SOURCE, changed, *PACKED[2:])
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before - after)[:, 4:6].max(-1).min() > 1e-4


@pytest.mark.parametrize("rank", [0, 3, WIDTH])
def test_decoding_with_a_cache_equals_the_whole_forward_pass(rank):
    """A prompt and then tokens, and token by token; 1e-5."""
    _, params, _ = parts()
    ranks = ranks_at(rank)
    target = np.tile(TARGET, (2, 1))
    target[1] = target[1, ::-1]
    expected = full(
        params, ranks, SOURCES, target, SOURCES_SEGMENT, np.ones_like(SOURCES_SEGMENT)
    )
    for lengths in ((3, 1, 1, 1, 1, 1), (1,) * LENGTH):
        cache = start(params, ranks, SOURCES, SOURCES_SEGMENT)
        logits, at = [], 0
        for length in lengths:
            tokens = target[:, at : at + length]
            new, cache = decode(params, ranks, tokens, cache)
            logits.append(new)
            at += length
        assert relative_error(jnp.concatenate(logits, 1), expected) <= 1e-5
    past, _ = decode(params, ranks, target[:, :1], cache)
    assert np.isnan(past).all()  # rather than numbers of an overwritten cache
    # Without the position it is another sentence (at rank 0 there is nothing in it).
    middle = cache._replace(position=jnp.int32(4))
    lost = cache._replace(position=jnp.int32(1))
    pair = (decode(params, ranks, target[:, :1], c)[0] for c in (middle, lost))
    if rank:
        assert relative_error(*pair) > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_costs_of_a_token_are_those_of_the_formula(tied):
    """One source and one target token."""

    def costs(block, feed_forward, head):
        """Of matrices: four of attention twice, thrice in all, and both up and down."""
        return DEPTH * (3 * 4 * block + 2 * 2 * feed_forward) + head

    fixed = DEPTH * (2 * (MLP + WIDTH) + 5 * 2 * WIDTH)  # biases and norms
    cost = counting.count(nnx.eval_shape(lambda: build(tied=tied)), *ONE_TOKEN)
    dense = costs(WIDTH**2, WIDTH * MLP, VOCAB * WIDTH)
    own_head = 0 if tied else VOCAB * WIDTH
    assert cost.dense_params == dense + own_head + fixed
    assert cost.dense_macs == dense
    low = nnx.eval_shape(lambda: factorization.factorize(build(tied=tied)))
    cost = counting.count(low, *ONE_TOKEN)
    ranks = {path: min(most, 2) for path, most in active.max_ranks(low).items()}
    small = costs(2 * 2 * WIDTH, 2 * (WIDTH + MLP), 2 * (VOCAB + WIDTH))
    own_head = 0 if tied else 2 * (VOCAB + WIDTH)
    assert cost.params(ranks) == small + own_head + fixed
    assert cost.macs(ranks) == small + 2 * 2 * WIDTH  # and two rows of the table


def test_published_size():
    """6 + 6 layers of width 512: 18.9 and 25.2 million parameters beside the table."""
    model = nnx.eval_shape(
        lambda: encoder_decoder.build(
            vocab_size=9521, source_length=64, target_length=64, rngs=nnx.Rngs(0)
        )
    )
    sizes = [math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == 18_902_016 + 25_199_616 + 9521 * 512


def test_initial_loss_is_that_of_chance():
    """Xavier for all matrices, the table too: logits start small."""
    vocab, width = 4000, 64
    tokens = np.random.default_rng(2).integers(0, vocab, (4, 17))
    ones = np.ones((4, 16), np.uint8)

    @jax.jit
    def run(tokens):
        model = build_wide(vocab, width)
        model.eval()
        logits = model(tokens[:, :-1], tokens[:, :-1], ones, ones)
        chosen = jax.nn.log_softmax(logits)
        table = model.embedding.embedding[...].std()
        return -jnp.take_along_axis(chosen, tokens[:, 1:, None], -1).mean(), table

    loss, deviation = run(tokens)
    assert abs(float(loss) - math.log(vocab)) < 0.1
    assert float(deviation) == pytest.approx(math.sqrt(2 / (vocab + width)), rel=0.02)


def build_wide(vocab: int, width: int) -> encoder_decoder.EncoderDecoder:
    return encoder_decoder.build(
        vocab_size=vocab,
        source_length=16,
        target_length=16,
        rngs=nnx.Rngs(0),
        depth=1,
        embed_dim=width,
        num_heads=2,
        mlp_dim=width,
    )


def test_the_training_step_can_take_it_apart():
    """Gradients in training mode; dropout moves; the state holds parameters alone."""
    structure, params, model_state = split_model(build(dropout_rate=0.5))
    assert not jax.tree.leaves(model_state)

    @jax.jit
    def step(params, key):
        def loss(params):
            return jnp.mean(structure.merge(params, model_state, key)(*PACKED) ** 2)

        return jax.value_and_grad(loss)(params)

    (first, grads), (second, _) = (step(params, jax.random.key(n)) for n in (0, 1))
    assert first != second
    for grad in jax.tree.leaves(grads):
        assert np.isfinite(grad).all() and np.any(grad)


def test_surgery_can_spare_the_embedding():
    rules = (("embedding", "dense"), (".*", "full"))
    model = nnx.eval_shape(lambda: factorization.factorize(build(), rules))
    assert len(active.max_ranks(model)) == DEPTH * (6 + 10)
    assert "embedding" in active.max_ranks(nnx.merge(*parts(), copy=True))


def test_more_tokens_than_fit():
    model = nnx.merge(*parts(), copy=True)

    def shapes(source: int, target: int):
        lengths = (source, target, source, target)
        return [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in lengths]

    for name, lengths in (("source_length", (9, 8)), ("target_length", (8, 9))):
        message = f"encoder_decoder: rows must have at most {name} = 8 tokens, got 9"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda *inputs: model(*inputs), *shapes(*lengths))


def test_reports_all_offenders():
    with pytest.raises(ValueError) as error:
        build(depth=0, embed_dim=9, mlp_dim=0, dropout_rate=-0.1)
    for place in ("depth", "embed_dim", "mlp_dim", "dropout_rate", "num_heads"):
        assert f"encoder_decoder: {place} must " in str(error.value)
