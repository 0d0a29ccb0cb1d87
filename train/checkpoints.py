"""Cutting a checkpoint to the ranks that a selector chooses."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from lowrank_jax import (
    active,
    checkpoint,
    errors,
    paths,
)
from lowrank_jax.families import Family
from lowrank_jax.forms import Factors
from lowrank_jax.ranks import Ranks
from train import drops, exporting, selecting, timing
from train.opening import first_whole
from train.report import cuts
from train.source import Source
from train.timing import Timing


def truncate_checkpoint(
    path: str | Path,
    output: str | Path | None,
    selector: Mapping[str, Any],
    *,
    sizes: Sequence[float] = (),
    max_drop: float | None = None,
    latency_ms: float | None = None,
    timing: Timing | None = None,
    format: str = "orbax",
    recalibration_batches: int = 0,
    plot: str | Path | None = None,
    data_dir: str | None = None,
    allow_imports: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a checkpoint cut to selected ranks; returns its figures.

    Everything is checked before the first array is read. Only the columns that are kept
    are read (all of them where the selector looks at the weights). A dense checkpoint
    is factorized first, every layer by its SVD.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir; a damaged checkpoint is
        named, and the one before it is cut.
      output: New folder; None to choose ranks and write nothing.
      selector: Name and arguments of a selector.
      sizes: Budgets, for several nested models in one call: each is the selector's
        `fraction`, and a folder in `output`. A larger one knows the smaller ones as the
        sizes of its family.
      max_drop: In place of the selector's `fraction`: the least one whose model is no
        more than this worse by the task's headline figure on the held-out examples.
      latency_ms: In place of the selector's `fraction`: what the model may take.
      timing: The form of the cut layers (factored by default), and how times are taken.
      format: One of `exporting.FORMATS`: a checkpoint, or a file of other programs.
      recalibration_batches: Training batches to re-estimate BatchNorm on; 0 for none.
      plot: A picture of the ranks and of what a search has scored.
      data_dir: Where the data set is, if not where the config says.
      allow_imports: Packages that names in the checkpoint may be imported from.

    Returns:
      "output", "params" (each layer in the smaller of its forms), "stored" (in the
      checkpoint), "macs", "ranks"; with `max_drop` the "fraction", and the headline
      figure "before" and "after"; where times are measured, "latency_ms" and
      "dense_latency_ms"; of several sizes a list, under "sizes".
    """
    _check_places(output, plot)
    if sizes or (max_drop, latency_ms) != (None, None):  # one that stands for all
        args = {**selector["args"], "fraction": min(sizes, default=1.0)}
        selector = {**selector, "args": args}
    selector = selecting.complete(selector)
    with errors.at("--checkpoint"):
        steps = checkpoint.complete_steps(path) or [Path(path)]

    def cut(step: Path) -> dict[str, Any]:
        source = Source(step, data_dir, list(allow_imports), timing)
        cutter = _Cutter(source, selector, format, recalibration_batches)
        return cutter.write(output, sizes, max_drop, latency_ms, plot)

    return first_whole(steps, cut)


def _check_places(output: str | Path | None, plot: str | Path | None) -> None:
    """Refuses a folder that is there, and a picture of no known format."""
    if output is not None:
        with errors.at("--output"):
            checkpoint.check_new_folder(output)
    if plot is not None:
        with errors.at("--plot"):
            cuts.check_suffix(plot)


class _Cutter:
    """Cuts one checkpoint; the arguments are those of `truncate_checkpoint`."""

    def __init__(
        self,
        source: Source,
        selector: Mapping[str, Any],
        format: str,
        batches: int,
    ):
        self._source, self._selector = source, selector
        self._format, self._batches = format, batches
        self._chosen: dict[str, Ranks] = {}
        self._by_time = selector["args"].get("measure") == "latency"
        if self._by_time or source.timing.form == timing.AUTO:
            source.timing.open_table()
        if batches:
            _ = source.run  # data that are not there are missed before anything is read

    def write(
        self,
        output: str | Path | None,
        sizes: Sequence[float],
        max_drop: float | None,
        latency_ms: float | None,
        plot: str | Path | None,
    ) -> dict[str, Any]:
        figures = self._write_all(output, sizes, max_drop, latency_ms)
        if plot is not None:
            measure = self._selector["args"].get("measure")
            source = self._source
            cuts.draw(
                plot, source.cost, source.ranks, self._chosen, source.scored, measure
            )
        return figures

    def _write_all(
        self,
        output: str | Path | None,
        sizes: Sequence[float],
        max_drop: float | None,
        latency_ms: float | None,
    ) -> dict[str, Any]:
        if sizes:
            return self.write_sizes(output, sizes)
        if max_drop is not None:
            return self.write_least(output, max_drop)
        fraction = self._selector["args"].get("fraction")
        if latency_ms is not None:
            fraction = min(latency_ms * 1e6 / self._source.times.dense, 1.0)
        return self.write_one(output, fraction)

    def write_one(
        self, output: str | Path | None, fraction: float | None
    ) -> dict[str, Any]:
        selector, context = self._selector, self._source.context()
        if not self._by_time or fraction in (None, 1):
            selector = selector if fraction is None else self._with_fraction(fraction)
            ranks = selecting.select(selector, context)
            return self._write(output, ranks, selector, ())
        ranks = timing.fitting(
            fraction,
            lambda share: selecting.select(self._with_fraction(share), context),
            self._share_of_time,
        )
        return self._write(output, ranks, self._with_fraction(fraction), ())

    def write_least(self, output: str | Path | None, drop: float) -> dict[str, Any]:
        drops.check_drop(self._source, drop)
        fraction, ranks, figures = drops.least_budget(
            self._source, self._selector, drop, recalibration_batches=self._batches
        )
        row = self._write(output, ranks, self._with_fraction(fraction), ())
        return {**row, "fraction": fraction, **figures}

    def write_sizes(
        self, output: str | Path | None, sizes: Sequence[float]
    ) -> dict[str, Any]:
        profiles = selecting.select_family(
            self._selector, self._source.context(), sizes
        )
        try:
            rows = self._write_each(output, sizes, profiles)
        except BaseException:  # all sizes or none: the folder is new, and ours
            if output is not None:
                shutil.rmtree(output, ignore_errors=True)
            raise
        return {"sizes": rows}

    def _write_each(
        self,
        output: str | Path | None,
        sizes: Sequence[float],
        profiles: Sequence[Ranks],
    ) -> list[dict[str, Any]]:
        rows = []
        for size, ranks in zip(sizes, profiles, strict=True):
            smaller = [
                (other / size, profile)
                for other, profile in zip(sizes, profiles, strict=True)
                if other < size
            ]
            folder = None if output is None else Path(output) / f"{size:g}"
            row = self._write(folder, ranks, self._with_fraction(size), smaller)
            rows.append({"fraction": size, **row})
        return rows

    def _with_fraction(self, fraction: float) -> dict[str, Any]:
        args = {**self._selector["args"], "fraction": fraction}
        return {**self._selector, "args": args}

    def _model(self, ranks: Ranks) -> nnx.Module:
        """The model cut to some ranks, its layers in their form."""
        source = self._source
        return source.timing.formed(source.at(ranks), source.inputs)

    def _share_of_time(self, ranks: Ranks) -> float:
        """The share of the dense model's time that a cut one is measured to take."""
        found = self._measured(self._model(ranks))
        return found["latency_ms"] / found["dense_latency_ms"]

    def _measured(self, model: nnx.Module) -> dict[str, float]:
        models = {"latency_ms": model, "dense_latency_ms": self._source.dense}
        return self._source.timing.measure(models, self._source.inputs)

    def _write(
        self,
        output: str | Path | None,
        ranks: Ranks,
        selector: Mapping[str, Any],
        family: Family,
    ) -> dict[str, Any]:
        source, before = self._source, self._source.ranks
        source.check(ranks)
        name = selector["name"]
        size = selector["args"].get("fraction")
        self._chosen[name if size is None else f"{name}, {size:g}"] = ranks
        if output is None:
            cuts.print_table(source.outline(ranks), source.task, before)
            found = cuts.figures(None, source.cost, ranks)
            return (
                found | self._measured(self._model(ranks)) if self._by_time else found
            )
        form = source.timing.form
        model = source.at(ranks) if form == Factors.form else self._model(ranks)
        model = source.recalibrated(model, self._batches)
        after = active.get_ranks(model)
        metadata = {key: source.saved.metadata[key] for key in ("config", "facts")}
        forms = {path: f.form for path, f in paths.find_factors(model).items()}
        metadata["truncated"] = {"selector": selector, "forms": forms, "from": before}
        if form == Factors.form:  # another has no lower ranks
            metadata["family"] = [[fraction, dict(at)] for fraction, at in family]
        exporting.save(
            output,
            model,
            source.inputs,
            name=self._format,
            step=source.saved.step,
            metadata=metadata,
        )
        after_cost = source.cost_of(model)
        cuts.print_table(model, source.task, before)
        figures = cuts.figures(output, after_cost, after) | {"ranks": dict(ranks)}
        timed = self._by_time or form == timing.AUTO
        return {**figures, **self._measured(model)} if timed else figures
