"""Weak scaling of a training step over simulated devices, and what they send.

`python -m benchmarks.mesh_scaling`: an MLP, dense and at 1/2, 1/4 and 1/8 of its ranks,
on 1, 2, 4 and 8 simulated devices along each axis of the mesh, examples per device
fixed. The devices share this machine's cores, so time falls nowhere; what can be read
is the overhead of splitting, time(n) / (n time(1)), and the collectives of the compiled
program, in bytes that a device sends (rings), beside the formulas of `communication`.
Ends with one line of JSON.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from jax.sharding import AxisType

from benchmarks import communication, report
from configs import common
from lowrank_jax import factorize
from train.models import mlp
from train.phases import build_phases
from train.report import logs
from train.sharding import Placement
from train.state import new_state
from train.step import make_train_step
from train.tasks.classification import classification

AXES = ("data", "fsdp", "tensor")
DEVICES = (1, 2, 4, 8)
SIDE, CLASSES = 16, 16
HIDDEN = (512, 512, 512)
ROWS = 64
"""Examples of a device; of all of them along `tensor`, where rows are not split."""

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1}
SENT = {
    "all-reduce": lambda size, n: 2 * (n - 1) / n * size,
    "all-gather": lambda size, n: (n - 1) / n * size,
    "reduce-scatter": lambda size, n: (n - 1) * size,
    "all-to-all": lambda size, n: (n - 1) / n * size,
    "collective-permute": lambda size, n: size,
}
"""Bytes that a device sends for a result of some size, in a ring of n."""

_COLLECTIVE = re.compile(
    rf"= (.*?) ({'|'.join(SENT)})(?:-start)?\(.*?"
    r"(?:replica_groups=(\{\{.*?\}\}|\[[\d,]*\]|mesh\[.*?\] ?\{.*?\})"
    r"|source_target_pairs|$)",
    re.MULTILINE,
)


def collectives(text: str) -> dict[str, tuple[int, float]]:
    """Counts the collectives of a compiled program: how many, bytes that one sends.

    Those in a loop count once.

    >>> collectives("x = f32[8,4]{1,0} all-reduce(y), replica_groups={{0,1,2,3}}, z")
    {'all-reduce': (1, 192.0)}
    """
    found: dict[str, tuple[int, float]] = {}
    for shapes, kind, groups in _COLLECTIVE.findall(text):
        size = sum(
            BYTES[dtype] * math.prod(map(int, filter(None, sizes.split(","))))
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        count, sent = found.get(kind, (0, 0.0))
        found[kind] = (count + 1, sent + SENT[kind](size, _ring(groups)))
    return found


def _ring(groups: str) -> int:
    """Devices of a group: `{{0,1},{2,3}}` are two of two, so is `[2,2]`, and so is
    `mesh['a'=2,'b'=2] {'b'}`, whose groups lie along b."""
    if groups.startswith("mesh"):
        sizes, _, along = groups.partition("]")
        axes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", along))
    if groups.startswith("["):
        return int(groups.strip("[]").split(",")[-1])
    return len(groups.strip("{}").split("}")[0].split(",")) if groups else 1


def make_step(
    fraction: float | None, axis: str, devices: int
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Makes a step of the training loop on a mesh of one axis, its state, a batch.

    Args:
      fraction: Of the ranks of the hidden layers; None for dense.
      axis: Of the mesh.
      devices: Along it.
    """
    model = mlp.build(
        image_shape=(SIDE, SIDE, 1),
        num_classes=CLASSES,
        rngs=nnx.Rngs(0),
        hidden=HIDDEN,
    )
    rule = "dense" if fraction is None else {"rank_fraction": fraction}
    model = factorize(model, [("head", "dense"), (".*", rule)])
    sizes = [devices if name == axis else 1 for name in AXES]
    mesh = jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices]
    )
    placement = Placement(mesh)
    model = placement.put_model(model)
    spec = common.phase(
        name="timed",
        until={"steps": 1_000_000},
        optimizer=common.optimizer("sgd", learning_rate=0.01, args={"momentum": 0.9}),
    )
    (phase,) = build_phases([spec])
    running = phase.begin(0, 1_000_000)
    structure, state = new_state(model, running, 0)
    layout = placement.layout(model)
    state = layout.put(state)
    image = {"shape": [SIDE, SIDE, 1], "dtype": "uint8"}
    arrays = {"image": image, "label": {"shape": [], "dtype": "int32"}}
    facts = {"arrays": arrays, "num_classes": CLASSES}
    task = classification(facts, mean=[33.3], std=[78.6], augment=[])
    step = make_train_step(structure, running, task, jax.random.key(0), layout=layout)
    rows, rng = ROWS * placement.batch_shards, np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (rows, SIDE, SIDE, 1), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, rows).astype(np.int32),
    }
    return step, state, placement.batch(batch, rows)


def by_formula(fraction: float | None, axis: str, devices: int) -> float:
    """Returns what a device should send for the hidden layers, in float32."""
    sizes = (SIDE * SIDE, *HIDDEN)
    matrices = [
        communication.Matrix(
            i, o, None if fraction is None else math.ceil(fraction * min(i, o))
        )
        for i, o in zip(sizes, sizes[1:], strict=False)
    ]
    if axis == "data":
        return communication.data_parallel(matrices, devices)
    if axis == "fsdp":
        return communication.fully_sharded(matrices, devices)
    if fraction is None:  # by hand: a pair, and a layer without a partner
        pairs = [HIDDEN[0]] * (len(HIDDEN) // 2)
        return communication.tensor_parallel_pairs(pairs, ROWS, devices, number=4)
    return communication.tensor_parallel(matrices, ROWS, devices, number=4)


def seconds(
    run: Callable[[Any], Any], state: Any, *, rounds: int, count: int
) -> tuple[float, Any]:
    """Returns the median time of a step over rounds, and the last state."""
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        began = time.perf_counter()
        for _ in range(count):
            state = run(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - began) / count)
    return float(np.median(times[1:])), state


def measure(
    fractions: dict[str, float | None],
    devices: Sequence[int],
    *,
    rounds: int,
    count: int,
) -> list[dict[str, Any]]:
    """Times and counts a step for each form, axis and number of devices."""
    rows = []
    for name, fraction in fractions.items():
        for axis in AXES:
            alone = None
            for number in devices:
                step, state, batch = make_step(fraction, axis, number)
                compiled = step.lower(state, batch).compile()
                sent = collectives(compiled.as_text())
                spent, _ = seconds(
                    lambda state, run=compiled, batch=batch: run(state, batch)[0],
                    state,
                    rounds=rounds,
                    count=count,
                )
                alone = spent if alone is None else alone
                work = 1 if axis == "tensor" else number
                rows.append(
                    {
                        "form": name,
                        "axis": axis,
                        "devices": number,
                        "ms": 1e3 * spent,
                        "overhead": spent / (work * alone),
                        "collectives": {k: count for k, (count, _) in sent.items()},
                        "sent": sum(size for _, size in sent.values()),
                        "formula": by_formula(fraction, axis, number),
                    }
                )
    return rows


def _main(argv: Sequence[str]) -> None:
    del argv
    found = measure(
        communication.FRACTIONS,
        DEVICES,
        rounds=flags.FLAGS.rounds,
        count=flags.FLAGS.steps,
    )
    lines = [
        [row["form"], row["axis"], row["devices"], f"{row['ms']:.1f}"]
        + [f"{row['overhead']:.2f}", f"{row['sent'] / 1e6:.2f}"]
        + [f"{row['formula'] / 1e6:.2f}"]
        + [", ".join(f"{n} {kind}" for kind, n in row["collectives"].items())]
        for row in found
    ]
    headers = ["form", "axis", "devices", "ms", "overhead", "sent MB", "formula MB"]
    report.show("An MLP", [*headers, "collectives"], lines)
    logs.emit(found)


if __name__ == "__main__":
    report.define_flags()
    flags.DEFINE_integer("rounds", 7, "Rounds; the median counts.")
    flags.DEFINE_integer("steps", 3, "Steps in a round.")
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    app.run(_main)
