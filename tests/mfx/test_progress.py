"""The line for somebody who waits at a terminal."""

import io
import sys
import time

import pytest

import mfx
from mfx import progress
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
