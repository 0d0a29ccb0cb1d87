"""What a run says while it trains: lines or a bar, a rate of nothing but training."""

import io
import sys

import pytest

from train.report import progress as progress_lib
from train.report.progress import Progress


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The clock, as one number that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    return now


def run_of_steps(progress: Progress, now: list[float]) -> None:
    """A minute of compiling, then ten steps a second, with an evaluation of a minute
    and a save between them, and a second compilation, then five steps a second."""
    progress.compiling(0, "the step of phase nested")
    now[0] = 60.0
    progress.compiled()
    now[0] = 60.5  # the first step is waited for
    progress.training(1)
    for step in (2, 11, 12, 31, 61):
        now[0] = 60.5 + (step - 1) / 10
        if progress.due():
            progress.update(step)
    progress.doing("evaluating", 61)
    now[0] += 60
    progress.update(61, "validation loss 2", at_once=True)
    progress.doing("saving", 61)
    now[0] += 60
    progress.training(61)
    now[0] += 6
    progress.update(121, "loss 1")
    progress.compiling(121, "the step of phase prune")
    now[0] += 30
    progress.compiled()
    progress.training(122)
    now[0] += 15.8
    progress.update(201, "loss 0.5")


def test_lines_without_a_terminal(tmp_path, capsys, now):
    """The first rate comes a second after the first step, with the time that is left;
    neither compilations nor an evaluation nor a save enter any of them."""
    with Progress(tmp_path, 201) as progress:
        run_of_steps(progress, now)
    assert capsys.readouterr().err.splitlines() == [
        "step 0/201, compiling the step of phase nested ...",
        "compiled in 60.0 s",
        "step 11/201, 10 steps/s, 00:19 left",
        "step 61/201, 10 steps/s, 00:14 left",
        "step 61/201, compiling the evaluation ...",
        "step 61/201, 10 steps/s, 00:14 left, validation loss 2",
        "step 121/201, 10 steps/s, 00:08 left, loss 1",
        "step 121/201, compiling the step of phase prune ...",
        "compiled in 30.0 s",
        "step 201/201, 5 steps/s, loss 0.5",
    ]


def test_there_is_no_rate_before_a_step_was_timed(tmp_path, capsys, now):
    """The step that compiles is none; a run that ends with it has no rate at all."""
    with Progress(tmp_path, 1) as progress:
        progress.compiling(0, "the step of phase only")
        now[0] = 5.0
        progress.compiled()
        progress.update(1, "loss 2")
    assert capsys.readouterr().err.splitlines()[-1] == "step 1/1, loss 2"


def test_lines_are_few(tmp_path, capsys, now):
    """Every step says something, a line comes every five seconds."""
    with Progress(tmp_path, 20, start=8) as progress:
        progress.training(8)
        for step in range(9, 21):
            now[0] += 1
            progress.update(step, f"loss {step}")
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "step 9/20",
        "step 14/20",
        "step 19/20",
        "step 20/20",
    ]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, now):
    """It has the same rate and time left; compilations keep their line."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(tmp_path, 201) as progress:
        run_of_steps(progress, now)
    text = terminal.getvalue()
    assert "compiled in 60.0 s\n" in text
    assert "121/201 [" in text and "10 steps/s, 00:08 left, loss 1" in text
    assert "201/201 [" in text and "5 steps/s, loss 0.5" in text
