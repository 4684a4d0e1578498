"""Tensors that a forward pass makes of numbers: constants to a trace, but each call has its own to write into."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx, nn

from mfx.capture.captured import CaptureError
from mfx.capture.symbolic.constants import Constants
from mfx.capture.symbolic.made_objects import Maker
from mfx.modules.buffers import storage_of
from mfx_passes import ModuleCall
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations, shares_memory_with
from mfx_passes.ops.vocabulary import mutated_operand
from mfx_passes.ops.writes import written_beside


def make_anew(
    graph: fx.Graph,
    calls: Sequence[ModuleCall],
    constants: Constants,
    before: Collection[Tensor],
    called: Mapping[str, nn.Module],
) -> list[ModuleCall]:
    """Have a graph copy the constants that its calls made and it writes into or lets out; return the module calls.

    Before::

        add_ = constant_0.add_(x)

    After::

        clone = constant_0.clone(); add_ = clone.add_(x)

    Args:
        graph: the graph, changed in place.
        calls: the module calls that were walked through.
        constants: the tensors that the graph reads and the model does not have.
        before: those that were there before the trace: each call changes the same ones.
        called: the modules that the graph calls as a whole.

    Raises:
        CaptureError: such a constant shares its memory with another one, or requires a gradient.
    """
    held = {0, *map(storage_of, before)}
    made = {path: value for path, value in constants.tensors().items() if storage_of(value) not in held}
    if not made:
        return list(calls)
    mutations = Mutations(GraphIndex(graph, called))
    written = {node for mutation in mutations.at(list(graph.nodes)) for node in mutation.family}
    for path, value in made.items():
        reads = [node for node in graph.find_nodes(op="get_attr") if node.target == path]
        if not reads or not (written.intersection(reads) or _is_let_out(mutations.family(reads[0]), called)):
            continue
        if value.requires_grad or sum(storage_of(other) == storage_of(value) for other in made.values()) > 1:
            raise CaptureError("a tensor that the forward makes and changes shares its memory, or requires a gradient")
        with graph.inserting_after(reads[0]):
            copied = graph.call_method("clone", (reads[0],))
        copied.meta = dict(reads[0].meta)
        for node in reads:
            node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
        calls = [replace(call, nodes=call.nodes | {copied}) if reads[0] in call.nodes else call for call in calls]
    return list(calls)


def written_constants(node: fx.Node, constants: Constants, modules: Mapping[str, nn.Module]) -> list[Tensor]:
    """Return the constants that a node changes in place, or may change: of code that is called as a whole, all."""
    written = list(written_beside(node, modules))
    if (operand := mutated_operand(node, modules)) is not None:
        written.append(operand)
    if node.op == "call_module" and _may_keep(node, modules):
        written = node.all_input_nodes
    tensors = constants.tensors() if written else {}
    for i, value in enumerate(written):
        while (source := shares_memory_with(value, modules)) is not None:
            written[i] = value = source
    return [tensors[str(value.target)] for value in written if value.op == "get_attr" and value.target in tensors]


def _is_let_out(family: Collection[fx.Node], called: Mapping[str, nn.Module]) -> bool:
    """True if a value, or what shares its memory, is returned or handed to what may keep it."""
    users = {user for node in family for user in node.users}
    return any(user.op == "output" or _may_keep(user, called) for user in users)


def _may_keep(node: fx.Node, called: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return not type(called[str(node.target)]).__module__.startswith("torch.nn.")
    return node.op == "call_function" and isinstance(node.target, type | Maker)
