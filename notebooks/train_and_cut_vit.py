# %% [markdown]
# # Train a ViT on digits, and cut it
#
# **Asked.** One training run of a small vision transformer: how good is it at a half, a
# quarter and an eighth of its ranks? Does it matter *which* layer gives up which rank?
# And is the cut model faster?
#
# **Done.** `configs/digits_vit.py`: 40 dense epochs on scikit-learn's 8x8 digits, then
# every layer but the patches' embedding is factorized by its SVD, then 60 epochs in
# which every step trains four sizes of the model. The control is the same model, dense
# for 100 epochs, and cut by its SVD afterwards.
#
# **Seen.** The cut models beside each other, by ranks, by selectors, by time.
#
# To open it in Jupyter, from the root of a clone: `jupytext --to ipynb
# notebooks/train_and_cut_vit.py`, then `PYTHONPATH=. jupyter lab`.

# %%
import contextlib
import io
import time

import jax
import numpy as np

import lowrank_jax as lr
from configs import digits_vit
from lowrank_jax.selection import choosing
from train import evaluation, opening, selecting, xla_flags
from train.loop import train_and_evaluate
from train.report import logs, plots
from train.state import split_model

xla_flags.leave_products_apart()  # as the binaries do: products are wrong without it
FRACTIONS = (1.0, 0.5, 0.25, 0.125)

# %% [markdown]
# ## Train
#
# What the binary `python -m train.main --config=configs/digits_vit.py --workdir=DIR`
# does, as a function. The folder it leaves describes itself: it is opened by its path
# alone.


# %%
def trained(name: str, arg: str) -> opening.Opened:
    with contextlib.redirect_stderr(io.StringIO()):
        train_and_evaluate(digits_vit.get_config(arg), f"runs/{name}")
        return opening.open_model(f"runs/{name}")


nested, dense = trained("nested", ""), trained("dense", "dense")
factored = dense._replace(model=lr.factorize(dense.model, digits_vit.RULES))
example = nested.run.task.example
print(lr.summary(nested.model, *example))

# %% [markdown]
# The last column, the effective rank, says how many directions of a layer do something:
# most of its 64. Full they are not, and the smallest sizes need them in order.
#
# ## Cut at fractions of every rank
#
# Ranks are values, not shapes: one compiled function judges all sizes. In the table
# parameters and MACs are those of the cheaper form of each layer, which is the merged
# one near the full rank.

# %%
series = {
    "nested, cut": nested.sweep(FRACTIONS),
    "dense + SVD": factored.sweep(FRACTIONS),
}
headers = ["rank_fraction", "accuracy", "loss", "params", "macs"]
for name, rows in series.items():
    print(f"{name}\n")
    print(logs.table(headers, [[row[key] for key in headers] for row in rows]), "\n")

# %%
plots.plot_frontier(
    series, "frontier.png", headline="accuracy", higher_is_better=True, unit="example"
)

# %% [markdown]
# ![Test accuracy against parameters and against MACs, nested and dense + SVD: the dense
# model has lost nearly everything at a quarter of its ranks](frontier.png)
#
# ## Cut by selectors
#
# A quarter of every rank is one way to have few MACs. A selector looks for a better
# one: at the weights (`energy_budget` keeps one share of energy in all layers,
# `minimax` one threshold of singular values, `knapsack` the least sum of losses), or at
# the loss on held-out images (`greedy` lowers the layer that costs the least, step by
# step). All get the same budget of the layers' dense MACs.

# %%
evaluator = nested.evaluator("test")
_, params, state = split_model(nested.model)
validation = nested.evaluator("validation")


def score(candidates):
    """Minus the loss on the validation images, of each rank vector."""
    return [-validation.at(params, state, ranks)["loss"] for ranks in candidates]


context = choosing.context_of(nested.model, evaluator.cost, score=score)
BUDGETS = (0.6, 0.45, 0.3)
SELECTORS = {
    "macs_fraction": {},
    "energy_budget": {"measure": "macs"},
    "minimax": {"measure": "macs"},
    "knapsack": {"measure": "macs"},
    "greedy": {"measure": "macs", "steps": 12},
}
chosen: dict[str, list[evaluation.Figures]] = {}
for name, args in SELECTORS.items():
    for budget in BUDGETS:
        key = "fraction" if args else "value"
        ranks = selecting.select({"name": name, "args": {**args, key: budget}}, context)
        chosen.setdefault(name, []).append(evaluator.at(params, state, ranks))
cells = [[name, *(row["accuracy"] for row in rows)] for name, rows in chosen.items()]
print("Test accuracy at shares of the dense MACs\n")
print(logs.table(["selector", *map(str, BUDGETS)], cells))

# %%
plots.plot_frontier(
    chosen,
    "selectors.png",
    headline="accuracy",
    higher_is_better=True,
    unit="example",
    costs=["macs"],
)

# %% [markdown]
# ![Test accuracy against MACs, a line for each of five selectors](selectors.png)
#
# One test image is 0.28 points. What a selector is worth shows where it gets tight: at
# 0.3 `greedy`, which looks at the loss, keeps far more than one fraction of every rank.
# And more is not always better: the budget of 0.45 leads `macs_fraction` close to a
# size that was trained, that of 0.6 to one that lies between two (`any` in
# `configs/sizes.py` trains those in between as well).
#
# Where did `greedy` cut, at the smallest budget?

# %%
small = lr.truncate(nested.model, chosen["greedy"][-1]["ranks"])
print(lr.summary(small, *example))

# %% [markdown]
# ## Is it faster?
#
# A cut layer multiplies by two thin matrices where the dense one multiplies by one;
# `lr.merge` makes plain Flax layers of it again, which cost what dense ones cost. Times
# are ratios to the dense model on the same machine in the same minute, the least of 40
# calls in turn, on batches of 256 images. They are shown and not asserted: on layers of
# 64 features time does not follow MACs (`docs/results.md` has larger ones).


# %%
def seconds(calls, images) -> list[float]:
    """The least time of each function, taken in turn."""
    times = [[] for _ in calls]
    for _ in range(40):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call(images).block_until_ready()
            times[place].append(time.perf_counter() - start)
    return [min(each) for each in times]


def compiled(model):
    model.eval()
    return jax.jit(lambda images: model(images))


images = jax.random.normal(jax.random.key(0), (256, *example[0].shape[1:]))
merged = lr.merge(small)
took = seconds([compiled(model) for model in (dense.model, small, merged)], images)
dense_macs = series["nested, cut"][0]["macs"]
for name, value, macs in zip(
    ("dense", "cut, factored", "cut, merged"),
    took,
    (dense_macs, chosen["greedy"][-1]["macs"], dense_macs),
    strict=True,
):
    time_ratio, macs_ratio = value / took[0], macs / dense_macs
    print(f"{name:14} {time_ratio:.2f} of the time, {macs_ratio:.2f} of the MACs")
np.testing.assert_allclose(merged(images), small(images), atol=1e-3)

# %% [markdown]
# ## What is claimed, and checked


# %%
def lost(name: str, fraction: float) -> float:
    """Points of accuracy, from the whole model to a fraction of its ranks."""
    at = {row["rank_fraction"]: row["accuracy"] for row in series[name]}
    return 100 * (at[1.0] - at[fraction])


for fraction in FRACTIONS[1:]:
    pair = [lost(name, fraction) for name in series]
    print(f"{fraction:g} of the ranks: {pair[0]:.1f} points lost, by SVD {pair[1]:.1f}")
assert lost("nested, cut", 0.25) < lost("dense + SVD", 0.25) - 10
whole = {name: rows[0]["accuracy"] for name, rows in series.items()}
assert whole["nested, cut"] > whole["dense + SVD"] - 0.04
tight = {name: rows[-1]["accuracy"] for name, rows in chosen.items()}
assert tight["greedy"] > tight["macs_fraction"] + 0.05
