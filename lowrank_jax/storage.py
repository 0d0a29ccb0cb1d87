"""Steps on disk, written in the background: the only file that knows orbax.

A step is a folder with one folder for each tree of arrays, given as `{key: array}`
(`pieces` says what is in it), and one for its metadata, a JSON file. Orbax makes it a
step: it writes into a temporary folder, waits for all processes, and renames it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lowrank_jax import pieces
from lowrank_jax.metadata import METADATA_FILE


class StepWriter:
    """Writes steps into one folder, in the background, keeping the last and the best.

    What a save that was cut off left there is removed.

    Args:
      directory: Folder for the steps; made if missing.
      keep: How many of the latest steps to keep, None for all.
      keep_best: How many of the steps with the best figures to keep beside them.
      higher_is_better: Which figures are the best.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int | None = None,
        keep_best: int = 0,
        higher_is_better: bool = True,
    ):
        directory = Path(directory).absolute()
        self._policy = _Preserved(directory, keep, keep_best, higher_is_better)
        self._manager = _Manager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                create=True,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    # else orbax's threads wait for a folder that cannot be made
                    create_directories_asynchronously=False
                ),
            ),
        )

    def steps(self) -> Sequence[int]:
        """Returns the steps that are there, or will be when they are written."""
        return self._manager.all_steps()

    def write(
        self,
        step: int,
        trees: Mapping[str, Mapping[str, Any]],
        axes: Mapping[str, Mapping[str, int]],
        metadata: Mapping[str, Any],
    ) -> None:
        """Writes one step; returns before all of it is on disk.

        Every process calls this; older steps go when this one is complete.

        Args:
          step: Its number.
          trees: Arrays by tree and key. Those without elements are not written.
          axes: Axes (from the end) along which an array can be read in part, by tree
            and key.
          metadata: A JSON value; a number `figure` in it says how good the step is.

        Raises:
          OSError: This write, or the one before it, could not be done.
        """
        args: dict[str, Any] = {"metadata": ocp.args.JsonSave(dict(metadata))}
        for name, arrays in trees.items():
            filled = {key: x for key, x in arrays.items() if math.prod(x.shape)}
            if filled:
                args[name] = _PiecesArgs(filled, axes[name])
        self._policy.figures[step] = metadata.get("figure")
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          OSError: It could not be written.
        """
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Leaves it to the caller to ask whether the run shall stop."""

    def reached_preemption(self, step: int) -> bool:
        """Returns that it shall not.

        Orbax would ask JAX at every save. JAX answers by counting the calls of whoever
        asks: two who count differently miss the one call that says yes, and a SIGTERM
        that comes while a step is saved is lost.
        """
        return False


class _PiecesHandler(ocp.AsyncCheckpointHandler):
    """Writes one tree of arrays; orbax calls it on every process."""

    async def async_save(
        self, directory: Any, args: "_PiecesArgs"
    ) -> list[ocp.future.Future]:
        taken = pieces.take_pieces(args.arrays, args.axes)
        process, count = jax.process_index(), jax.process_count()

        async def write() -> None:
            pieces.write_pieces(Path(directory), taken, process, count)

        name = f"write {directory}"
        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name=name)]

    def save(self, directory: Any, args: "_PiecesArgs") -> None:
        raise NotImplementedError("all saves run in the background")

    def restore(self, directory: Any, args: Any = None) -> Any:
        raise NotImplementedError("pieces.read_arrays reads")


@ocp.args.register_with_handler(_PiecesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _PiecesArgs(ocp.args.CheckpointArgs):
    """What `_PiecesHandler` writes."""

    arrays: Mapping[str, Any]
    axes: Mapping[str, int]


class _Preserved:
    """Which steps stay: the last few, and the best few by the figure in their metadata.

    Of equal figures the later is the better; a step without a figure, or with one that
    is no number, is never among the best.
    """

    def __init__(
        self, directory: Path, keep: int | None, keep_best: int, higher_is_better: bool
    ):
        self._keep, self._keep_best = keep, keep_best
        self._sign = 1 if higher_is_better else -1
        names = directory.iterdir() if directory.is_dir() else ()
        self.figures = {int(p.name): _figure(p) for p in names if p.name.isdigit()}

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        """Says of each step whether it stays (orbax's interface)."""
        steps = sorted(info.step for info in checkpoints)
        figures = ((step, self.figures.get(step)) for step in steps)
        known = {step: x for step, x in figures if x is not None and x == x}
        ranked = sorted(known, key=lambda step: (self._sign * known[step], step))
        first = 0 if self._keep is None else max(0, len(steps) - self._keep)
        kept = {*steps[first:]}
        kept |= {*ranked[max(0, len(ranked) - self._keep_best) :]}
        return [info.step in kept for info in checkpoints]


def _figure(step: Path) -> float | None:
    """The figure of a step on disk; None where there is none that can be read."""
    try:
        figure = json.loads((step / METADATA_FILE).read_bytes())["figure"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return figure if isinstance(figure, int | float) else None
