# %% [markdown]
# # Cut a language model and listen to it at four sizes
#
# **Asked.** A small language model is trained once. What does it lose, and how does it
# sound, with a half, a quarter and an eighth of its ranks?
#
# **Done.** A character transformer of 0.8 million parameters, 600 steps on tiny
# Shakespeare: 300 dense, then factorized by its SVD, then 300 nested, where every step
# trains four sizes. Beside it the same model, dense for all 600 steps and cut
# afterwards.
#
# **Seen.** The perplexity of each size, the figure that counts; and a few lines written
# by each, which say less than they seem to.
#
# To open it in Jupyter, from the root of a clone: `jupytext --to ipynb
# notebooks/language_model.py`, then `PYTHONPATH=. jupyter lab`.

# %%
import ast
import contextlib
import io
import sysconfig
from pathlib import Path

import jax
import numpy as np

import lowrank_jax as lr
from configs import shakespeare, text
from lowrank_jax.errors import MissingFile
from train import opening, writing, xla_flags
from train.data.text import locate
from train.loop import train_and_evaluate
from train.report import logs, plots

xla_flags.leave_products_apart()  # as the binaries do: products are wrong without it
FRACTIONS = (1.0, 0.5, 0.25, 0.125)

# %% [markdown]
# ## The text
#
# Tiny Shakespeare, a million characters, if the folder `TFDS_DATA_DIR` has it. If not,
# what Python says of itself: the docstrings of its library, which are on every machine.


# %%
def library_text(size: int = 1_000_000) -> str:
    """The docstrings of Python's own modules."""
    found, length = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node) or ""
                if doc.isascii() and length < size:
                    found.append(doc)
                    length += len(doc)
    return "\n\n".join(found)


try:
    locate("tiny_shakespeare", ["text"], "")
    source, prompt = "tiny_shakespeare", "ROMEO:"
except MissingFile:
    Path("library.txt").write_text(library_text(), encoding="utf-8")
    source, prompt = str(Path("library.txt").resolve()), "Return "
print(f"text: {source}")

# %% [markdown]
# ## One run, four sizes
#
# The config is `configs/shakespeare.py:cpu` with 300 steps a phase in place of 1,000.
# In the second phase the first pass of a step is the whole model on the whole batch;
# each of the other three sizes runs on a quarter of the batch, on factors that are cut
# to its size, and learns from what the whole model said. Which ranks a size has is
# chosen when the dense phase ends: one share of energy for all layers.


# %%
def config_of(arg: str, steps: int):
    """The config with so many steps a phase, on the text from above."""
    config = shakespeare.get_config(arg)
    config.data.args.text = source
    config.phases = tuple(
        {**phase, "until": {"steps": steps}} for phase in config.phases
    )
    config.eval_every_steps = config.checkpoint_every_steps = 0
    return config


def trained(name: str, config) -> opening.Opened:
    with contextlib.redirect_stderr(io.StringIO()):
        train_and_evaluate(config, f"runs/{name}")
        return opening.open_model(f"runs/{name}")


nested = trained("nested", config_of("cpu", 300))
for number, phase in enumerate(nested.run.config["phases"]):
    print(
        number, phase["name"], phase["until"], phase["sampler"]["name"], phase["sizes"]
    )

# %% [markdown]
# The control has the same recipe and as many steps, all of them dense. Its layers are
# then factorized, and get ranks by the same rule.

# %%
dense = trained("dense", config_of("cpu,dense", 600))
task, factored = dense.run.task, lr.factorize(dense.model, text.rank_rules("full"))
family = [
    (fraction, lr.ranks_for(factored, *task.example, energy_fraction=fraction))
    for fraction in FRACTIONS[1:]
]
cut_afterwards = dense._replace(model=factored, family=family)

# %% [markdown]
# ## Perplexity
#
# Of the test split, characters that neither model has seen: between how many characters
# the model wavers, on average.

# %%
series = {
    "nested, cut": nested.sweep(FRACTIONS),
    "dense + SVD": cut_afterwards.sweep(FRACTIONS),
}
cells = [
    [name, *(f"{row['perplexity']:.2f}" for row in rows)]
    for name, rows in series.items()
]
sizes = [f"{row['params']:,} parameters" for row in series["nested, cut"]]
print(logs.table(["perplexity", *sizes], cells))

# %%
plots.plot_frontier(
    series, "frontier.png", headline="loss", higher_is_better=False, unit="token"
)

# %% [markdown]
# ![Loss in nats a character against parameters and against MACs: the nested model rises
# slowly to the smallest size, the dense one cut afterwards is level to a quarter and
# steep from there to an eighth](frontier.png)
#
# Down to a quarter of the ranks nothing is gained by nested training: in 600 steps the
# dense model has come to use few directions of its layers, and the SVD finds them. At
# an eighth it is another matter.
#
# ## Listen
#
# The same prompt, the same temperature, the same random numbers. The writer cuts the
# model first: a size costs what it costs.

# %%
for fraction in FRACTIONS:
    size = {"name": "rank_fraction", "args": {"value": fraction}}
    writer = writing.open_writer("runs/nested", size)
    result = writer.write(
        [prompt], max_tokens=160, temperature=0.7, key=jax.random.key(0)
    )
    print(f"--- {fraction:g} of the ranks, {result['macs']:,} MACs a character")
    print(result["texts"][0].strip(), end="\n\n")

# %% [markdown]
# After 600 steps on one core no size writes Shakespeare. What is worth hearing is that
# the smallest sounds like the largest. The dense model, cut to an eighth of its ranks
# without training for it:

# %%
small = lr.truncate(factored, family[-1][1])
broken = writing.generate(
    small,
    task.generation,
    [prompt],
    max_tokens=160,
    temperature=0.7,
    key=jax.random.key(0),
)
print(broken[0].strip())

# %% [markdown]
# ## What is claimed, and checked
#
# Nested training gives up a little at the large sizes, under a twentieth of the
# perplexity, and at an eighth of the ranks loses less than two thirds of what the cut
# dense model loses.

# %%
perplexity = {
    name: [row["perplexity"] for row in rows] for name, rows in series.items()
}
ours, control = perplexity["nested, cut"], perplexity["dense + SVD"]
assert np.all(np.diff(ours) > -0.05) and np.all(np.diff(control) > -0.05)
assert all(a < 1.05 * b for a, b in zip(ours[:3], control[:3], strict=True))
assert ours[3] / ours[0] - 1 < 0.67 * (control[3] / control[0] - 1)
assert ours[3] < control[3]
