from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
from torch import nn

import mfx
from mfx_passes import Findings, MomentumPass, Selection, find_chains, momentum_pass
from mfx_passes.find.chains import chains_of
from mfx_passes.find.prepare import prepare
from tests.passes.cases import Windows, make
from tests.passes.harness import PlainRecurrence, code_of, traced
from tests.passes.refusals import REFUSALS
from tests.passes.stream_cases import CASES

MODELS = {name: (make(case), [], Selection()) for name, case in CASES.items()} | {
    name: (case.make(), case.example() if case.shapes else [], case.selection) for name, case in REFUSALS.items()
}


def described(found: Findings) -> list[object]:
    states = [(chain.name, [node.name for states in chain.states for node in states]) for chain in found.chains]
    return [states, [str(rejection) for rejection in found.rejections], [*map(str, found.reread.items())]]


@pytest.mark.parametrize("name", MODELS)
def test_finding_changes_nothing_and_finds_the_same_as_in_place(name: str) -> None:
    model, inputs, selection = MODELS[name]
    case, other = traced(model, inputs), traced(model, inputs)
    before = code_of(case.graph)
    found = find_chains(case.graph, case.modules, selection)
    assert code_of(case.graph) == before
    assert all(node.graph is found.graph for chain in found.chains for node in chain.nodes)
    in_place = prepare(other.graph, other.modules, marked=selection.marked, in_place=True)
    assert in_place.index.graph is other.graph
    assert described(found) == described(chains_of(in_place, selection))
    assert code_of(found.graph) == code_of(other.graph)


def test_a_graph_that_is_ready_is_not_copied() -> None:
    case = traced(make(CASES["Plain"]))
    assert find_chains(case.graph, case.modules).graph is case.graph


@pytest.mark.parametrize("model", [make(CASES["Plain"]), make(Windows), REFUSALS["Single"].make()])
def test_the_pass_finds_once(model: nn.Module) -> None:
    module = mfx.trace(model)
    with mock.patch.object(momentum_pass, "find_chains", wraps=find_chains) as find:
        MomentumPass(lambda graphs: PlainRecurrence(graphs, 0.0))(module)
    find.assert_called_once()


def test_networkx_is_not_imported_with_mfx() -> None:
    code = "import sys, torch; before = 'networkx' in sys.modules; import mfx, mfx_passes; "
    code += "assert before or 'networkx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
