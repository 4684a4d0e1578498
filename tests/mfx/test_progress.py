"""The line for somebody who waits at a terminal."""

import io
import sys
import time
from contextlib import contextmanager

import pytest

import mfx
from mfx import progress
from mfx.cli import main
from tests.mfx.models import Stack


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(monkeypatch, stderr, setting=None, seconds=0.2):
    monkeypatch.setattr(progress, "_PATIENCE", 0.01)
    monkeypatch.setattr(sys, "stderr", stderr)
    if setting is None:
        monkeypatch.delenv("MFX_PROGRESS", raising=False)
    else:
        monkeypatch.setenv("MFX_PROGRESS", setting)
    with progress.waiting_for("capturing Net"):
        time.sleep(seconds)
    return stderr.getvalue()


def test_it_is_said_on_a_terminal_and_taken_back(monkeypatch):
    line = "mfx: capturing Net …"
    assert said(monkeypatch, Terminal()) == f"{line}\r{' ' * len(line)}\r"


@pytest.mark.parametrize(("stderr", "setting"), [(Terminal(), "0"), (io.StringIO(), None), (io.StringIO(), "0")])
def test_silence(monkeypatch, stderr, setting):
    assert said(monkeypatch, stderr, setting) == ""


def test_a_log_that_asks_for_it(monkeypatch):
    assert said(monkeypatch, io.StringIO(), "1") == "mfx: capturing Net …\n"


def test_quick_work_is_not_spoken_of(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 60.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.waiting_for("capturing Net"):
        pass
    assert sys.stderr.getvalue() == ""


def test_captures_say_what_they_do(monkeypatch):
    what = []
    monkeypatch.setattr(
        "mfx.net.graph_table.waiting_for", lambda words: what.append(words) or progress.waiting_for(words)
    )
    mfx.momentumize(Stack())
    assert what == ["tracing Stack"]


def test_work_within_work_takes_the_place_of_the_line(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.05)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("MFX_PROGRESS", raising=False)
    with progress.waiting_for("drawing Net"):
        time.sleep(0.3)
        with progress.waiting_for("capturing Net"):
            time.sleep(0.3)
    outer, inner = "mfx: drawing Net …", "mfx: capturing Net …"
    gone = [f"\r{' ' * len(line)}\r" for line in (outer, inner, outer)]
    assert sys.stderr.getvalue() == outer + gone[0] + inner + gone[1] + outer + gone[2]
    assert progress._SAID == []


def test_a_timer_that_waits_for_the_end_of_the_work_says_nothing(monkeypatch):
    timers = []

    class Timer:
        daemon = False

        def __init__(self, seconds, say):
            timers.append(say)

        def start(self):
            pass

        def cancel(self):
            pass

    monkeypatch.setattr(progress.threading, "Timer", Timer)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("MFX_PROGRESS", raising=False)
    with progress.waiting_for("capturing Net"):
        pass
    timers[0]()  # it had fired, and got the lock when the work was done
    assert sys.stderr.getvalue() == ""
    assert progress._SAID == []


@pytest.mark.parametrize(
    ("words", "work"),
    [
        (["explain", "--input", "2,8"], ["building", "rehearsing a training step of Stack", "explaining Stack"]),
        (["draw", "-o", "net.svg"], ["building", "drawing Stack"]),
        (["profile", "--input", "2,8", "--repeats", "1"], ["building", "profile: measuring training steps"]),
        (
            ["report", "--input", "2,8", "--repeats", "1", "-o", "net.html"],
            ["building", "profile: measuring training steps", "rehearsing", "explaining Stack", "drawing Stack"],
        ),
    ],
)
def test_every_command_says_what_it_does(monkeypatch, tmp_path, capsys, words, work):
    """Each piece of work that may take long is spoken of; a library's patience is set to nothing."""
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setenv("MFX_PROGRESS", "1")
    monkeypatch.chdir(tmp_path)
    slow = progress.waiting_for

    @contextmanager
    def waiting_for(what):
        with slow(what):
            time.sleep(0.05)
            yield

    for name, module in list(sys.modules.items()):
        if name.startswith("mfx.") and name != "mfx.progress" and hasattr(module, "waiting_for"):
            monkeypatch.setattr(module, "waiting_for", waiting_for)
    assert main([words[0], "tests.mfx.models:Stack", *words[1:]]) == 0
    said_ = capsys.readouterr().err
    places = [said_.find(f"mfx: {what}") for what in work]
    assert -1 not in places
    assert places == sorted(places)
