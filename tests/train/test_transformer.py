"""The language model: decoding, scanned blocks, causality, costs, initial values."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from reference import relative_error

from lowrank_jax import active, counting, factorization
from train.models import transformer
from train.state import split_model

VOCAB, CONTEXT, DEPTH, WIDTH, MLP = 11, 8, 2, 8, 12
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 7)).astype(np.int32)
ONE_TOKEN = jax.ShapeDtypeStruct((1, 1), jnp.int32)
KINDS = list(itertools.product(transformer.POSITIONS, (False, True)))


def build(**options) -> transformer.Transformer:
    sizes = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": 2, "mlp_dim": MLP}
    return transformer.build(
        vocab_size=VOCAB, context=CONTEXT, rngs=nnx.Rngs(0), **{**sizes, **options}
    )


@functools.cache
def parts(low_rank: bool, positions: str, scan: bool):
    """A model in evaluation mode with parameters large enough that all of it counts."""

    @nnx.jit
    def make():
        model = build(positions=positions, scan=scan)
        _, params = nnx.split(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p: 15 * p if p.ndim > 1 else p, params))
        model.eval()
        return factorization.factorize(model) if low_rank else model

    return nnx.split(make(), nnx.Param, ...)


def ranks_at(model: nnx.Module, rank: int) -> dict[str, jax.Array]:
    """The rank, one more in each further layer, where there is as much."""
    ranks = {}
    for path, most in active.max_ranks(model).items():
        layer = np.arange(DEPTH) if np.ndim(most) else int(path.startswith("blocks/1"))
        wanted = rank + layer
        ranks[path] = jnp.asarray(np.minimum(most, wanted), jnp.int32)
    return ranks


def at(low_rank: bool, positions: str, scan: bool):
    """`full(params, ranks, tokens)` and `decode(params, ranks, tokens, cache)`."""
    graphdef, params, rest = parts(low_rank, positions, scan)
    model = nnx.merge(graphdef, params, rest, copy=True)

    def merged(params, ranks):
        model = nnx.merge(graphdef, params, rest, copy=True)
        active.set_ranks(model, ranks)
        return model

    @jax.jit
    def full(params, ranks, tokens):
        return merged(params, ranks)(tokens)

    @jax.jit
    def decode(params, ranks, tokens, cache):
        return merged(params, ranks).decode(tokens, cache)

    return model, params, full, decode


@pytest.mark.parametrize(("positions", "scan"), KINDS)
def test_decoding_with_a_cache_equals_the_whole_forward_pass(positions, scan):
    """A prompt and then tokens, and token by token, at several ranks; 1e-5."""
    model, params, full, decode = at(True, positions, scan)
    for rank in (0, 3, WIDTH):
        ranks = ranks_at(model, rank)
        expected = full(params, ranks, TOKENS)
        for lengths in ((3, 1, 1, 1, 1), (1,) * 7):
            cache, logits, start = model.init_cache(len(TOKENS)), [], 0
            for length in lengths:
                tokens = TOKENS[:, start : start + length]
                new, cache = decode(params, ranks, tokens, cache)
                logits.append(new)
                start += length
            assert relative_error(jnp.concatenate(logits, 1), expected) <= 1e-5
            assert int(cache.position) == 7
    # Two lengths, two compilations: neither ranks nor positions make another.
    assert decode._cache_size() == 2
    # Without the position in the cache it is another sentence.
    lost = cache._replace(position=cache.position * 0 + 2)
    wrong, _ = decode(params, ranks, TOKENS[:, :1], lost)
    right, _ = decode(params, ranks, TOKENS[:, :1], cache)
    assert relative_error(wrong, right) > 1e-2


def macs_of(jaxpr) -> int:
    """The MACs of all matrix products of a program."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            total += macs_of(inner)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = math.prod(shape[axis] for axis in contracted)
            total += summed * equation.outvars[0].aval.size
    return total


def test_decoding_one_token_runs_one_token():
    """Matrix products of one token, and one row of attention over the context."""
    graphdef, params, rest = parts(False, "learned", False)
    model = nnx.merge(graphdef, params, rest, copy=True)
    linear = counting.count(model, ONE_TOKEN).dense_macs
    program = jax.make_jaxpr(lambda t, cache: model.decode(t, cache))
    one = macs_of(program(TOKENS[:1, :1], model.init_cache(1)).jaxpr)
    assert one == linear + DEPTH * 2 * CONTEXT * WIDTH
    whole = macs_of(jax.make_jaxpr(lambda t: model(t))(TOKENS[:1]).jaxpr)
    assert whole == 7 * linear + DEPTH * 2 * 7 * 7 * WIDTH


def stacked(unrolled):
    """The parameters (or gradients) of unrolled blocks as those of scanned ones."""
    layers = [unrolled["blocks"][index] for index in range(DEPTH)]
    blocks = jax.tree.map(lambda *p: jnp.stack(p), *layers)
    return nnx.State({**unrolled, "blocks": blocks})


@pytest.mark.parametrize("low_rank", [False, True], ids=["dense", "low-rank"])
@pytest.mark.parametrize("positions", transformer.POSITIONS)
def test_a_scanned_model_equals_the_unrolled_one(positions, low_rank):
    """Logits and gradients with the same parameters, at every rank; 1e-5."""
    results = {}
    _, shared, _ = parts(low_rank, positions, False)
    shared = nnx.as_pure(shared)
    for scan in (False, True):
        model, _, full, _ = at(low_rank, positions, scan)
        params = stacked(shared) if scan else shared

        @jax.jit
        def both(params, ranks, full=full):
            def loss(params):
                logits = full(params, ranks, TOKENS)
                return jnp.sum(jnp.sin(logits)), logits

            return jax.grad(loss, has_aux=True)(params)

        for rank in range(WIDTH + 1) if low_rank else (0,):
            grads, logits = both(params, ranks_at(model, rank))
            results[scan, rank] = logits, grads if scan else stacked(grads)
    for (scan, rank), (logits, grads) in results.items():
        if scan:
            expected, expected_grads = results[False, rank]
            assert relative_error(logits, expected) <= 1e-5
            assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
            for pair in zip(
                *map(jax.tree.leaves, (grads, expected_grads)), strict=True
            ):
                assert relative_error(*pair) <= 1e-5
    if low_rank:  # the ranks act
        assert relative_error(results[True, 2][0], results[True, 4][0]) > 1e-2


def test_a_scanned_model_starts_and_drops_as_the_unrolled_one():
    """The same seed gives the same numbers: a mask of its own in each layer."""

    @nnx.jit
    def outputs():
        models = [build(dropout_rate=0.5, scan=scan) for scan in (False, True)]
        models[0].train()
        return models, [[model(TOKENS), model(TOKENS)] for model in models]

    models, (unrolled, scanned) = outputs()
    for pair in zip(unrolled, scanned, strict=True):
        assert relative_error(*pair) <= 1e-5
    assert relative_error(*scanned) > 1e-2  # a second call drops others
    keys = jax.random.key_data(models[1].blocks.dropout.rngs.key[...])
    assert len(np.unique(keys, axis=0)) == DEPTH
    expected = stacked(nnx.as_pure(nnx.state(models[0], nnx.Param)))
    given = nnx.as_pure(nnx.state(models[1], nnx.Param))
    assert jax.tree.all(jax.tree.map(np.array_equal, given, expected))


def test_a_later_token_changes_no_earlier_logits():
    model, params, full, _ = at(True, "learned", False)
    ranks = ranks_at(model, WIDTH)
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    before, after = (full(params, ranks, tokens) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after)[:, 5:].max(-1) > 1e-3).all()


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, CONTEXT * WIDTH),
        ({"scan": True, "positions": "rotary"}, 0),
        ({"scan": True, "depth": 1, "positions": "rotary"}, 0),
        ({"tied": False, "use_bias": True}, (CONTEXT + VOCAB) * WIDTH),
    ],
    ids=["tied", "scanned", "one scanned", "untied"],
)
def test_costs_of_a_token_are_those_of_the_formula(options, extra):
    depth = options.get("depth", DEPTH)
    model = nnx.eval_shape(lambda: build(**options))
    cost = counting.count(model, ONE_TOKEN)
    norms = WIDTH * (2 * depth + 1)
    biases = norms + depth * (4 * WIDTH + MLP + WIDTH)
    fixed = norms + (biases if options.get("use_bias") else 0)
    block = 4 * WIDTH**2 + 2 * WIDTH * MLP
    params = VOCAB * WIDTH + depth * block + extra + fixed
    assert cost.dense_params == params
    assert cost.dense_macs == depth * block + VOCAB * WIDTH
    # At rank 2 a matrix (m, n) costs 2 (m + n), and a row of a factored table 2 n.
    low = nnx.eval_shape(lambda: factorization.factorize(build(**options)))
    cost = counting.count(low, ONE_TOKEN)
    ranks = {
        path: np.minimum(most, 2).tolist()
        for path, most in active.max_ranks(low).items()
    }
    block = 2 * (4 * 2 * WIDTH + 2 * (WIDTH + MLP))
    head = 2 * (VOCAB + WIDTH)
    own_head = not options.get("tied", True)
    added = fixed + (0 if "positions" in options else CONTEXT * WIDTH)
    assert cost.params(ranks) == depth * block + head * (1 + own_head) + added
    assert cost.macs(ranks) == depth * block + head + 2 * WIDTH


def test_initial_values_are_those_of_gpt2():
    """Normal with deviation 0.02, less at the end of a branch: loss log(vocab)."""
    model = nnx.jit(
        lambda: transformer.build(vocab_size=65, context=64, rngs=nnx.Rngs(1))
    )()
    tokens = np.random.default_rng(1).integers(0, 65, (4, 65))
    logits = jax.jit(lambda tokens: model(tokens))(tokens[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
    assert abs(float(-chosen.mean()) - math.log(65)) < 0.05
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "scale":
            assert (param[...] == 1).all()
            continue
        ends = path[-2] in ("out", "down")
        expected = 0.02 / math.sqrt(2 * 4) if ends else 0.02
        assert float(param[...].std()) == pytest.approx(expected, rel=0.05), path


def test_surgery_reaches_everything():
    model = nnx.eval_shape(build)
    everything = active.max_ranks(factorization.factorize(model))
    rules = (("embedding", "dense"), (".*", "full"))
    rest = active.max_ranks(factorization.factorize(model, rules))
    assert everything.keys() - rest.keys() == {"embedding"}
    assert len(rest) == DEPTH * 6


@pytest.mark.parametrize("scan", [False, True])
def test_the_training_step_can_take_it_apart(scan):
    """Gradients in training mode; the state holds parameters and nothing else."""
    structure, params, model_state = split_model(build(scan=scan, dropout_rate=0.5))
    assert not jax.tree.leaves(model_state)

    @jax.jit
    def step(params, key):
        def loss(params):
            return jnp.mean(structure.merge(params, model_state, key)(TOKENS) ** 2)

        return jax.value_and_grad(loss)(params)

    (first, grads), (second, _) = (step(params, jax.random.key(n)) for n in (0, 1))
    assert first != second
    for grad in jax.tree.leaves(grads):
        assert np.isfinite(grad).all() and np.any(grad)


def test_bfloat16_parameters_give_float32_logits():
    @nnx.jit
    def run():
        model = build(scan=True)
        _, params = nnx.split(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
        return model(TOKENS), model.decode(TOKENS, model.init_cache(2))

    logits, (decoded, cache) = run()
    assert logits.dtype == decoded.dtype == jnp.float32
    assert cache.memory.keys.dtype == jnp.bfloat16


def test_more_tokens_than_the_context():
    model, params, _, decode = at(True, "learned", False)
    message = "transformer: rows must have at most context = 8 tokens, got 9. Cut them"
    tokens = jax.ShapeDtypeStruct((1, 9), jnp.int32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda tokens: model(tokens), tokens)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda t: model.decode(t, model.init_cache(1)), tokens)
    cache = model.init_cache(2)
    ranks = ranks_at(model, WIDTH)
    last = cache._replace(position=cache.position + CONTEXT - 1)
    logits, past = decode(params, ranks, TOKENS[:, :1], last)
    assert np.isfinite(logits).all()
    logits, _ = decode(params, ranks, TOKENS[:, :1], past)
    assert np.isnan(logits).all()  # rather than numbers of an overwritten cache


def test_reports_all_offenders():
    with pytest.raises(ValueError) as error:
        build(depth=0, num_heads=3, mlp_dim=-1, dropout_rate=1.0, positions="absolute")
    for place in ("depth", "num_heads", "mlp_dim", "dropout_rate", "positions"):
        assert f"transformer: {place} must " in str(error.value)
    with pytest.raises(ValueError, match="rotary positions must have heads of an even"):
        build(embed_dim=6, positions="rotary")
