"""Translation: packed pairs, their loss, and BLEU of what is written."""

import random
from typing import Any

import commands
import copying
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
import support
from flax import nnx
from messages import check_form
from reference import relative_error

from configs import common
from lowrank_jax import export, factorize, max_ranks, truncate
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import at_fraction
from train import loop, opening, writing
from train.data import pairs, tokenizers
from train.model import example_inputs
from train.models import encoder_decoder
from train.run import open_run
from train.tasks.translation import score, translation

ALLOWED = ["copying"]
FIGURES = {"accuracy", "loss", "perplexity", "bits_per_character"}
COSTS = {"params", "stored", "macs", "ranks"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Any:
    """A checkpoint of the model that copies; its texts are gone."""
    folder = tmp_path_factory.mktemp("copying")
    config = copying.make_config(folder)
    return copying.save_untrained(config, folder / "copy")


def lines(split: str) -> list[str]:
    """The sentences of a split."""
    seed = list(copying.SPLITS).index(split)
    return copying.sentences(copying.SPLITS[split], seed)


# What a batch means.

TOKENIZER = tokenizers.build(
    {"name": "characters", "args": {}}, ["abcdefg"], reserved=len(pairs.SPECIALS)
)


def facts_of(arrays: dict[str, Any]) -> dict[str, Any]:
    about = {
        name: {"shape": list(array.shape[1:]), "dtype": str(array.dtype)}
        for name, array in arrays.items()
    }
    return {
        "arrays": about,
        "vocab_size": TOKENIZER.size,
        "tokenizer": TOKENIZER.to_facts(),
        "specials": dict(pairs.SPECIALS),
    }


def packed(texts: list[tuple[str, str]], lengths: tuple[int, int]) -> dict[str, Any]:
    ids = [tuple(map(TOKENIZER.encode, pair)) for pair in texts]
    return dict(pairs.pack(ids, lengths, np.dtype("uint8")))


def test_unpacking_gives_back_the_texts():
    """Of rows that count, pair by pair."""
    texts = [("abc", "ba"), ("g", "gfedcba"), ("aa", "b"), ("dead", "bed")]
    batch = packed(texts, (9, 13))
    generation = translation(facts_of(batch)).generation
    assert sorted(generation.pairs(batch)) == sorted(texts)
    rows = len(batch["source"])
    assert 1 < rows < len(texts)
    by_row = [
        generation.pairs({**batch, "weight": np.eye(rows)[row]}) for row in range(rows)
    ]
    assert [pair for row in by_row for pair in row] == generation.pairs(batch)
    assert all(by_row)


def test_the_batches_of_a_run_hold_every_pair_once(tmp_path):
    run = open_run(copying.make_config(tmp_path))
    for split in copying.SPLITS:
        batches = list(run.host_batches(split))
        assert all(isinstance(b["source"], np.ndarray) for b in batches)
        found = [pair for b in batches for pair in run.task.generation.pairs(b)]
        assert sorted(found) == sorted((line, line) for line in lines(split))


def test_padding_and_packing_change_neither_loss_nor_gradient():
    """Three pairs, one a row without a pad, or in one row with pads beside a row of
    weight 0."""
    texts = [("abc", "gfed"), ("bca", "aabb"), ("fed", "gaga")]
    alone = {
        name: np.concatenate([packed([pair], (4, 5))[name] for pair in texts])
        for name in packed(texts, (4, 5))
    }
    assert (alone["source_segment"] == 1).all() and (alone["target_segment"] == 1).all()
    together = packed(texts, (15, 18))
    rng = np.random.default_rng(0)
    noise = {name: rng.integers(1, 3, row.shape) for name, row in together.items()}
    together = {
        name: np.concatenate([row, noise[name]]) for name, row in together.items()
    }
    together["weight"] = np.float32([1, 0])
    task = translation(facts_of(together), label_smoothing=0.1)
    sizes = {"depth": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 16}
    model = encoder_decoder.build(
        **task.model_args, **sizes, dropout_rate=0.1, rngs=nnx.Rngs(0)
    )
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def judged(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            model = nnx.merge(graphdef, params, rest, copy=True)
            outputs = model(*task.inputs(batch, None))
            return task.loss(outputs, batch), task.sums(outputs, batch)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, sums), gradient = judged(params, jax.tree.map(jnp.asarray, together))
    (expected, wanted), slope = judged(params, jax.tree.map(jnp.asarray, alone))
    assert relative_error(loss, expected) <= 1e-6
    flat, steep = (
        jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (gradient, slope)
    )
    assert jnp.abs(steep).max() > 1e-3
    assert relative_error(flat, steep) <= 1e-6
    assert sums["weight"] == wanted["weight"] == 15
    figures, same = task.figures(sums), task.figures(wanted)
    assert set(figures) == FIGURES
    for name in FIGURES:
        assert relative_error(figures[name], same[name]) <= 1e-6
    # 15 tokens, of which the 3 ends are no characters
    bits = figures["loss"] / np.log(2) * 15 / 12
    assert figures["bits_per_character"] == pytest.approx(bits, rel=1e-5)


# BLEU.

ENGLISH = [
    "A man is riding a brown horse along the beach .",
    "Two children in red coats play with a ball, laughing.",
    "The old woman sells fruit at the market on Sunday.",
    "Three dogs run through the snow behind their owner.",
    "A band plays loud music in front of a small crowd.",
]


def test_bleu_is_that_of_sacrebleu():
    """100 for the references, little for others, and in between what it says."""
    shuffled = random.Random(0).sample(ENGLISH, len(ENGLISH))
    assert all(a != b for a, b in zip(shuffled, ENGLISH, strict=True))
    close = [line.replace(" a ", " the ").replace("s ", " ") for line in ENGLISH]
    found = {
        name: score(texts, ENGLISH)["bleu"]
        for name, texts in {"same": ENGLISH, "other": shuffled, "close": close}.items()
    }
    assert found["same"] == pytest.approx(100.0)
    assert found["other"] < 10
    assert 20 < found["close"] < 80
    assert found["close"] == sacrebleu.corpus_bleu(close, [ENGLISH]).score


class TestCheckpoint:
    """Of a model that copies, whose data set is not there any more to write with."""

    def test_its_figures_have_bleu(self, copy):
        """At every fraction that of the texts that it writes there."""
        opened = opening.open_model(copy, allow_imports=ALLOWED)
        rows = opened.sweep([1.0, 0.6], "test")
        assert all(
            set(row) == FIGURES | COSTS | {"bleu", "rank_fraction"} for row in rows
        )
        assert rows[0]["bleu"] == pytest.approx(100.0)
        assert rows[0]["perplexity"] == pytest.approx(1.0, abs=1e-3)
        texts = lines("test")
        for row in rows:
            writer = writing.open_writer(
                copy,
                {"name": "rank_fraction", "args": {"value": row["rank_fraction"]}},
                allow_imports=ALLOWED,
            )
            written = writer.write(texts, max_tokens=copying.LENGTH)
            expected = sacrebleu.corpus_bleu(written["texts"], [texts]).score
            assert row["bleu"] == pytest.approx(expected)
            assert written["ranks"] == row["ranks"]
            assert written["macs"] == row["macs"]
        assert rows[1]["bleu"] < 90

    def test_bleu_may_be_left_out(self, copy):
        opened = opening.open_model(copy, allow_imports=ALLOWED)
        assert set(opened.figures("test", translate=False)) == FIGURES | COSTS
        assert set(opened.figures("test")) == FIGURES | COSTS | {"bleu"}

    def test_it_writes_without_its_data(self, tmp_path):
        config = copying.make_config(tmp_path)
        path = copying.save_untrained(config, tmp_path / "copy")
        for file in tmp_path.glob("*.txt"):
            file.unlink()
        writer = writing.open_writer(path, allow_imports=ALLOWED)
        prompts = lines("test") + ["?"]
        assert writer.write(prompts, max_tokens=100)["texts"] == prompts
        short = writer.write(prompts, max_tokens=2)["texts"]
        assert short == [prompt[:2] for prompt in prompts]

    @pytest.mark.parametrize(
        "prompt, parts",
        [
            ("", ["1 to 15 tokens", "got 0"]),
            ("!" * 16, ["1 to 15 tokens", "got 16"]),
            ("!x", ["characters must be of", "'x'"]),
        ],
    )
    def test_prompts_that_it_refuses(self, copy, prompt, parts):
        writer = writing.open_writer(copy, allow_imports=ALLOWED)
        with pytest.raises(UserError) as caught:
            writer.write([prompt], max_tokens=1)
        check_form(str(caught.value))
        assert all(part in str(caught.value) for part in parts)

    def test_ranks_that_it_refuses(self, copy):
        for name, value, part in (
            ("ranks", {"tabel": 1}, "'tabel'"),
            ("ranks", {"table": 99}, "table: rank must be in [0, 13], got 99"),
            ("rank_fraction", 0.0, "(0, 1]"),
        ):
            selector = {"name": name, "args": {"value": value}}
            with pytest.raises(UserError) as caught:
                writing.open_writer(copy, selector, allow_imports=ALLOWED)
            assert part in str(caught.value)

    def test_a_checkpoint_of_another_task_is_refused(self, tmp_path):
        phase = common.phase(
            name="only",
            until={"steps": 1},
            optimizer=common.optimizer("sgd", learning_rate=0.1),
        )
        config = support.make_config(
            phase, model={"name": "mlp", "args": {"hidden": (4,)}}
        )
        path = copying.save_untrained(config, tmp_path / "digits")
        with pytest.raises(UserError, match="got classification on digits") as caught:
            writing.open_writer(path)
        assert str(caught.value).startswith("--checkpoint: ")
        check_form(str(caught.value))


@pytest.mark.slow
def test_the_binaries(copy, tmp_path):
    """What they print; mistakes end in one line, with nothing on stdout."""
    (tmp_path / "prompts.txt").write_text("!#$%\n?;\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\n")
    (tmp_path / "empty.txt").write_text("")
    here, allow = f"--checkpoint={copy}", "--allow_imports=copying"
    write, prompt = ("train.generate", here, allow), "--prompt=!#$"
    file = f"--prompts_file={tmp_path}"
    mistakes = {
        "flags: exactly one of --prompt, --prompts_file must be given, got none": write,
        "flags: exactly one of --prompt, --prompts_file must be given, got both": (
            *write,
            prompt,
            f"{file}/prompts.txt",
        ),
        "flags: at most one of --rank, --rank_fraction, --ranks must be given, got": (
            *write,
            prompt,
            "--rank=1",
            "--rank_fraction=0.5",
        ),
        "--top_k: acts only with --temperature, got 3": (*write, prompt, "--top_k=3"),
        "--temperature: must be a number of": (*write, prompt, "--temperature=nan"),
        "--prompts_file: must be a file in UTF-8, got": (*write, f"{file}/latin.txt"),
        "--prompts_file: must hold a prompt, got": (*write, f"{file}/empty.txt"),
        "--checkpoint: must be a folder with a checkpoint, got": (
            "train.generate",
            f"--checkpoint={tmp_path / 'none'}",
            prompt,
        ),
        "--prompt: '!x': text: characters must be of": (*write, "--prompt=!x"),
    }
    ended = commands.run(
        {
            "file": (*write, f"{file}/prompts.txt"),
            "drawn": (*write, prompt, prompt, "--temperature=0.1", "--max_tokens=2"),
            "figures": ("train.evaluate", here, allow),
            "without": ("train.evaluate", here, allow, "--nobleu"),
            **mistakes,
        }
    )
    assert ended["file"].result["texts"] == ["!#$%", "?;"]
    assert set(ended["file"].result) == {"texts", *COSTS}
    assert ended["file"].out.splitlines()[:2] == ["!#$%", "?;"]
    assert ended["drawn"].result["texts"] == ["!#", "!#"]
    assert ended["figures"].result["bleu"] == pytest.approx(100.0)
    assert set(ended["without"].result) == FIGURES | COSTS
    for message in mistakes:
        assert ended[message].message.startswith(f"error: {message}")
        check_form(ended[message].message)


# What it refuses.

GOOD = facts_of(packed([("a", "b")], (4, 4)))


@pytest.mark.parametrize(
    "changes, args, parts",
    [
        (
            {"arrays": {}, "vocab_size": None, "specials": {"pad": 0}},
            {"label_smoothing": 1.0},
            [
                "'source', 'source_segment'",
                "'label'",
                "vocab_size",
                "specials",
                "[0, 1",
            ],
        ),
        (
            {"arrays": {**GOOD["arrays"], "label": {"shape": [5], "dtype": "uint8"}}},
            {},
            ["'target', 'label', 'target_segment'", "[5]"],
        ),
        (
            {"arrays": {**GOOD["arrays"], "source": {"shape": [4], "dtype": "bool"}}},
            {},
            ["'source', 'source_segment'", "bool"],
        ),
        ({"specials": {"pad": 0, "bos": 1, "eos": 1}}, {}, ["specials", "'eos': 1"]),
        ({"specials": {"pad": 0, "bos": 1, "eos": 99}}, {}, ["specials", "99"]),
        ({"vocab_size": 11}, {}, ["that of the tokenizer, 10", "got 11"]),
    ],
)
def test_facts_that_it_refuses(changes, args, parts):
    """All that is missing at once."""
    with pytest.raises(UserError) as caught:
        translation({**GOOD, **changes}, **args)
    for part in parts:
        assert part in str(caught.value)
    for line in str(caught.value).splitlines():
        check_form(line)


def test_without_a_tokenizer_it_is_trained_all_the_same():
    facts = {key: GOOD[key] for key in ("arrays", "vocab_size")}
    assert translation(facts).generation is None


@pytest.mark.slow
def test_a_trained_model_copies(tmp_path):
    """Some hundred steps on files; BLEU at full rank, and less at a tenth."""
    args = {
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 2,
        "mlp_dim": 64,
        "dropout_rate": 0.0,
    }
    phase = common.phase(
        name="only",
        until={"steps": 800},
        sampler=common.named("matryoshka", fractions=(1.0, 0.5)),
        optimizer=common.optimizer(
            "adam", learning_rate=5e-3, schedule=common.cosine(warmup_steps=50)
        ),
    )
    config = copying.make_config(
        tmp_path,
        splits={"train": 2000, "validation": 20, "test": 40},
        model={"name": "encoder_decoder", "args": args},
        phases=[phase],
    )
    config["data"]["batch_size"] = 32
    loop.train_and_evaluate(config, tmp_path / "run")
    rows = opening.open_model(tmp_path / "run").sweep([1.0, 0.1])
    assert rows[0]["bleu"] >= 90
    assert rows[1]["bleu"] <= 50
    written = writing.open_writer(tmp_path / "run").write(["!#$%"], max_tokens=20)
    assert written["texts"] == ["!#$%"]


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.2])
def test_a_program_of_a_translation_model(fraction):
    """Of whole rows of packed pairs: its logits are the model's, for other rows too."""
    batch = packed([("ab", "ba"), ("b", "a")], (6, 7))
    facts = facts_of(batch)
    task = translation(facts)
    sizes = {"depth": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 16}
    model = factorize(
        encoder_decoder.build(**task.model_args, **sizes, rngs=nnx.Rngs(0))
    )
    model = truncate(model, at_fraction(max_ranks(model), fraction))
    model.eval()
    example = example_inputs(task, facts)
    function = export.from_stablehlo(export.to_stablehlo(model, *example))
    inputs = [jnp.repeat(one, 3, axis=0) for one in task.inputs(batch, None)]
    assert relative_error(function(*inputs), model(*inputs)) <= 1e-6
