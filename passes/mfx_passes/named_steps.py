"""Mark module calls as steps of chains, for models whose user names the steps."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from mfx_passes import paths
from mfx_passes.errors import MfxError
from mfx_passes.ir import enclosing_path
from mfx_passes.ops import sums
from mfx_passes.ops.step_markers import added, called, mapped, started


@dataclass(frozen=True)
class NamedSteps:
    """Modules that are called one after the other, each on the output of the one before.

    Args:
        name: the user's name for them.
        blocks: paths of the modules, in this order.
        kept: the number of first modules that stay as they are.
        is_residual: True if each module is the branch f of a step x + f(x); else it is the whole step, a map h.
    """

    name: str
    blocks: tuple[str, ...]
    kept: int
    is_residual: bool


def is_mark(node: Node) -> bool:
    """True if a marked step ends in a node."""
    return node.op == "call_function" and node.target in (mapped, added)


def is_start(node: Node) -> bool:
    """True if a chain of marked steps starts from a node."""
    return node.op == "call_function" and node.target is started


def note_calls(graph: Graph, targets: Collection[str]) -> None:
    """Insert a note behind every call of some modules that names its input; see `mark_steps`.

    Where modules of the same container give tuples, the first part is the state.
    """
    calls = [node for node in graph.find_nodes(op="call_module") if node.target in targets]
    containers: dict[str, list[Node]] = {}
    for call in calls:
        containers.setdefault(str(call.target).rpartition(".")[0], []).append(call)
    for together in containers.values():
        give_tuples = len(together) > 1 and all(map(_is_taken_apart, together))
        for call in together:
            _note_call(graph, call, [part for part in call.users if part.args[1] == 0] if give_tuples else [call])


def _is_taken_apart(call: Node) -> bool:
    parts = [user for user in call.users if user.target is operator.getitem and _is_place(user.args[1])]
    return bool(parts) and len(parts) == len(call.users)


def _is_place(index: object) -> bool:
    """True if an index means the same part of tuples of any length; -1 does not."""
    return isinstance(index, int) and index >= 0


def _note_call(graph: Graph, call: Node, states: Sequence[Node]) -> None:
    """Insert a note behind the state that a module returned, which may be read from a tuple several times."""
    x = next(iter((*call.args, *call.kwargs.values())), None)
    if not states:
        return
    state, *others = states
    for other in others:
        other.replace_all_uses_with(state)
        graph.erase_node(other)
    with graph.inserting_after(state):
        note = _like(call, graph.call_function(called, (x, state, str(call.target))))
    state.replace_all_uses_with(note, delete_user_cb=lambda user: user is not note)


def mark_steps(graph: Graph, rows: Sequence[NamedSteps]) -> None:
    """Mark the noted calls of the modules in ``rows`` as steps, and remove the notes.

    Before::

        layer_0 = self.layer.0(x)
        called = mfx_passes_marks_called(x, layer_0, 'layer.0')
        layer_1 = self.layer.1(called)
        called_1 = mfx_passes_marks_called(called, layer_1, 'layer.1')

    After::

        started = mfx_passes_marks_started(x)
        layer_0 = self.layer.0(started)
        called = mfx_passes_marks_mapped(started, layer_0)
        layer_1 = self.layer.1(called)
        called_1 = mfx_passes_marks_mapped(called, layer_1)

    Where the branch of a residual step is added to its input already, that sum becomes the mark.

    Args:
        graph: the graph, with notes; changed in place.
        rows: the modules.

    Raises:
        MfxError: the modules are not called in this order, or one is not called on what the one before gave.
    """
    for row in rows:
        notes = [node for node in graph.find_nodes(op="call_function", target=called) if node.args[2] in row.blocks]
        notes.sort()
        rounds, rest = divmod(len(notes), len(row.blocks))
        if rest or [note.args[2] for note in notes] != [*row.blocks] * rounds:
            raise MfxError(
                f"the modules of {row.name} are not called one after the other in the order they are listed in, but: "
                f"{', '.join(str(note.args[2]) for note in notes)}. Leave sub_layers out to have residual adds looked "
                "for instead."
            )
        for first in range(0, len(notes), len(row.blocks)):
            _mark_row(graph, notes[first + row.kept : first + len(row.blocks)], row)
    for note in graph.find_nodes(op="call_function", target=called):
        note.replace_all_uses_with(note.args[1])
        graph.erase_node(note)
    graph.lint()


def _mark_row(graph: Graph, notes: Sequence[Node], row: NamedSteps) -> None:
    state: Node | None = None
    for note in notes:
        x, _, module = note.args
        if not isinstance(x, Node):
            raise MfxError(f"{module} of {row.name} is called on {x!r} first, not on the state that it changes.")
        if state is None:
            state = _start(graph, note, x, row)
        elif x is not state:
            raise MfxError(
                f"{module} of {row.name} is not called on what the module before it gave, but on {x.name}, which was "
                "made of it in between: the modules are not steps x -> module(x) of a chain. If they are the branches "
                "f of steps x + f(x), say is_residual=True; or leave sub_layers out to have residual adds looked for."
            )
        state = _mark(graph, note, row)


def _start(graph: Graph, note: Node, x: Node, row: NamedSteps) -> Node:
    """Insert a node that marks the start of a chain, read by the first step alone."""
    readers = [user for user in x.users if user is note or _is_inside(user, str(note.args[2]))]
    if row.is_residual and (written := _own_sum(note, x)) is not None:
        readers.append(written)
    with graph.inserting_before(min(readers)):
        state = graph.call_function(started, (x,))
    state.meta = {**note.meta, **{key: x.meta[key] for key in ("val",) if key in x.meta}}
    for reader in readers:
        reader.replace_input_with(x, state)
    return state


def _is_inside(node: Node, path: str) -> bool:
    return paths.is_inside(enclosing_path(node), path)


def _mark(graph: Graph, note: Node, row: NamedSteps) -> Node:
    x, y = note.args[:2]
    assert isinstance(x, Node)
    assert isinstance(y, Node)
    if row.is_residual and (written := _own_sum(note, x)) is not None:
        with graph.inserting_before(written):
            mark = _like(written, graph.call_function(added, (x, y)))
        written.replace_all_uses_with(mark)
        graph.erase_node(written)
        note.replace_all_uses_with(y)
        graph.erase_node(note)
        return mark
    note.target, note.args = (added if row.is_residual else mapped), (x, y)
    return note


def _own_sum(note: Node, x: Node) -> Node | None:
    """Return the sum x + f(x) that the model writes around a branch, if there is one."""
    for user in note.users:
        nodes = [term.node for term in sums.terms(user) or ()]
        if len(nodes) == 2 and {*nodes} == {note, x}:
            if sums.out_of_place(user) != user.target and max(x.users) is not user:
                raise MfxError(
                    f"the sum of {note.args[2]} and its input is written in place, and the input is read afterwards; "
                    "write x = x + f(x)."
                )
            return user
    return None


def _like(old: Node, new: Node) -> Node:
    new.meta = dict(old.meta)
    return new
