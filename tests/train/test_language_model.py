"""Token by token against NumPy in float64; what windows count, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from messages import check_form
from reference import relative_error

from lowrank_jax.errors import UserError
from train.data import tokenizers
from train.model import build_task, model_cost
from train.models import transformer
from train.tasks import tokens
from train.tasks.base import Task
from train.tasks.language_model import language_model

CONTEXT, CHARACTERS, ROWS = 6, "abcde", 4
TOKENIZER = tokenizers.build({"name": "characters", "args": {}}, [CHARACTERS])
FACTS = {
    "arrays": {
        "tokens": {"shape": [CONTEXT + 1], "dtype": "uint8"},
        "length": {"shape": [], "dtype": "int32"},
    },
    "vocab_size": TOKENIZER.size,
    "tokenizer": TOKENIZER.to_facts(),
}


def make_batch(lengths: list[int], seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, TOKENIZER.size, (len(lengths), CONTEXT + 1))
    return {"tokens": jnp.asarray(ids, jnp.uint8), "length": jnp.asarray(lengths)}


def make_logits(seed: int = 1, rows: int = ROWS) -> jax.Array:
    shape = (rows, CONTEXT, TOKENIZER.size)
    return 3 * jax.random.normal(jax.random.key(seed), shape)


def log_softmax(logits: jax.Array) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_every_token_counts_by_its_row_and_padding_nothing():
    """Loss, what a pupil learns, and every figure, in float64."""
    task, batch = language_model(FACTS), make_batch([6, 2, 0, 5])
    rows = np.asarray([1.0, 2.0, 1.0, 0.5])
    batch["weight"] = jnp.asarray(rows)
    logits, teacher = make_logits(), make_logits(seed=2)
    ours, theirs = log_softmax(logits), log_softmax(teacher)
    losses, soft, hits, weights = [], [], [], []
    for row, length in enumerate(batch["length"]):
        for place in range(int(length)):
            target = int(batch["tokens"][row, place + 1])
            losses.append(-ours[row, place, target])
            soft.append(-np.exp(theirs[row, place]) @ ours[row, place])
            hits.append(ours[row, place].argmax() == target)
            weights.append(rows[row])
    loss = np.average(losses, weights=weights)
    assert relative_error(task.loss(logits, batch), loss) <= 1e-6
    found = task.distill(logits, teacher, batch)
    assert relative_error(found, np.average(soft, weights=weights)) <= 1e-6
    sums = task.sums(logits, batch)
    assert sums["weight"] == sum(weights)
    expected = {
        "loss": loss,
        "perplexity": np.exp(loss),
        "accuracy": np.average(hits, weights=weights),
        "bits_per_character": loss / np.log(2),  # a token is a character
    }
    figures = task.figures(sums)
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(figures[name], value) <= 1e-6


def test_bits_per_character_do_not_depend_on_the_tokens():
    """The loss of a text over its characters: tokens of three and of one character."""
    labels = jnp.asarray([[0, 1, 1, 0]])
    judged = tokens.judging(
        lambda batch: (labels, jnp.ones((1, 4), bool)), 2, characters=[3, 1]
    )
    logits = jax.random.normal(jax.random.key(0), (1, 4, 2))
    figures = judged["figures"](judged["sums"](logits, {}))
    bits = -log_softmax(logits)[0, np.arange(4), labels[0]].sum() / np.log(2)
    assert relative_error(figures["bits_per_character"], bits / 8) <= 1e-6


def test_smoothed_labels_are_trained_on_and_not_judged_by():
    """(1 - a) of the loss and a of that against the uniform distribution."""
    labels = jnp.asarray([[0, 3, 1]])
    read = lambda batch: (labels, jnp.ones((1, 3), bool))  # noqa: E731
    plain = tokens.judging(read, 4, characters=None)
    smooth = tokens.judging(read, 4, characters=None, label_smoothing=0.1)
    logits = jax.random.normal(jax.random.key(0), (1, 3, 4))
    targets = 0.9 * np.eye(4)[np.asarray(labels)] + 0.1 / 4
    expected = -(targets * log_softmax(logits)).sum(-1).mean()
    assert relative_error(smooth["loss"](logits, {}), expected) <= 1e-6
    assert smooth["sums"](logits, {}) == plain["sums"](logits, {})


def test_a_loss_that_no_perplexity_holds():
    figures = language_model(FACTS).figures({"loss": 1e4, "weight": 1.0})
    assert figures["perplexity"] == np.inf and "bits_per_character" not in figures


def test_padding_changes_neither_loss_nor_gradient():
    """A short window, alone and padded with other tokens and with rows of weight 0."""
    more = 3
    facts = {**FACTS, "arrays": {"tokens": {"shape": [4], "dtype": "uint8"}}}
    short, long = language_model(facts), language_model(FACTS)
    model = transformer.build(
        vocab_size=TOKENIZER.size,
        context=CONTEXT,
        depth=1,
        embed_dim=8,
        num_heads=2,
        mlp_dim=16,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(model)
    padded = make_batch([3, 3] + [CONTEXT] * more)
    padded["weight"] = jnp.asarray([1.0, 1.0] + [0.0] * more)
    alone = {"tokens": padded["tokens"][:2, :4]}

    def of(task: Task):
        @jax.jit
        @jax.value_and_grad
        def loss(params, batch) -> jax.Array:
            outputs = nnx.merge(graphdef, params)(*task.inputs(batch, None))
            return task.loss(outputs, batch)

        return loss

    with_pads, without = of(long)(params, padded), of(short)(params, alone)
    assert relative_error(with_pads[0], without[0]) <= 1e-6
    for ours, theirs in zip(*map(jax.tree.leaves, (with_pads, without)), strict=True):
        assert jnp.abs(ours - theirs).max() <= 1e-6
    every = {**padded, "length": jnp.full(2 + more, CONTEXT)}
    control, _ = of(long)(params, {**every, "weight": jnp.ones(2 + more)})
    assert jnp.abs(control - without[0]) >= 1e-4


def test_macs_are_those_of_a_token():
    task = language_model(FACTS)
    size, width, hidden = TOKENIZER.size, 8, 16
    model = transformer.build(
        vocab_size=size,
        context=CONTEXT,
        depth=3,
        embed_dim=width,
        num_heads=2,
        mlp_dim=hidden,
        rngs=nnx.Rngs(0),
    )
    block = 4 * width * width + 2 * width * hidden
    assert model_cost(model, task).dense_macs == 3 * block + size * width
    assert task.unit == "token"


def test_without_a_tokenizer_nothing_is_written():
    """Numbers are learned all the same."""
    facts = {key: FACTS[key] for key in ("arrays", "vocab_size")}
    task = language_model(facts)
    assert task.generation is None
    figures = task.figures(task.sums(make_logits(), make_batch([6] * ROWS)))
    assert figures.keys() == {"loss", "perplexity", "accuracy"}


MISTAKES = {
    "nothing": ({"arrays": {}}, ["'tokens'", "'vocab_size'"]),
    "one token": (
        {**FACTS, "arrays": {"tokens": {"shape": [1], "dtype": "uint8"}}},
        ["at least two"],
    ),
    "numbers": (
        {**FACTS, "arrays": {"tokens": {"shape": [4], "dtype": "float32"}}},
        ["'tokens'", "float32"],
    ),
    "lengths of tokens": (
        {
            **FACTS,
            "arrays": {
                "tokens": {"shape": [4], "dtype": "uint8"},
                "length": {"shape": [4], "dtype": "int32"},
            },
        },
        ["'length'", "[4]"],
    ),
    "vocabulary": ({**FACTS, "vocab_size": 0}, ["'vocab_size'", "got 0"]),
    "another tokenizer": ({**FACTS, "vocab_size": 9}, ["of the tokenizer", "got 9"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_a_language_model_refuses(case):
    facts, parts = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        language_model(facts)
    for part in parts:
        assert part in str(caught.value)


def test_logits_of_another_shape_are_refused():
    task, batch = language_model(FACTS), make_batch([6] * ROWS)
    logits = jax.ShapeDtypeStruct((ROWS, CONTEXT, 9), jnp.float32)
    with pytest.raises(UserError, match=r"logits \(4, 6, 5\), got \(4, 6, 9\)"):
        jax.eval_shape(task.loss, logits, batch)


def half_a_task(facts: object) -> Task:
    """Someone's own, of which most is missing."""
    return Task(headline="loss", figures=dict, sums="none")


def test_a_task_that_lacks_parts_is_refused_with_all_of_them():
    config = {"task": {"name": f"{__name__}:half_a_task", "args": {}}}
    with pytest.raises(UserError) as caught:
        build_task(config, {}, allow_imports=None)
    missing = ("model_args", "example", "inputs", "loss", "distill", "sums 'none'")
    for part in ("config.task: ", *missing, "higher_is_better"):
        assert part in str(caught.value)
    check_form(str(caught.value))
