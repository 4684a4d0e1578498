"""Texts that a model writes to the standard streams, in whatever way, are those that it writes without mfx."""

import os
import pprint
import sys
import traceback
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mfx
from tests.sampling import grid

WAYS = {
    "print": lambda x: print("said"),
    "print to stderr": lambda x: print("said", file=sys.stderr),
    "stdout": lambda x: sys.stdout.write("said\n"),
    "stderr": lambda x: sys.stderr.write("said\n"),
    "the stream of the process": lambda x: sys.__stdout__.write("said\n"),
    "lines": lambda x: sys.stdout.writelines(["said\n", "again\n"]),
    "bytes": lambda x: (sys.stdout.buffer.write(b"said\n"), sys.stdout.flush()),
    "the file": lambda x: os.write(2, b"said\n"),
    "a library": lambda x: pprint.pprint({"width": x.shape[-1], "names": ["said"] * 40}),
    "a traceback": lambda x: traceback.print_exception(ValueError("said")),
    "a value": lambda x: sys.stdout.write(f"mean {x.mean()}\n"),
}


class Branch(nn.Module):
    """A branch that writes."""

    def __init__(self, write):
        super().__init__()
        self.fc, self.write = nn.Linear(4, 4), write

    def forward(self, x):
        self.write(x)
        return self.fc(x)


class Model(nn.Module):
    """Three steps; the model itself writes, or every branch does."""

    def __init__(self, write, place):
        super().__init__()
        torch.manual_seed(0)
        self.write = write if place == "model" else lambda x: None
        branches = [Branch(write) if place == "branch" else nn.Linear(4, 4) for _ in range(3)]
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        self.write(x)
        for branch in self.branches:
            x = x + branch(x)
        return x


def said_by(model, capfd):
    """Return the texts that two training steps write to both streams."""
    capfd.readouterr()
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        stream.flush()
    return capfd.readouterr()


@grid(len(WAYS), way=list(WAYS), place=["model", "branch"], capture=["auto", "dynamo"])
@pytest.mark.filterwarnings("ignore:mfx", "ignore:Dynamo does not know")  # of models that are no one graph
def test_a_text_is_written_once_in_each_call(way, place, capture, capfd):
    expected = said_by(Model(WAYS[way], place), capfd)
    assert any(expected)
    net = mfx.momentumize(Model(WAYS[way], place), gamma=0.0, capture=capture)
    assert capfd.readouterr() == ("", "")
    assert said_by(net, capfd) == expected


def test_a_stream_that_the_model_holds_is_written_to_and_streams_are_left_as_they_were(capfd):
    stream = sys.stdout
    expected = said_by(Model(lambda x: stream.write("said\n"), "branch"), capfd)
    assert said_by(mfx.momentumize(Model(lambda x: stream.write("said\n"), "branch"), gamma=0.0), capfd) == expected
    assert "write" not in {**vars(sys.stdout), **vars(sys.stderr), **vars(sys.stdout.buffer)}


NOTED = {"by hooks": []}


class Noting:
    """A hook of the user's, which says what it notes outside of the model."""

    def __call__(self, module, args):
        print("noting")
        NOTED["by hooks"].append(len(args))


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
@pytest.mark.parametrize("ends", [False, True], ids=["", "with an exception"])
@pytest.mark.filterwarnings("ignore:mfx", "ignore:Dynamo does not know")
def test_what_a_hook_notes_outside_of_the_model_is_noted_once_in_each_call(capture, ends, capfd):
    def noted_by(model):
        model.branches[1].register_forward_pre_hook(Noting())
        if ends:
            model.branches[2].register_forward_pre_hook(lambda module, args: sys.exit())
        NOTED["by hooks"].clear()
        for size in (2, 2, 3):
            with pytest.raises(SystemExit) if ends else nullcontext():
                model(torch.ones(size, 4))
        return list(NOTED["by hooks"])

    assert noted_by(mfx.momentumize(Model(lambda x: None, "model"), gamma=0.0, capture=capture)) == [1, 1, 1]
