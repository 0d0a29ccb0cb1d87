"""What a run says of itself before its first step."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from train import phases
from train.report import logs, tables
from train.run import Run


def checking(
    plan: Sequence[phases.Phase],
) -> contextlib.AbstractContextManager[None]:
    """Says that the phases are traced, which may take long, and how long it took."""
    count = "1 phase" if len(plan) == 1 else f"{len(plan)} phases"
    return logs.stage(f"checking {count}")


def reading(path: Path) -> contextlib.AbstractContextManager[None]:
    """Says that a checkpoint is read, and how long it took."""
    return logs.stage(f"reading {path}")


def describe(
    run: Run, plan: Sequence[phases.Phase], model: nnx.Module, step: int = 0
) -> None:
    """Says data, model, devices and phases on stderr, and where it goes on."""
    sizes = ", ".join(f"{n:,} {split}" for split, n in run.data.sizes.items())
    logs.say(f"{run.config['data']['name']}: {sizes}")
    logs.say(f"{run.config['model']['name']}:\n{tables.of_layers(model, run.task)}")
    spans = phases.spans(plan, run.steps_per_epoch)
    for phase, (start, end) in zip(plan, spans, strict=True):
        most = "at most " if phase.until.condition else ""
        logs.say(f"phase {phase.name}: steps {start} to {most}{end}")
    if run.placement.mesh.size > 1:
        axes = ", ".join(f"{axis} {n}" for axis, n in run.placement.mesh.shape.items())
        logs.say(f"{run.placement.mesh.size} devices: {axes}")
    if step:
        logs.say(f"resuming at step {step}")
