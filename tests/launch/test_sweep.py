"""Sweeps: grids become jobs, no job is run twice, all ends in a table and a picture."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import commands
import pytest
from messages import check_form

from launch import gather, grid, jobs, pool
from launch.processes import Signals
from lowrank_jax.errors import UserError
from train import folders

# how ml_collections loads a config
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DIGITS = "configs/digits_mlp.py:smoke"


def make_jobs(*grids: str, config: str = DIGITS) -> dict[str, grid.Job]:
    return grid.product(config, [grid.parse(text) for text in grids])


@pytest.mark.parametrize(
    "text, key, values",
    [
        ("config.seed=0,1", "config.seed", ("0", "1")),
        (
            "config.phases[0].penalties[0].args.weight=1e-3, 1e-2",
            "config.phases[0].penalties[0].args.weight",
            ("1e-3", "1e-2"),
        ),
        ("lasso=1e-3", "lasso", ("1e-3",)),
        ("config.a=(1,2),[3,(4,5)],'x,y'", "config.a", ("(1,2)", "[3,(4,5)]", "'x,y'")),
    ],
)
def test_grids(text, key, values):
    """Commas in brackets and quotes do not part values."""
    assert grid.parse(text) == (key, values)


@pytest.mark.parametrize(
    "text",
    ["config.seed", "=1", "config.seed=", "config.seed=1,,2", "a b=1", "model.x=1"]
    + ["config.seed=1,1"],
)
def test_a_grid_of_another_form(text):
    with pytest.raises(UserError, match="^--grid: ") as caught:
        grid.parse(text)
    check_form(str(caught.value))


def test_the_product_of_grids():
    """Short names; arguments go behind the config's own; what is fixed is no name."""
    made = make_jobs("lasso=1e-3,1e-2", "config.seed=0,1", "config.batch.size=8")
    assert list(made) == [
        "lasso=1e-3_seed=0",
        "lasso=1e-3_seed=1",
        "lasso=1e-2_seed=0",
        "lasso=1e-2_seed=1",
    ]
    assert made["lasso=1e-2_seed=1"] == grid.Job(
        f"{DIGITS},lasso=1e-2",
        ("--config.seed=1", "--config.batch.size=8"),
        {"lasso": "1e-2", "seed": "1"},
    )
    (alone,) = make_jobs("lasso=1", config="configs/maestro.py").values()
    assert alone.config == "configs/maestro.py:lasso=1"


def test_names_stay_apart():
    """Keys that end alike get more of their path, values that look alike a number."""
    assert list(make_jobs("config.a.rate=1,2", "config.b.rate=3,4"))[0] == (
        "a_rate=1_b_rate=3"
    )
    assert list(make_jobs("config.x=a/b,a b")) == ["x=a_b", "x=a_b_1"]
    with pytest.raises(UserError, match="config.seed 2 times") as caught:
        make_jobs("config.seed=1", "config.seed=2")
    check_form(str(caught.value))


def test_all_mistakes_of_all_configs_at_once():
    """Each is there once, with the jobs that have it, if not all have."""
    changed = "config.phases[0].optimizer.learning_rate"
    configs = grid.build_configs(make_jobs(f"{changed}=0.1,0.2"))
    rates = [c["phases"][0]["optimizer"]["learning_rate"] for c in configs.values()]
    assert rates == [0.1, 0.2]
    with pytest.raises(UserError) as caught:
        grid.build_configs(make_jobs("config.seed=0,-1,-2", "config.keep_best=0,-1"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("job seed=0_keep_best=-1 and seed=-1_keep_best=-1 and ")
    assert lines[1].startswith("job seed=-1_keep_best=0 and seed=-1_keep_best=-1: ")
    for line in lines:
        check_form(line.partition(": ")[2])
    for wrong in ("config.sede=0,1", "lasso=1,2", "config.seed=a,b"):
        with pytest.raises(UserError) as caught:
            grid.build_configs(make_jobs(wrong))
        for line in str(caught.value).splitlines():
            check_form(line)


def make_sweep(folder: Path, *grids: str) -> jobs.Sweep:
    """A sweep whose jobs run the stub."""
    made = make_jobs(*grids)
    configs = grid.build_configs(made)
    return jobs.create(
        folder, config=DIGITS, program="sweep_stub", jobs=made, configs=configs
    )


@pytest.fixture
def plan(monkeypatch):
    """Sets what the stub does."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)

    def set_plan(**plans: Sequence[str]) -> None:
        monkeypatch.setenv("STUB_PLAN", json.dumps(plans))

    return set_plan


def run(sweep: jobs.Sweep, *, slots: int = 2, restarts: int = 1) -> list[str]:
    with Signals() as signals:
        return pool.run(
            sweep, list(sweep.jobs), signals, slots=slots, restarts=restarts
        )


def attempts(sweep: jobs.Sweep) -> dict[str, int]:
    counts = {}
    for name in sweep.jobs:
        file = sweep.job_folder(name) / "workdir/attempts"
        counts[name] = len(file.read_text().splitlines()) if file.exists() else 0
    return counts


def test_every_end_of_a_job(tmp_path, plan):
    """Done stays done, 75 and a death go on, a mistake waits until it is asked for."""
    sweep = make_sweep(tmp_path / "sweep", "config.seed=0,1,2,3,4")
    ends = {"0": ["done"], "1": ["75", "done"], "2": ["kill", "done"], "3": ["1"]}
    plan(**{f"seed={seed}": ends[seed] for seed in ends}, **{"seed=4": ["75"]})
    assert run(sweep) == ["seed=4"]
    counts = {"seed=0": 1, "seed=1": 2, "seed=2": 2, "seed=3": 1, "seed=4": 2}
    assert attempts(sweep) == counts
    states = [sweep.state(name) for name in sweep.jobs]
    assert states == ["done", "done", "done", "failed", "waiting"]
    assert sweep.result("seed=1")["step"] == 7
    assert sweep.failure("seed=3") == "error: place: must be so, got 1. Mend it."
    plan(**{"*": ["done"]})
    assert run(sweep) == []
    assert attempts(sweep) == {**counts, "seed=4": 3}
    sweep.forget_failure("seed=3")
    assert run(sweep) == []
    assert attempts(sweep) == {**counts, "seed=3": 2, "seed=4": 3}
    log = (sweep.job_folder("seed=3") / "log.txt").read_text()
    assert log.count("must be so") == 1
    flags = (sweep.job_folder("seed=3") / "workdir/attempts").read_text().split()
    assert flags[:2] == [f"--config={DIGITS}", "--config.seed=3"]


def test_a_job_that_another_sweep_runs(tmp_path, plan):
    """It is waited for, not started."""
    sweep = make_sweep(tmp_path / "sweep", "config.seed=0,1")
    locked = contextlib.ExitStack()
    locked.enter_context(folders.lock(sweep.job_folder("seed=0")))
    assert sweep.state("seed=0") == "running"

    def finish() -> None:
        time.sleep(1.0)
        (sweep.job_folder("seed=0") / "result.json").write_text("{}")
        locked.close()

    threading.Thread(target=finish).start()
    assert run(sweep) == []
    assert attempts(sweep) == {"seed=0": 0, "seed=1": 1}


def test_a_stopped_sweep(tmp_path, plan):
    """SIGTERM goes on to what runs, and nothing more is started."""
    sweep = make_sweep(tmp_path / "sweep", "config.seed=0,1,2")
    plan(**{"*": ["wait"]})

    def stop() -> None:
        for seed in (0, 1):
            wait_for(tmp_path, f"sweep/jobs/seed={seed}/workdir/attempts")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert sorted(run(sweep, restarts=3)) == ["seed=0", "seed=1", "seed=2"]
    thread.join()
    assert attempts(sweep) == {"seed=0": 1, "seed=1": 1, "seed=2": 0}
    assert {sweep.state(name) for name in sweep.jobs} == {"waiting"}


def test_another_sweep_in_the_folder(tmp_path):
    """Refused by what differs; nothing is written."""
    make_sweep(tmp_path / "sweep", "config.seed=0,1")
    make_sweep(tmp_path / "sweep", "config.seed=0,1")  # the same one goes on
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        make_sweep(tmp_path / "sweep", "config.seed=1,2", "config.keep_best=3")
    message = str(caught.value)
    for part in ("seed=0: there, not here", "seed=2: here, not there"):
        assert part in message
    assert "job seed=1: config.keep_best: 1 there, 3 here" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/work").touch()
    with pytest.raises(UserError, match="holds other files") as caught:
        make_sweep(tmp_path / "mine", "config.seed=0,1")
    assert sorted(tmp_path.rglob("*")) == sorted(
        [*before, tmp_path / "mine", tmp_path / "mine/work"]
    )


def test_gathered(tmp_path, plan, capsys):
    """A row a job and fraction; what is missing is named; the picture is there."""
    sweep = make_sweep(tmp_path / "sweep", "config.seed=0,1,2", "config.keep_best=1,2")
    plan(**{"*": ["done"], "seed=2_keep_best=1": ["1"], "seed=2_keep_best=2": ["75"]})
    run(sweep, restarts=0)
    summary = gather.gather(sweep)
    assert sorted(summary["jobs"].values()) == ["done"] * 4 + ["failed", "waiting"]
    printed = capsys.readouterr().out
    assert printed == (sweep.folder / "table.txt").read_text()
    lines = printed.splitlines()
    headers = ["seed", "keep_best", "step", "rank_fraction", "accuracy", "params"]
    assert lines[0].split() == [*headers, "macs"]
    assert lines[2].split() == ["0", "1", "7", "1", "1", "100", "90"]
    assert len(lines) == 2 + 8 + 2
    assert lines[-2].startswith("seed=2_keep_best=1: failed: error: place: must be so")
    assert lines[-1] == "seed=2_keep_best=2: waiting"
    rows = json.loads((sweep.folder / "results.json").read_text())["rows"]
    assert rows == gather.rows(sweep) and len(rows) == 8
    picture = tmp_path / "picture.png"
    assert gather.draw(sweep, rows, gather.Headline("accuracy", True), picture)
    series, marks = gather.series_of(sweep, rows, gather.Headline("accuracy", True))
    assert list(series) == list(marks) == ["keep_best=1", "keep_best=2"]
    for own in series.values():  # jobs that differ in their seed are one line
        assert sorted({row["seed"] for row in own}) == ["0", "1"] and len(own) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not gather.draw(sweep, [], gather.Headline("accuracy", True), picture)


def test_the_command_line(tmp_path, plan, monkeypatch):
    """Mistakes, Slurm's array and its elements; sbatch is a stand-in here."""
    plan(**{"*": ["done"], "seed=1": ["75", "done"], "seed=2": ["1"]})
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/submitted\necho "77;try"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    folder = f"--output={tmp_path}/sweep"
    words = ["launch.sweep", f"--config={DIGITS}", folder, "--program=sweep_stub"]
    whole = [*words, "--grid=config.seed=0,1,2"]
    job = ["launch.job", f"--sweep={tmp_path}/sweep"]
    ended = commands.run(
        {
            "nothing": ["launch.sweep", folder],
            "no sweep": ["launch.sweep", folder, "--gather"],
            "wrong": [*words, "--grid=config.sede=0"],
            "alone": [*whole, "--sbatch_args=--time=1"],
            "submit": [*whole, "--slurm", "--sbatch_args=--time=1:00 --qos=x"],
            "element stopped": job,
            "element done": job,
            "element again": job,
            "element failed": [*job, "--index=2"],
            "no element": [*job, "--index=3"],
            "the rest": [*whole, "--slurm"],
            "failed": whole,
            "gather": ["launch.sweep", folder, "--gather"],
            "another": [*words, "--grid=config.seed=0"],
        }
    )
    for name, part in {
        "nothing": "--config, --grid: must be given",
        "no sweep": "--output: must be the folder of a sweep",
        "wrong": "--config.sede: must be a key of the config, got",
        "alone": "--sbatch_args: acts only with --slurm",
        "no element": "--index: must be in [0, 2], got 3",
        "element failed": "seed=2: must end with status 0, got error: place",
    }.items():
        last = ended[name].err.splitlines()[-1]
        assert ended[name].status == 1 and last.startswith(f"error: {part}"), ended[
            name
        ]
    assert ended["submit"].result["slurm_job"] == "77"
    assert (tmp_path / "submitted").read_text().split()[:2] == [
        "--parsable",
        "--array=0",  # what was left at the second time
    ]
    assert [ended[f"element {n}"].status for n in ("stopped", "done", "again")] == [
        75,
        0,
        0,
    ]
    assert ended["failed"].status == 1
    assert "got another for ['seed=2']" in ended["failed"].err
    states = {"seed=0": "done", "seed=1": "done", "seed=2": "failed"}
    assert ended["gather"].result["jobs"] == states
    assert "seed=1: there, not here" in ended["another"].err
    assert attempts(jobs.read(tmp_path / "sweep")) == {
        "seed=0": 1,
        "seed=1": 2,
        "seed=2": 1,
    }


def wait_for(folder: Path, pattern: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < until, pattern
        time.sleep(0.02)


def test_a_killed_sweep_goes_on(tmp_path, plan):
    """Started again, twice at once, it repeats nothing that was done."""
    plan(**{"seed=0": ["done"], "seed=1": ["wait", "done"], "*": ["done"]})
    words = [sys.executable, "-m", "launch.sweep", f"--config={DIGITS}"]
    words += ["--grid=config.seed=0,1,2,3", f"--output={tmp_path}/sweep"]
    words += ["--program=sweep_stub"]
    killed = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(tmp_path, "sweep/jobs/seed=1/workdir/attempts")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    both = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    for again in both:
        out, _ = again.communicate(timeout=60)
        assert again.returncode == 0
        states = json.loads(out.splitlines()[-1])["jobs"]
        assert set(states.values()) == {"done"} and len(states) == 4
    sweep = jobs.read(tmp_path / "sweep")
    assert attempts(sweep) == {"seed=0": 1, "seed=1": 2, "seed=2": 1, "seed=3": 1}


@pytest.mark.slow
def test_six_maestro_runs(tmp_path):
    """Lambda times seed by one command; killed in the middle, it repeats nothing."""
    words = [sys.executable, "-m", "launch.sweep"]
    words += ["--config=tests/launch/maestro_digits.py", f"--output={tmp_path}/sweep"]
    words += ["--grid=lasso=1e-4,1e-3,1e-2", "--grid=config.seed=0,1", "--jobs=2"]
    folder = tmp_path / "sweep/jobs"
    with subprocess.Popen(words, cwd=ROOT) as killed:
        try:  # until two are done and the next one has a checkpoint
            wait_for(folder, "lasso=1e-4_seed=0/result.json", 600)
            wait_for(folder, "lasso=1e-4_seed=1/result.json", 600)
            wait_for(folder, "lasso=1e-3_seed=0/workdir/checkpoints/*[0-9]", 600)
        finally:
            killed.kill()
    middle = folder / "lasso=1e-3_seed=0"
    done = {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}
    assert 2 <= len(done) < 6
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    print(again.stdout)
    result = json.loads(again.stdout.splitlines()[-1])
    assert set(result["jobs"].values()) == {"done"} and len(result["jobs"]) == 6
    assert {file: file.stat().st_mtime_ns for file in done} == done
    for file in done:  # one attempt; the one that was killed went on
        assert "resuming" not in (file.parent / "log.txt").read_text()
        assert f"{file.parent.name}: started" not in again.stderr
    assert "resuming at step" in (middle / "log.txt").read_text()
    # a checkpoint says what is drawn
    assert gather.headline(jobs.read(tmp_path / "sweep")) == ("accuracy", True)
    assert (tmp_path / "sweep/sweep.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "sweep/results.json").read_text())["rows"]
    assert len(rows) == 24
    # more lasso, fewer parameters, until Adam's steps are what limits the shrinking
    half = [row for row in rows if row["rank_fraction"] == 0.5]
    size = {(row["lasso"], row["seed"]): row["params"] for row in half}
    for seed in "01":
        assert size["1e-4", seed] > max(size["1e-3", seed], size["1e-2", seed])
