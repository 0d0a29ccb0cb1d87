"""The fault campaign: `python -m tests.faults.campaign --runs=200 --jobs=2`.

A small Maestro training is disturbed again and again, and started again until it is
done; then its parameters must be those of the undisturbed run in every bit, its metrics
must have every step once, and nothing may lie about. Everything that is drawn comes
from `--seed` and the number of the run. Prints a table of what was tried, and writes it
with `--report=FILE`; ends with status 1 if a run was lost.
"""

import argparse
import concurrent.futures
import contextlib
import queue
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules

from disks import NoDisk, small_disk

from tests.faults import report
from tests.faults.attempts import CONFIG, Kill, Outcome, Server, choose_moment
from tests.faults.plan import ROWS, Row, deal
from tests.faults.verdict import complete_steps, damage, problems_of, untidy

REQUEUE, MISTAKE, KILLED, TERMINATED, ABORTED = 75, 1, -9, -15, -6
MOST_ATTEMPTS = 8
FURTHER_PLACES = sorted({row.place for row in ROWS if row.kind == "SIGKILL"})
SECOND_FAULT = 0.35
"""How likely an attempt that goes on is disturbed once more."""
MOST_SECONDS_ALONE = 60.0
"""How long a process may outlive its peer."""
DISK_MEGABYTES = 8


class Undisturbed(NamedTuple):
    """A run that nothing happened to.

    Args:
      workdir: Its folder.
      outcome: Of its one attempt.
    """

    workdir: Path
    outcome: Outcome

    @property
    def seconds(self) -> float:
        return max(self.outcome.ended)


class Trial:
    """One run with its faults.

    Args:
      row: What happens first.
      folder: For the run and its logs.
      server: Starts its attempts.
      undisturbed: The same run without faults, with as many processes.
      rng: What moments are drawn from.
    """

    def __init__(
        self,
        row: Row,
        folder: Path,
        server: Server,
        undisturbed: Undisturbed,
        rng: random.Random,
    ):
        self._row, self._folder, self._server = row, folder, server
        self._undisturbed, self._rng = undisturbed, rng
        self.workdir = folder / "run"
        self.result = report.Result(row, [], [], 0.0, [], [])
        self._attempts, self._done = 0, False

    def run(self) -> report.Result:
        """Disturbs the run, starts it again until it is done, and judges it."""
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            if "disk" in self._row.kind:
                disk = stack.enter_context(
                    small_disk(self._folder / "disk", DISK_MEGABYTES)
                )
                self.workdir = disk.folder / "run"
            if self._row.kind == "full disk":
                self._fill_up(disk)
            elif self._row.kind == "read-only disk":
                self._disturb("SIGKILL", "step")
                disk.write_protect()
                self._expect_mistake()
                disk.write_protect(False)
            elif "checkpoint" in self._row.place:
                self._damage_newest()
            else:
                self._disturb(self._row.kind.split()[0], self._row.place)
            self._go_on()
        return self.result._replace(seconds=time.monotonic() - began)

    def _attempt(self, kill: Kill | None = None) -> Outcome:
        self._attempts += 1
        log = self._folder / f"attempt_{self._attempts}"
        outcome = self._server.attempt(
            self.workdir, log, processes=self._row.processes, kill=kill
        )
        self._done = outcome.done
        if outcome.timed_out:
            self.result.problems.append(f"attempt {self._attempts}: no end")
        return outcome

    def _disturb(self, signal: str, place: str) -> Outcome:
        """Makes an attempt with a signal at a moment of a place."""
        number = choose_moment(
            self._rng,
            place,
            self._undisturbed.outcome.counts,
            self._undisturbed.seconds,
        )
        victims = self._rng.sample(range(self._row.processes), self._row.victims)
        outcome = self._attempt(Kill(signal, victims, place, number))
        what = f"{signal} to {victims} at {place} {number:.3g}"
        self._note(what, outcome, struck=bool(outcome.struck))
        allowed = [0, REQUEUE, KILLED if signal == "SIGKILL" else TERMINATED]
        if self._row.processes > 1 and 0 in victims:
            allowed.append(ABORTED)  # JAX's own end for who loses the coordinator
        self._check(outcome, allowed if outcome.struck else [0])
        if outcome.struck and signal == "SIGKILL" and len(victims) < len(outcome.ended):
            first, last = min(outcome.ended), max(outcome.ended)
            self.result.seconds_alone.append(last - first)
            if last - first > MOST_SECONDS_ALONE:
                self.result.problems.append(f"a peer lived on for {last - first:.0f} s")
        return outcome

    def _damage_newest(self) -> None:
        """Kills the run late, then damages its newest checkpoint."""
        while len(complete_steps(self.workdir)) < 2:
            steps = self._undisturbed.outcome.counts["step"]
            number = self._rng.randint(steps // 2, steps)
            outcome = self._attempt(Kill("SIGKILL", [0], "step", number))
            self._check(outcome, [0, KILLED])
        newest = complete_steps(self.workdir)[0]
        folder = self.workdir / "checkpoints" / str(newest)
        what = damage(self._rng, folder, self._row.kind)
        outcome = self._attempt()
        said = str(folder) in outcome.err[0]
        self._note(f"{newest}: {what}; {'named' if said else 'not noticed'}", outcome)
        self.result.named.append(said)
        self._check(outcome, [0])

    def _fill_up(self, disk: object) -> None:
        """Leaves a share of the space that the run needs."""
        needed = sum(
            file.stat().st_blocks * 512
            for file in self._undisturbed.workdir.rglob("*")
            if file.is_file()
        )
        share = self._rng.uniform(0.05, 0.9)
        disk.fill(leaving=int(share * needed))
        self._expect_mistake(f"{share:.0%} of the space")
        disk.empty()

    def _expect_mistake(self, note: str = "") -> None:
        """Makes an attempt that must end with one line that names the place."""
        before = {step: self._bits(step) for step in complete_steps(self.workdir)}
        outcome = self._attempt()
        self._note(f"{self._row.kind} {note}", outcome)
        self._check(outcome, [MISTAKE])
        lines = [line for line in outcome.err[0].splitlines() if "error: " in line]
        if len(lines) != 1 or str(self.workdir.parent) not in lines[0]:
            self.result.problems.append(f"message: {lines or outcome.err[0][-200:]}")
        for step in before.keys() & set(complete_steps(self.workdir)):
            if self._bits(step) != before[step]:
                self.result.problems.append(f"checkpoint {step}: changed")

    def _bits(self, step: int) -> dict[str, bytes]:
        folder = self.workdir / "checkpoints" / str(step)
        return {
            str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    def _go_on(self) -> None:
        """Starts the run again until it is done, with further faults or without."""
        while not self._done:
            if self._attempts == MOST_ATTEMPTS:
                self.result.problems.append(f"not done after {MOST_ATTEMPTS} attempts")
                return
            if self._attempts < 4 and self._rng.random() < SECOND_FAULT:
                self._disturb("SIGKILL", self._rng.choice(FURTHER_PLACES))
            else:
                self._check(self._attempt(), [0])
        self.result.problems.extend(
            problems_of(self.workdir, self._undisturbed.workdir)
        )

    def _note(self, fault: str, outcome: Outcome, *, struck: bool = True) -> None:
        if struck:
            self.result.faults.append(f"{fault} -> {outcome.statuses}")

    def _check(self, outcome: Outcome, allowed: Sequence[int]) -> None:
        self.result.problems.extend(
            f"attempt {self._attempts}: {problem}"
            for problem in untidy(outcome.err, outcome.statuses, allowed)
        )


def undisturbed_run(server: Server, folder: Path, processes: int) -> Undisturbed:
    """Runs the training without a fault."""
    workdir = folder / f"undisturbed_{processes}"
    log = folder / f"undisturbed_{processes}.log"
    outcome = server.attempt(workdir, log, processes=processes, timeout=600)
    if not outcome.done:
        raise RuntimeError(f"the undisturbed run failed: {outcome}")
    return Undisturbed(workdir, outcome)


def run_campaign(
    rows: Sequence[Row],
    folder: Path,
    cache: Path,
    *,
    config: str = CONFIG,
    jobs: int = 1,
    seed: int = 0,
) -> list[report.Result]:
    """Runs a trial for each row.

    Args:
      rows: What happens to each run first.
      folder: For all of it; the folder of a run that survived is removed.
      cache: Folder of compiled programs.
      config: What is trained.
      jobs: How many at a time.
      seed: Of all that is drawn.
    """
    servers: queue.Queue[Server] = queue.Queue()
    with contextlib.ExitStack() as stack:
        for _ in range(jobs):
            server = Server(config, folder / "servers.log", cache)
            servers.put(stack.enter_context(contextlib.closing(server)))
        undisturbed = {
            processes: undisturbed_run(server, folder, processes)
            for processes in sorted({row.processes for row in rows})
        }

        def trial(number: int) -> report.Result:
            row, of_run = rows[number], folder / f"run_{number}"
            of_run.mkdir()
            server = servers.get()
            rng = random.Random(f"{seed}/{number}")
            try:
                one = Trial(row, of_run, server, undisturbed[row.processes], rng)
                result = one.run()
            finally:
                servers.put(server)
            if not result.problems:
                shutil.rmtree(of_run)
            return result

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            results = []
            for number, result in enumerate(pool.map(trial, range(len(rows)))):
                _say(number, len(rows), result)
                results.append(result)
            return results


def _say(number: int, count: int, result: report.Result) -> None:
    verdict = "LOST: " + "; ".join(result.problems) if result.problems else "survived"
    faults = "; ".join(result.faults)
    print(
        f"run {number + 1}/{count}, {result.seconds:.1f} s, {result.row.kind}"
        f" ({result.row.place}): {verdict} [{faults}]",
        file=sys.stderr,
        flush=True,
    )


def _mountable(folder: Path) -> bool:
    try:
        with small_disk(folder):
            return True
    except NoDisk as reason:
        print(f"no runs on small disks: {reason}", file=sys.stderr)
        return False


def main() -> None:
    """Runs the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds and places with this text")
    parser.add_argument("--report", type=Path, help="file for the page")
    parser.add_argument("--folder", type=Path, help="kept; else a temporary one")
    parser.add_argument("--cache", type=Path, help="folder of compiled programs")
    options = parser.parse_args()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="faults_"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in ROWS if options.only in f"{row.kind} {row.place}"]
        if not _mountable(folder / "disk"):
            rows = [row for row in rows if "disk" not in row.kind]
        results = run_campaign(
            deal(options.runs, rows),
            folder,
            options.cache or folder / "cache",
            jobs=options.jobs,
            seed=options.seed,
        )
    about = {
        "command": f"`python -m tests.faults.campaign {' '.join(sys.argv[1:])}`",
        "hardware": report.hardware(),
        "date": report.today(),
        "time": f"{(time.monotonic() - began) / 60:.0f} minutes",
        "seed": str(options.seed),
    }
    print(report.table(results))
    if options.report:
        options.report.write_text(report.page(results, about))
    sys.exit(any(result.problems for result in results))


if __name__ == "__main__":
    main()
