"""Text written token by token, with what was read kept in a cache.

Greedy decoding and sampling. Letters: `b` texts of a batch, `t` tokens, `o` vocabulary.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lowrank_jax.errors import UserError, raise_all
from train.tasks.base import Generation

MOST_ROWS = 64
"""Most texts that are written at once."""

Prompt = Mapping[str, np.ndarray]


class Sampling(NamedTuple):
    """How a token is chosen, beside what is traced.

    Args:
      greedy: Whether the likeliest one is taken.
      top_k: Among how many of the likeliest it is drawn; None for all.
    """

    greedy: bool
    top_k: int | None


class Rows(NamedTuple):
    """Which texts a batch writes; nothing of it is fixed when the loop is compiled.

    Args:
      number: Of each text, by which its random numbers are drawn.
      written: Tokens that it has already.
      left: Tokens that it may have yet; 0 for rows that fill the batch.
    """

    number: Int[Array, " b"]
    written: Int[Array, " b"]
    left: Int[Array, " b"]


class Writing(NamedTuple):
    """What the loop carries from token to token.

    Args:
      tokens: Those that were written since the prompt, as many as a cache holds.
      steps: How many of them.
      counts: How many of them are of the text, whose end may have come before.
      over: Which texts have ended.
      cache: The model's.
    """

    tokens: Int[Array, "b t"]
    steps: Int[Array, ""]
    counts: Int[Array, " b"]
    over: Bool[Array, " b"]
    cache: Any


def generate(
    model: nnx.Module,
    generation: Generation,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: PRNGKeyArray | None = None,
) -> list[str]:
    """Writes a text after each prompt, with the model at its active ranks.

    Prompts whose arrays have the same shapes are written together, in one compiled loop
    over a cache: of a language model, prompts of as many tokens. Other ranks,
    temperatures, keys and `max_tokens` do not recompile it, a new shape does. A
    text ends at the task's stop token or after `max_tokens`; when the cache is full,
    the task goes on from the tail, or the text ends too. What is drawn for a text
    depends on the key and its place among the prompts, not on the other prompts.

    Args:
      model: Of the task.
      generation: How models of the task write.
      prompts: The prompts.
      max_tokens: Most tokens of a text.
      temperature: What the logits are divided by before a token is drawn; 0 takes the
        likeliest.
      top_k: Draws among so many of the likeliest tokens; None for all.
      key: Of what is drawn; needs none at temperature 0.

    Raises:
      UserError: A prompt that the task refuses, or numbers out of bounds; all at once.
    """
    _check(max_tokens, temperature, top_k)
    pending = dict(enumerate(_encode(generation, prompts)))
    model = nnx.clone(model)
    model.eval()
    graphdef, state = nnx.split(model)
    write = functools.partial(
        _write,
        graphdef,
        generation,
        Sampling(True, None) if temperature == 0 else Sampling(False, top_k),
        nnx.as_pure(state),
        key=jax.random.key(0) if key is None else key,
        temperature=np.float32(temperature or 1.0),
    )
    texts: list[list[int]] = [[] for _ in prompts]
    while pending:  # once, unless caches were full
        following: dict[int, Prompt] = {}
        for numbers, arrays, size in _batches(pending):
            rows = _rows(numbers, [len(texts[n]) for n in numbers], max_tokens, size)
            tokens, counts = jax.device_get(write(arrays, rows))
            for number, ids, count in zip(numbers, tokens, counts, strict=False):
                texts[number] += ids[:count].tolist()
                ended = texts[number][-1] == generation.stop
                if not ended and len(texts[number]) < max_tokens and generation.extend:
                    prompt = generation.extend(pending[number], ids[:count])
                    following[number] = prompt
        pending = following
    return [generation.decode(_without(generation.stop, text)) for text in texts]


def _check(max_tokens: int, temperature: float, top_k: int | None) -> None:
    problems = [
        f"{name}: must be at least 1, got {value}. Raise it."
        for name, value in {"max_tokens": max_tokens, "top_k": top_k}.items()
        if value is not None and value < 1
    ]
    if not (math.isfinite(temperature) and temperature >= 0):
        problems.append(
            f"temperature: must be a number of at least 0, got {temperature}. Take 0"
            " for the likeliest tokens, 1 for the model's own distribution."
        )
    raise_all(problems)


def _encode(generation: Generation, prompts: Sequence[str]) -> list[Prompt]:
    """The arrays of each prompt; all that are refused are named."""
    encoded, problems = [], []
    for text in prompts:
        try:
            encoded.append(generation.encode(text))
        except UserError as error:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            problems.append(f"{shown!r}: {error}")
    raise_all(problems)
    return encoded


def _batches(
    prompts: Mapping[int, Prompt],
) -> Iterator[tuple[list[int], dict[str, np.ndarray], int]]:
    """Yields numbers and stacked arrays of prompts of the same shapes, and the rows of
    the batch, of which the last repeat its first one.

    Batches of few sizes: a power of two at most, the same for all of these shapes.
    """
    groups: dict[Any, list[int]] = {}
    for number, arrays in prompts.items():
        shapes = tuple((name, arrays[name].shape) for name in sorted(arrays))
        groups.setdefault(shapes, []).append(number)
    for group in groups.values():
        size = min(MOST_ROWS, 2 ** math.ceil(math.log2(len(group))))
        for start in range(0, len(group), size):
            numbers = group[start : start + size]
            filled = numbers + numbers[:1] * (size - len(numbers))
            names = prompts[numbers[0]]
            yield (
                numbers,
                {name: np.stack([prompts[n][name] for n in filled]) for name in names},
                size,
            )


def _rows(
    numbers: Sequence[int], written: Sequence[int], max_tokens: int, size: int
) -> Rows:
    """Says what a batch of `size` rows writes."""
    left = [max_tokens - count for count in written]
    filled = (
        np.pad(np.asarray(values, np.int32), (0, size - len(numbers)))
        for values in (numbers, written, left)
    )
    return Rows(*filled)


def _without(stop: int | None, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == stop else ids


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _write(
    graphdef: nnx.GraphDef,
    generation: Generation,
    sampling: Sampling,
    state: Any,
    prompts: Mapping[str, Array],
    rows: Rows,
    *,
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    """Writes until each text has ended or the cache is full.

    Returns:
      The tokens, and how many of each row are of its text.
    """

    def model() -> nnx.Module:
        # made where it is used: a model of an outer trace may not be scanned over
        return nnx.merge(graphdef, state, copy=True)

    def choose(
        logits: Float[Array, "b o"], number: Int[Array, ""] | int
    ) -> Int[Array, " b"]:
        keys = _keys(key, rows.number, rows.written + number)
        return _choose(sampling, logits, temperature, keys)

    def add(writing: Writing, tokens: Int[Array, " b"], cache: Any) -> Writing:
        counts = writing.counts + ~writing.over
        over = writing.over | (counts >= rows.left)
        if generation.stop is not None:
            over |= tokens == generation.stop
        written = writing.tokens.at[:, writing.steps].set(tokens)
        return Writing(written, writing.steps + 1, counts, over, cache)

    def more(writing: Writing) -> Bool[Array, ""]:
        room = writing.cache.position < generation.limit
        return room & ~writing.over.all()

    def step(writing: Writing) -> Writing:
        last = jax.lax.dynamic_slice_in_dim(writing.tokens, writing.steps - 1, 1, 1)
        logits, cache = model().decode(last, writing.cache)
        return add(writing, choose(logits[:, 0], writing.steps), cache)

    logits, cache = generation.begin(model(), prompts)
    size = len(rows.left)
    none = Writing(
        jnp.zeros((size, generation.limit), jnp.int32),
        jnp.int32(0),
        jnp.zeros(size, jnp.int32),
        rows.left == 0,
        cache,
    )
    first = add(none, choose(logits, 0), cache)
    done = jax.lax.while_loop(more, step, first)
    return done.tokens, done.counts


def _keys(
    key: PRNGKeyArray, rows: Int[Array, " b"], numbers: Int[Array, " b"]
) -> PRNGKeyArray:
    """A key for each text and token: the same however the texts are batched."""

    def of(row: Int[Array, ""], number: Int[Array, ""]) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(key, row), number)

    return jax.vmap(of)(rows, numbers)


def _choose(
    sampling: Sampling,
    logits: Float[Array, "b o"],
    temperature: Float[Array, ""],
    keys: PRNGKeyArray,
) -> Int[Array, " b"]:
    """The next token of each text."""
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    # of equal logits the first comes first, as with argmax
    likeliest, ids = jax.lax.top_k(logits, count)
    places = jax.vmap(jax.random.categorical)(keys, likeliest / temperature)
    return jnp.take_along_axis(ids, places[:, None], axis=-1)[:, 0].astype(jnp.int32)
