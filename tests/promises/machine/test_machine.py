"""A plain model and its nets stay alike, whatever is done with them; and what is not alike is seen."""

import copy
import json
import os
import random
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import mfx
from tests.promises.machine import models
from tests.promises.machine.compare import Bits, differences, value_of
from tests.promises.machine.drive import long_run
from tests.promises.machine.machine import Machine, NotAlikeError, replay
from tests.promises.machine.participant import Error, participants
from tests.promises.machine.smaller import smaller
from tests.promises.machine.table import ACTIONS, Instead, Refusal
from tests.sampling import number

FOUND = sorted((Path(__file__).parent / "found").glob("*.json"))
MOST_ERRORS = 0.02  # of all actions

pytestmark = pytest.mark.filterwarnings("default")  # what a net warns of is compared

# --- sequences drawn by hypothesis ------------------------------------------------------------------------------------


class Sequences(RuleBasedStateMachine):
    """A rule for every action; the more often an action is wanted, the more rules it has."""

    done: ClassVar[Counter[str]] = Counter()
    errors: ClassVar[Counter[str]] = Counter()

    @initialize(drawn=st.integers(0, 2**32))
    def draw(self, drawn):
        self.machine = Machine(models.draw(random.Random(drawn)))

    def teardown(self):
        if hasattr(self, "machine"):
            self.done.update(name for name, _ in self.machine.steps)
            self.errors.update(self.machine.errors)


def _rule(name, action):
    @precondition(lambda self: action.accepts(self.machine.spec))
    @rule(**{key: st.sampled_from(values) for key, values in action.choices.items()})
    def run(self, **arguments):
        self.machine.do(name, arguments)

    return run


for _name, _action in ACTIONS.items():
    for _count in range(-(-_action.weight // 3)):
        setattr(Sequences, f"{_name}_{_count}", _rule(_name, _action))


def test_sequences_of_actions():
    run_state_machine_as_test(
        seed(number())(Sequences),
        settings=settings(
            max_examples=int(os.environ.get("MFX_MACHINE_EXAMPLES", 16)),
            stateful_step_count=16,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate],  # what is found is made smaller by ``smaller``
            suppress_health_check=list(HealthCheck),
        ),
    )
    share = sum(Sequences.errors.values()) / sum(Sequences.done.values())
    assert share <= MOST_ERRORS, f"{share:.1%} of the actions ended in an error: {Sequences.errors}"


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.stem)
def test_what_was_found_before(file):
    assert not replay(json.loads(file.read_text())).errors


@pytest.mark.zoo
@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic", "dynamo"])
def test_an_hour(symbolic):
    """Half of the minutes that MFX_MACHINE_MINUTES says, an hour by default, on fresh models."""
    minutes = float(os.environ.get("MFX_MACHINE_MINUTES", 60)) / 2
    run = long_run(minutes, seed=1000 * number(), keep=None, symbolic=symbolic)
    assert not run.found, f"{run}\n{json.dumps(run.sequences)}"
    assert run.share_of_errors <= MOST_ERRORS, run


# --- the machine can fail ---------------------------------------------------------------------------------------------

SPEC = {
    "seed": 3,
    "kind": "model",
    "chains": [{"steps": [["linear", "bn", "dropout"], ["linear", "scaled"]], "tail": "none"}],
    "options": {"gamma": 0.9, "recompute": None, "capture": "auto"},
}
CALL = [
    "forward",
    {"seed": 1, "batch": 3, "extra": "none", "gradient": "training", "under": "nothing", "differentiable": True},
]
BACKWARD = ["backward", {"which": 0, "part": "all", "retain": False, "into": "grad", "again": False, "thread": False}]


def _first(net):
    return net.chains[0].branches[0]


def _after_a_call(does):
    """Return a function that has something done after every call of a net."""

    def tamper(net):
        def hook(module, args, output):
            does(net)

        net.head.register_forward_hook(hook)

    return tamper


FAULTS = {
    "a gradient is off by one bit": (
        lambda net: net.head.weight.register_hook(lambda g: torch.nextafter(g, torch.tensor(9.0))),
        "gradient",
    ),
    "an output is off": (lambda net: net.head.register_forward_hook(lambda m, a, y: y * (1 + 1e-6)), "result"),
    "a buffer is updated twice": (_after_a_call(lambda net: _first(net)[1].running_mean.mul_(0.9)), "buffer"),
    "torch draws a number more": (_after_a_call(lambda net: torch.rand(1)), "random"),
    "Python draws a number more": (_after_a_call(lambda net: random.random()), "random"),
    "an attribute is left behind": (lambda net: setattr(_first(net)[0], "left", 1), "state"),
    "a hook is left behind": (lambda net: _first(net)[0].register_forward_hook(lambda m, a, y: None), "hooks"),
    "a part is in another mode": (lambda net: net.head.eval(), "state"),
    "it warns": (_after_a_call(lambda net: warnings.warn("mfx: gradients are wrong", stacklevel=1)), "warning"),
    "it raises": (lambda net: setattr(_first(net)[0], "forward", None), "result"),
}


def _do(machine, *steps):
    for name, arguments in steps:
        machine.do(name, arguments)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("net", ["zero_exact", "zero_float", "momentum"])
def test_a_fault_is_found(fault, net):
    machine = Machine(SPEC)
    tamper, kind = FAULTS[fault]
    tamper(machine.participants[net].model)
    with pytest.raises(NotAlikeError) as found:
        _do(machine, CALL, BACKWARD)
    assert found.value.net == net
    assert kind in {difference.kind for difference in found.value.differences}, found.value
    assert json.loads(str(found.value).partition("replay: ")[2]) == found.value.sequence


def test_without_a_fault_nothing_is_found():
    machine = replay({"model": SPEC, "steps": [CALL, BACKWARD]})
    assert not machine.errors
    assert len(machine.steps) == 2


def test_an_error_that_only_a_net_raises_needs_a_reason():
    error, message = Error("MfxError", "weight was changed between forward and backward"), r"was changed between"
    assert Refusal("written", message).covers(error, None, {"written"})
    assert not Refusal("written", message).covers(error, None, {"frozen"})
    assert not Refusal("written", r"was frozen").covers(error, None, {"written"})
    assert not Refusal("written", message).covers(error, Error("RuntimeError", "in place"), {"written"})
    assert not Refusal("written", message).covers(None, None, {"written"})


def test_in_place_of_an_error_a_net_may_raise_another_one():
    error, other = Error("MfxError", "weight was changed"), Error("RuntimeError", "modified in place")
    assert Instead("in place", "was changed").covers(error, other, set())
    assert Instead("in place", "was changed").covers(None, other, set())
    assert not Instead("in place", "was frozen").covers(error, other, set())
    assert not Instead("in place", "was changed").covers(error, Error("RuntimeError", "a second time"), set())
    assert not Instead("in place", "was changed").covers(error, None, set())


def test_values_are_compared_bit_for_bit():
    zero, x = torch.zeros(2), torch.tensor([0.0, -0.0])
    assert value_of(zero) != value_of(x)
    assert value_of(zero) != value_of(zero.double())
    assert value_of(zero) != value_of(zero[None])
    assert value_of(zero) != value_of(torch.zeros(2, requires_grad=True))
    assert value_of({"a": [zero]}) != value_of({"a": [x]})
    nan = torch.tensor([float("nan")])
    assert value_of(nan) == value_of(nan.clone())
    assert repr(Bits.of(x)) == "float32[2](0, -0)"
    assert [d.path for d in differences({("a", "x"): 1}, {("a", "x"): 1, ("a", "y"): 2})] == ["y"]


def test_a_sequence_is_made_smaller():
    steps = [["train", {"training": True}], CALL, ["zero_grad", {"set_to_none": False}], BACKWARD]
    large = {"model": {**copy.deepcopy(SPEC), "kind": "states"}, "steps": steps}
    small = smaller(large, lambda one: CALL in one["steps"] and one["steps"][-1] == BACKWARD, seconds=5)
    assert small["steps"] == [CALL, BACKWARD]
    assert small["model"]["kind"] == "model"
    assert small["model"]["chains"][0]["steps"] == [["linear"], ["scaled"]]


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", range(6))
def test_every_drawn_model_has_its_chains(drawn):
    spec = models.draw(random.Random(drawn))
    assert json.loads(json.dumps(spec)) == spec == models.draw(random.Random(drawn))
    nets = participants(spec)
    del nets["plain"]
    for participant in nets.values():
        participant.apply(ACTIONS["forward"], CALL[1])
        assert min(len(chain.steps) for chain in mfx.explain(participant.model).chains) >= 2


def test_arguments_of_actions_can_be_kept_in_a_file():
    for name, action in ACTIONS.items():
        arguments = action.draw(random.Random(0))
        assert json.loads(json.dumps([name, arguments])) == [name, arguments]


def test_found_sequences_are_named_by_what_they_found():
    for file in FOUND:
        sequence = json.loads(file.read_text())
        assert sequence.keys() <= {"found", "model", "steps"}
        assert re.fullmatch(r"[a-z0-9_]+", file.stem)
