"""Progress: bars of work inside other work, and what a terminal shows of them."""

import re
import sys
from contextlib import suppress

import pytest
from tests.support.terminal import screens, written_in_terminal

from prolu.runtime import progress
from prolu.runtime.progress import Meter, compiling, doing

WORK = """
import logging, sys, time
from prolu.runtime.progress import Meter, doing

with Meter("reading text", 3) as meter:
    meter.advance(3)
with Meter("training", 4000, n_saes=12) as training:
    with doing("reading activations"):
        time.sleep(0.15)
    for part in range(4):
        time.sleep(0.15)
        with doing("compiling kernels"):
            time.sleep(0.1)
        training.advance(1000)
        if part == 2:
            print("prolu: one of the runs failed", file=sys.stderr, flush=True)
        if part >= 2:
            with Meter("evaluating", 50) as evaluating:
                time.sleep(0.15)
                evaluating.advance(50)
                time.sleep(0.15)
    with Meter("looking at latents of several hooks", 10, shown=False) as hidden:
        hidden.advance(10)
with Meter("looking at latents", 10) as latents:
    latents.advance(5)
"""
NAMES = ("reading text", "training", "evaluating", "looking at latents")


@pytest.mark.parametrize("width", [60, 80, 130])
def test_no_line_holds_two_bars(width):
    written = written_in_terminal([sys.executable, "-c", WORK], width)
    shown = list(screens(written, width))
    lines = {line for screen in shown for line in screen}
    assert any("evaluating" in line for line in lines)
    for line in lines:
        assert len(line) <= width
        assert line.count("%") <= 1
        assert sum(name in line for name in NAMES) <= 1, line
        assert not re.search(r"\b0 tokens/s", line), line
        if "%" in line:
            assert line.startswith(NAMES), line
    assert any(line.startswith("training") and line.endswith("compiling kernels") for line in lines)
    assert any(line.startswith("training") and line.endswith("reading activations") for line in lines)
    assert any("SAE-tokens/s" in line for line in lines) == (width == 130)
    last = [line for line in shown[-1] if line]
    assert [re.match(r"[a-z ]+", line)[0].strip() for line in last] == ["reading text", "prolu", *NAMES[1::2]]
    assert "one of the runs failed" in last[1]


def test_one_display_for_work_in_work_and_a_new_one_afterwards(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as rich sees it
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Meter("training", 10) as outer:
        display = progress._bars._display
        assert display is not None
        with suppress(KeyboardInterrupt), Meter("evaluating", 5) as inner:
            assert progress._bars._display is display
            assert len(display.tasks) == 2
            inner.advance(2)
            raise KeyboardInterrupt
        assert [task.description for task in display.tasks] == ["training"]
        with doing("compiling kernels"):
            assert display.tasks[0].fields["note"] == "compiling kernels"
        assert display.tasks[0].fields["note"] == ""
        outer.advance(4)
        outer.forget(2)
        assert (display.tasks[0].completed, display.tasks[0].total) == (4, 8)
    assert progress._bars._display is None


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr("prolu.runtime.progress.time.monotonic", lambda: next(clock))
    heard = []
    monkeypatch.setattr(progress, "listeners", [lambda *facts: heard.append(facts)])
    with Meter("training", 1000, n_saes=3) as meter, doing("compiling kernels"):
        meter.advance(100)
        meter.advance(400)
    first, second = capsys.readouterr().err.splitlines()
    # The first part waits for a window of activations, so nothing follows from it for the others.
    assert re.fullmatch(r"training 10%  0:\d\d:\d\d passed", first)
    assert re.fullmatch(r"training 50%  \d+ tokens/s, \d+ SAE-tokens/s  0:\d\d:\d\d passed, 0:\d\d:\d\d left", second)
    assert heard == [("training", 100, 1000), ("training", 500, 1000)]


def test_the_first_batches_give_no_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("prolu.runtime.progress.time.monotonic", lambda: now[0])
    with Meter("training", 100_000) as meter:
        for _ in range(4):
            now[0] += 20
            meter.advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert ["left" in line for line in lines] == [False, False, True, True]  # 60 s have passed
    with Meter("training", 1000) as meter:
        for _ in range(2):
            now[0] += 16
            meter.advance(20)
    assert capsys.readouterr().err.endswith("0:00:32 passed, 0:12:48 left\n")  # 4% are done


def test_compiling_counts_in_no_rate(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("prolu.runtime.progress.time.monotonic", lambda: now[0])
    with Meter("training", 1000) as meter:
        for compiled, trained in [(16, 4), (30, 4), (0, 20)]:  # seconds
            with compiling():
                now[0] += compiled
            now[0] += trained
            meter.advance(100)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "training 10%  0:00:20 passed (of these 0:00:16 compiling kernels)"
    # 200 tokens took 8 s of work, so 800 take 32 s. With the 46 s of compiling it would have been 216 s.
    assert second == "training 20%  25 tokens/s  0:00:54 passed (of these 0:00:46 compiling kernels), 0:00:32 left"
    assert third == "training 30%  11 tokens/s  0:01:14 passed (of these 0:00:46 compiling kernels), 0:01:05 left"
    assert meter.tokens_per_second == 300 / 74  # what log.jsonl records is the whole time


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("prolu.runtime.progress.time.monotonic", lambda: next(clock))


def shown_in_notebook(written):
    """What a notebook shows of its output: after a carriage return, a line is written over from its beginning."""
    found = []
    for line in written.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        found.append(shown.rstrip())
    return found


@pytest.mark.usefixtures("notebook")
def test_a_notebook_has_one_line_that_is_written_over(capsys):
    looks = iter(["L0 9.1", "L0 7.2", "L0 5.3"])
    with Meter("training", 1000, n_saes=3, figures=lambda: next(looks)) as meter:
        meter.advance(250)
        meter.advance(250)
        with Meter("evaluating", 10) as inner:
            with doing("compiling kernels"):
                inner.advance(5)
            inner.advance(5)
        meter.advance(500)
    with Meter("looking at latents", 10):
        pass
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 2
    parts = [part.rstrip() for part in re.split(r"[\r\n]", captured.out) if part]
    assert parts[0] == "training 0%"
    assert parts[1] == "training 25%, L0 9.1"  # after one batch nothing is known of the rate
    assert re.fullmatch(r"training 50%, 0:00:\d\d left, L0 7.2", parts[2])
    assert parts[3:5] == ["evaluating 0%", "evaluating 0%, compiling kernels"]
    assert re.fullmatch(r"evaluating 100%, 0:00:\d\d", parts[6])
    first, second, rest = shown_in_notebook(captured.out)
    assert re.fullmatch(r"training 100%, 0:00:\d\d, L0 5.3", first)
    assert second.startswith("looking at latents 0%")
    assert rest == ""


@pytest.mark.usefixtures("notebook")
def test_the_line_of_a_notebook_ends_when_work_is_interrupted(capsys):
    with suppress(KeyboardInterrupt), Meter("training", 1000) as outer:
        outer.advance(10)
        with Meter("evaluating", 10):
            raise KeyboardInterrupt
    with Meter("training", 1000, shown=False):
        outer.advance(0)
    assert capsys.readouterr().out.endswith("\n")


def test_a_line_that_is_not_due_is_not_written(monkeypatch, capsys):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr("prolu.runtime.progress.time.monotonic", lambda: 5.0)
    looks = []
    with Meter("training", 1000, figures=lambda: looks.append(1) or "") as meter:
        for _ in range(100):
            meter.advance(10)
    assert capsys.readouterr().out.count("\r") == 2
    assert not looks
