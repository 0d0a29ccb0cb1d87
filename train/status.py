"""Says what runs are doing, from their files: `python -m train.status WORKDIR ...`.

A workdir is a run's, or a sweep's folder of `launch/sweep.py`: then each of its jobs
gets a line. A run is not disturbed, and nothing is written but with `--plot=FILE.png`
the picture of one run: its loss, headline figure and parameters over the steps, with
the ends of phases and shrinks. Ends with one line of JSON:
`{"runs": [{"workdir", "state", "alive", "step", ...}, ...]}`.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lowrank_jax import checkpoint, errors
from lowrank_jax.errors import MissingFile, UserError
from train import binary, folders
from train.report import base_plots, curve_plots, logs, status

SWEEP = "sweep.json"
"""Name of the file in a sweep's folder: `{"jobs": {name: ...}}`."""
RESULT = "result.json"
"""Name of the file in the folder of a job that is done."""
FAILURE = "failed.json"
"""Name of the file in that of a job that a restart does not mend."""


def run_report(workdir: Path) -> dict[str, Any]:
    """Returns what a run is doing.

    Its "state" is one of `train.report.status` or, from what is there beside the file,
    "died" (its process is gone, and did not say so), "unknown" (a run without the
    file) or "not started". "problems" lists what of its files is damaged.
    """
    found: dict[str, Any] = {"workdir": str(workdir), "problems": []}
    written = None
    try:
        written = status.read(workdir)
    except UserError as error:
        found["problems"].append(str(error))
    owner = folders.owner(workdir)
    saved = checkpoint_sizes(workdir)
    found |= {"state": "unknown", "step": max(saved, default=None), **(written or {})}
    found |= {"alive": owner is not None, "checkpoints": saved}
    if owner is not None:
        found |= owner._asdict()
    elif written and written["state"] not in status.ENDED:
        found["state"] = "died"
    elif written is None and not (workdir / "config.json").exists():
        found["state"] = "not started"
    if saved and "ranks" not in found:
        try:
            latest = checkpoint.open_checkpoint(workdir)
            found |= {"step": latest.step, "ranks": latest.metadata["ranks"]}
        except UserError as error:
            found["problems"].append(f"checkpoints: {error}")
    return found


def checkpoint_sizes(workdir: Path) -> dict[int, int]:
    """Returns the bytes of each checkpoint of a run by its step."""
    sizes = {}
    for folder in (workdir / "checkpoints").glob("[0-9]*"):
        if folder.name.isdigit():
            sizes[int(folder.name)] = sum(map(_size, folder.rglob("*")))
    return dict(sorted(sizes.items()))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # the run that goes on has just removed it
        return 0


def sweep_reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns what each job of a sweep is doing, by its name.

    Raises:
      UserError: The sweep's file is damaged.
    """
    path = folder / SWEEP
    try:
        names = list(json.loads(path.read_text(encoding="utf-8"))["jobs"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: must be JSON with the jobs of a sweep, got other text"
            f" ({error!r}). Start the sweep again; it writes the file anew."
        ) from error
    reports = {}
    for name in names:
        job = folder / "jobs" / name
        report = {"job": name, **run_report(job / "workdir")}
        if (job / RESULT).exists():
            report["state"] = "finished"
        elif (job / FAILURE).exists():
            report["state"] = "failed"
        reports[name] = report
    return reports


def describe(report: Mapping[str, Any]) -> str:
    """Returns what a run is doing as lines of text."""
    lines = [f"{report['workdir']}: {', '.join(_headline(report))}"]
    lines += [f"  damaged: {problem}" for problem in report["problems"]]
    if report.get("message"):
        lines.append(f"  it said: {report['message']}")
    if report.get("ranks"):
        ranks = ", ".join(f"{path} {rank}" for path, rank in report["ranks"].items())
        lines.append(f"  ranks: {ranks}")
    if report.get("figures"):
        lines.append(f"  last evaluation: {_figures(report['figures'])}")
    sizes = report["checkpoints"]
    each = ", ".join(f"{step} ({size:,} bytes)" for step, size in sizes.items())
    lines.append(f"  checkpoints of steps: {each or 'none yet'}")
    return "\n".join(lines)


def _headline(report: Mapping[str, Any]) -> list[str]:
    parts = [_state(report)]
    if report.get("phase"):
        parts.append(f"phase {report['phase']}")
    if report.get("last_step"):
        parts.append(f"step {report['step']}/{report['last_step']}")
    if report["alive"]:
        if report.get("rate"):
            parts.append(f"{report['rate']:.3g} steps/s")
        if report.get("seconds_left"):
            parts.append(f"{logs.duration(report['seconds_left'])} left")
        parts.append(f"process {report['pid']} on {report['host']}")
    if report.get("time"):
        parts.append(f"written {_ago(report['time'])} ago")
    return parts


def _state(report: Mapping[str, Any]) -> str:
    if report["state"] == "died":
        return f"died at step {report.get('step') or 0}; start it again"
    return report["state"]


def _ago(written: str) -> str:
    since = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(
        written
    )
    return logs.duration(max(0.0, since.total_seconds()))


def _figures(by_fraction: Mapping[str, Any]) -> str:
    """Figures of an evaluation as text, for each fraction of the ranks."""
    return "; ".join(
        f"at {fraction} "
        + ", ".join(
            f"{name} {value:.4g}"
            for name, value in figures.items()
            if isinstance(value, int | float)
        )
        for fraction, figures in by_fraction.items()
        if isinstance(figures, Mapping)
    )


def _sweep_table(reports: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for report in reports:
        left = report.get("seconds_left")
        rows.append(
            [
                report["job"],
                _state(report),
                report.get("phase") or "-",
                report.get("step"),
                report.get("last_step"),
                logs.duration(left) if left and report["alive"] else "-",
                _figures(report.get("figures") or {})[:60] or "-",
            ]
        )
    headers = ["job", "state", "phase", "step", "of", "time left", "figures"]
    return logs.table(headers, rows)


def _main(*arguments: str) -> None:
    reports: list[Mapping[str, Any]] = []
    picture = flags.FLAGS.plot
    if picture is not None:
        _check_plot(arguments, picture)
    for argument in arguments:
        workdir = Path(argument)
        if not workdir.is_dir():
            raise MissingFile(
                f"WORKDIR: must be the folder of a run or a sweep, got {workdir}, which"
                " is not there. Check the path."
            )
        if (workdir / SWEEP).exists():
            jobs = list(sweep_reports(workdir).values())
            print(_sweep_table(jobs))
            reports += jobs
        else:
            reports.append(run_report(workdir))
            print(describe(reports[-1]))
    if picture is not None:
        curve_plots.plot_course(arguments[0], picture)
        print(f"picture: {picture}")
    logs.emit({"runs": reports})


def _define_flags() -> None:
    flags.DEFINE_string(
        "plot", None, "Picture of the course of one run (.png, .svg, .pdf)."
    )


def _check_plot(arguments: Sequence[str], picture: str) -> None:
    """Refuses a picture of several runs, and a file that cannot be written."""
    if len(arguments) > 1 or (Path(arguments[0]) / SWEEP).exists():
        raise UserError(
            f"--plot: must be of one run, got {', '.join(arguments)}. Name one workdir."
        )
    with errors.at("--plot"):
        base_plots.check_suffix(picture)
        folders.check_new_file(picture)


if __name__ == "__main__":
    _define_flags()
    binary.run(_main, takes="WORKDIR", examples=("train.status runs/digits",))
