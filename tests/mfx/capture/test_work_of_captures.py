"""The work of a capture: a model is not traced, run or looked through again where the first time has told all."""

from unittest import mock

import pytest
import torch
from torch import nn

from mfx.capture.captured import CaptureError
from mfx.capture.dynamo import call, first_call
from mfx.modules import python_state
from mfx.modules.aside import aside
from mfx.modules.python_state import state_of


class Breaking(nn.Module):
    """Looks at a value, which TorchDynamo does not follow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.notes = []

    def forward(self, x):
        x = self.layer(x)
        return x if float(x.detach().numpy().sum()) > 0 else -x


class Noting(Breaking):
    def forward(self, x):
        self.last = 1
        return super().forward(x)


class Preparing(nn.Module):
    """Gets its table at its first call, which is a graph break."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", None)
        self.__dict__["spare"] = torch.ones(4)

    def forward(self, x):
        if self.table is None:
            torch._dynamo.graph_break()
            setattr(self, "table", self.spare)  # noqa: B010 - which nobody sees in its code
        return self.layer(x) * self.table


def counted(net, fails=True):
    """Return how often a capture traces a net, and runs it on tensors without values."""
    traces = mock.patch.object(call, "trace_call", side_effect=call.trace_call)
    runs = mock.patch.object(first_call, "_run_on_fakes", side_effect=first_call._run_on_fakes)
    with traces as traced, runs as ran, aside(net):
        if fails:
            with pytest.raises(CaptureError):
                call.capture_call(net, (torch.ones(2, 4),), {}, history={}, any_float=False, raises=False)
        else:
            call.capture_call(net, (torch.ones(2, 4),), {}, history={}, any_float=False, raises=False)
    return traced.call_count, ran.call_count


def test_a_model_that_a_first_call_leaves_as_it_is_is_traced_once():
    assert counted(Breaking()) == (1, 1)


def test_a_model_that_notes_the_same_at_each_call_is_run_twice_for_that():
    net = Noting()
    traces, runs = counted(net)
    assert traces <= 2
    assert runs <= 4
    assert counted(net) == (1, 1)


def test_a_model_is_traced_again_where_its_first_call_initializes_a_buffer():
    assert counted(Preparing(), fails=False)[0] == 2


def test_a_state_is_noted_once_in_a_capture():
    net = Breaking()
    with aside(net), mock.patch.object(python_state, "PythonState", wraps=python_state.PythonState) as noted:
        first = state_of(net)
        assert state_of(net) is first
        assert state_of(net.layer) is not first
        assert noted.call_count == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.notes.append(1),
        lambda net: setattr(net, "other", 1),
        lambda net: net.layer.register_forward_hook(lambda *_: None),
        lambda net: net.add_module("more", nn.Linear(4, 4)),
    ],
    ids=["a list", "an attribute", "a hook", "a module"],
)
def test_a_state_is_noted_again_where_something_has_changed(change):
    net = Breaking()
    with aside(net):
        first = state_of(net)
        change(net)
        assert state_of(net) is not first
        assert not state_of(net).changes()


def test_no_state_outlives_a_capture():
    net = Breaking()
    with aside(net):
        first = state_of(net)
    assert state_of(net) is not first
