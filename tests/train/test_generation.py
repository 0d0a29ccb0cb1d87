"""Text written with a cache: the tokens that the whole forward would choose."""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from messages import check_form

from lowrank_jax import active, factorization
from lowrank_jax.errors import UserError
from train.data import tokenizers
from train.generation import MOST_ROWS, generate
from train.models import transformer
from train.tasks.base import Generation
from train.tasks.language_model import language_model

CONTEXT, LETTERS = 8, "abcdefghij"
TOKENIZER = tokenizers.characters([LETTERS])
FACTS = {
    "arrays": {"tokens": {"shape": [CONTEXT + 1], "dtype": "uint8"}},
    "vocab_size": TOKENIZER.size,
    "tokenizer": TOKENIZER.to_facts(),
}
TASK = language_model(FACTS)


# A model whose text is known: every letter is followed by the next one.


class Cache(NamedTuple):
    """How many tokens there were."""

    position: jax.Array


class Alphabet(nnx.Module):
    """Goes on with the alphabet, and notes how often it is run."""

    def __init__(self, steps: list[int]):
        self.note = steps.append

    def init_cache(self, batch: int) -> Cache:
        return Cache(jnp.int32(0))

    def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        length = tokens.shape[1]
        jax.debug.callback(lambda: self.note(length))
        logits = jax.nn.one_hot((tokens + 1) % len(LETTERS), len(LETTERS))
        return logits, Cache(cache.position + length)


def following(prompt: str, count: int) -> str:
    """The alphabet from the letter after the prompt on, round and round."""
    first = LETTERS.index(prompt[-1]) + 1
    return "".join(LETTERS[(first + n) % len(LETTERS)] for n in range(count))


def test_every_prompt_has_its_own_text():
    """Of any length, more than fit into a batch, and on beyond the context."""
    prompts = ["a", "abc", "j", "cba"] + [LETTERS[n % 10] for n in range(MOST_ROWS)]
    texts = generate(Alphabet([]), TASK.generation, prompts, max_tokens=20)
    assert texts == [following(prompt, 20) for prompt in prompts]


def test_a_text_ends_at_the_stop_token():
    """Each at its own, which is no part of it; the batch when the last one has."""
    steps: list[int] = []
    generation = TASK.generation._replace(stop=LETTERS.index("e"))
    prompts = ["a", "d", "f", "c"]
    texts = generate(Alphabet(steps), generation, prompts, max_tokens=100)
    assert texts == ["bcd", "", "ghijabcd", "d"]
    jax.effects_barrier()
    # "f" has 9 tokens with its stop: 8 of a cache, one after half of it is read anew
    assert Counter(steps) == {1: 8, CONTEXT // 2: 1}
    generate(Alphabet(steps), generation, ["a", "d"], max_tokens=100)
    jax.effects_barrier()
    assert Counter(steps) == {1: 8 + 4, CONTEXT // 2: 1}


@pytest.mark.parametrize("count", [1, 5, CONTEXT, CONTEXT + 1, 3 * CONTEXT])
def test_a_text_has_at_most_so_many_tokens(count):
    (text,) = generate(Alphabet([]), TASK.generation, ["ab"], max_tokens=count)
    assert text == following("ab", count)


def test_without_a_way_on_a_text_ends_with_its_cache():
    """The token after the last that fits is still known."""
    generation = TASK.generation._replace(extend=None)
    texts = generate(Alphabet([]), generation, ["c", "abc"], max_tokens=100)
    assert texts == [following("c", CONTEXT), following("c", CONTEXT - 2)]


# A transformer.


def counted(generation: Generation) -> tuple[Generation, Counter]:
    """The same, which counts how often its loop is traced, by the shape of prompts."""
    traces: Counter = Counter()

    def begin(model: nnx.Module, arrays: Any) -> Any:
        traces[arrays["tokens"].shape] += 1
        return generation.begin(model, arrays)

    return generation._replace(begin=begin), traces


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    """One with low-rank layers, and large enough numbers for its choices to be
    clear."""
    sizes = {"depth": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 16}
    built = transformer.build(
        **TASK.model_args, **sizes, dropout_rate=0.5, rngs=nnx.Rngs(0)
    )
    for n, param in enumerate(jax.tree.leaves(nnx.state(built, nnx.Param), _is_param)):
        key = jax.random.fold_in(jax.random.key(1), n)
        param.set_value(0.7 * jax.random.normal(key, param.shape))
    return factorization.factorize(built, [(".*", "full")], rngs=nnx.Rngs(2))


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Param)


def logits_after(model: nnx.Module, windows: list[list[int]]) -> np.ndarray:
    """Of the token after each window, without a cache."""
    model = nnx.clone(model)
    model.eval()
    tokens = np.zeros((len(windows), CONTEXT), np.int32)
    for row, window in zip(tokens, windows, strict=True):
        row[: len(window)] = window
    ends = [len(window) - 1 for window in windows]
    return np.asarray(_forward(*nnx.split(model), tokens))[range(len(ends)), ends]


@jax.jit(static_argnums=0)
def _forward(graphdef: Any, state: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(tokens)


def greedy(model: nnx.Module, prompts: list[str], count: int) -> list[str]:
    """Token by token with the whole forward; half of a full window is kept."""
    windows = [TOKENIZER.encode(prompt).tolist() for prompt in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    for _ in range(count):
        chosen = logits_after(model, windows).argmax(axis=-1).tolist()
        for text, window, token in zip(texts, windows, chosen, strict=True):
            text.append(token)
            window.append(token)
            if len(window) > CONTEXT:
                window[:] = window[-(CONTEXT // 2) :]
    return [TOKENIZER.decode(text) for text in texts]


def test_greedy_text_is_that_of_the_whole_forward(model):
    """At any ranks, beyond the context, with one compilation for all ranks."""
    generation, traces = counted(TASK.generation)
    prompts, full = ["abcd", "jgca"], active.get_ranks(model)
    seen = set()
    for fraction in (1.0, 0.5, 0.2):
        ranks = {path: max(1, int(fraction * rank)) for path, rank in full.items()}
        with active.at_ranks(model, ranks):
            texts = generate(model, generation, prompts, max_tokens=12)
            assert texts == greedy(model, prompts, 12)
        seen.add(tuple(texts))
    assert len(seen) == 3
    assert traces == {(2, 4): 1}
    assert active.get_ranks(model) == full


def test_what_is_drawn_is_a_function_of_key_and_place(model):
    """Neither of the other prompts nor of how many tokens are asked for; the loop is
    compiled once."""
    generation, traces = counted(TASK.generation)

    def draw(seed: int, prompts: list[str], count: int = 6) -> list[str]:
        key, how = jax.random.key(seed), {"temperature": 2.0, "top_k": 3}
        return generate(model, generation, prompts, max_tokens=count, key=key, **how)

    first = draw(0, ["abcd"] * 4)
    assert draw(0, ["abcd"] * 4) == first
    assert draw(1, ["abcd"] * 4) != first
    assert len(set(first)) > 1
    others = draw(0, ["abcd", "jjjj", "abcd", "aaaa"])
    assert [others[0], others[2]] == [first[0], first[2]]
    assert draw(0, ["abcd"] * 4, 3) == [text[:3] for text in first]
    assert traces == {(4, 4): 1}


def test_tokens_are_drawn_by_their_probability(model):
    """The softmax of the top 3 at temperature 1/4; that at 1 is another one."""
    logits = logits_after(model, [TOKENIZER.encode("abcd").tolist()])[0]
    ids = np.argsort(-logits)[:3]
    drawn = Counter(
        generate(
            model,
            TASK.generation,
            ["abcd"] * 1024,
            max_tokens=1,
            temperature=0.25,
            top_k=3,
            key=jax.random.key(5),
        )
    )
    assert set(drawn) <= {LETTERS[n] for n in ids}
    shares = np.asarray([drawn[LETTERS[n]] for n in ids]) / 1024

    def expected(temperature: float) -> np.ndarray:
        weights = np.exp((logits[ids] - logits[ids].max()) / temperature)
        return weights / weights.sum()

    assert np.abs(shares - expected(0.25)).max() <= 0.05  # three deviations
    assert np.abs(shares - expected(1.0)).max() >= 0.1


def test_the_likeliest_of_one_is_the_likeliest(model):
    prompts = ["abcd", "jgca"]
    text = generate(model, TASK.generation, prompts, max_tokens=12)
    how = {"temperature": 5.0, "top_k": 1, "key": jax.random.key(0)}
    assert generate(model, TASK.generation, prompts, max_tokens=12, **how) == text


# What it refuses.


def test_all_prompts_that_are_refused_are_named():
    prompts = ["abc", "", "abz", "a" * (CONTEXT + 1)]
    with pytest.raises(UserError) as caught:
        generate(Alphabet([]), TASK.generation, prompts, max_tokens=1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for line, parts in zip(
        lines,
        [("'': ", "1 to 8 tokens", "got 0"), ("'abz': ", "'z'"), ("got 9",)],
        strict=True,
    ):
        check_form(line)
        assert all(part in line for part in parts)


def test_numbers_out_of_bounds_are_refused_at_once():
    how = {"max_tokens": 0, "top_k": 0, "temperature": float("nan")}
    with pytest.raises(UserError) as caught:
        generate(Alphabet([]), TASK.generation, ["a"], **how)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "max_tokens",
        "top_k",
        "temperature",
    ]
    for line in lines:
        check_form(line)
