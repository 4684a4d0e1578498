"""The formula of a step, in a line: ``x + mlp(norm2(x))``."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.fx import Node

from mfx.program.chain_call import Momentum
from mfx.reports.drawing.groups import Group, contract
from mfx_passes import StepGraphs
from mfx_passes.ir import enclosing_path
from mfx_passes.paths import relative

_LONGEST = 110  # characters of a formula; longer ones become a list of names
_NAMES = 8  # in that list
_INFIX = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), " + "),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), " − "),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "·"),
}
_LAYOUT_OPS = frozenset(
    {
        "getitem",
        "reshape",
        "view",
        "permute",
        "transpose",
        "contiguous",
        "flatten",
        "unflatten",
        "chunk",
        "split",
        "unbind",
        "squeeze",
        "unsqueeze",
        "to",
        "float",
        "type_as",
        "clone",
        "expand",
        "expand_as",
        "movedim",
        "swapaxes",
        "t",
        "detach",
        "view_as",
        "tensor_split",
        "setitem",
    }
)


def formula(
    step: StepGraphs, path: str, modules: Mapping[str, nn.Module], streams: Sequence[str] = ("x",)
) -> tuple[str, ...]:
    """Return the new state of each stream that a step moves on, as an expression.

    Modules have their path below the step's own. Operations that only move values are left out; "…" stands for other
    values that the step reads. A formula that is too long for a line becomes a list of names.

    Args:
        step: the step's graphs.
        path: path of the step's module.
        modules: the modules that the graphs call, by path.
        streams: names of the chain's streams.
    """
    groups = contract(step.branch, lambda node: _key(node, path), hide=_is_hidden)
    names = {group: _name(group, modules) for group in groups}
    read = dict(zip(step.branch.nodes, (streams[stream] for stream in step.reads), strict=False))
    (output,) = step.branch.find_nodes(op="output")
    values = []
    for stream, kind, end in zip(step.writes, step.kinds, output.args[0], strict=False):
        x = streams[stream]
        try:
            value = _expression(end, names, read)
        except _TooLongError:
            shown = [name for name in dict.fromkeys(names.values()) if name and name not in _LAYOUT_OPS]
            given = ", ".join(read.values())
            value = f"f({given}) with {' · '.join(shown[:_NAMES])}{' …' if len(shown) > _NAMES else ''}"
        value = f"{x} + {value}" if kind == "residual" else value
        values.append(value if len(streams) == 1 else f"{x} ← {value}")
    return tuple(values)


def classes(step: StepGraphs, path: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the classes of the modules that a formula names, in order.

    Args:
        step: the step's graphs.
        path: path of the step's module.
        modules: the modules that the graphs call, by path.
    """
    found = []
    for node in step.branch.nodes:
        module = modules.get(enclosing_path(node))
        if node.op not in ("placeholder", "output", "get_attr") and module is not None:
            name = shown_path(relative(enclosing_path(node), path)) or "the step"
            found.append(f"{name}: {type(module).__name__}")
    return ", ".join(dict.fromkeys(found))


def shown_path(path: str) -> str:
    """Return a module path with its numbers as indices.

    >>> shown_path("encoder.layer.0.attention")
    'encoder.layer[0].attention'
    >>> shown_path("0.1.fc")
    '[0][1].fc'
    """
    return re.sub(r"(?:^|\.)(\d+)(?=\.|$)", r"[\1]", path)


def op_name(node: Node, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of a node's target: a module's class, a function's or method's name."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return module.chain if isinstance(module, Momentum) else type(module).__name__ if module else str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return str(name).strip("_")


def is_parameter(node: Node) -> bool:
    """True if a graph's input is a parameter or buffer of the model, as in graphs captured by TorchDynamo."""
    return (
        node.op == "placeholder" and re.match(r"[lL]_self_+(modules|parameters|buffers)_", str(node.target)) is not None
    )


class _TooLongError(Exception):
    pass


def _is_hidden(node: Node) -> bool:
    return is_parameter(node) or node.op == "output"


def _key(node: Node, base: str) -> str | None:
    """Return the path of the child of the step's module, or of the item in a list of them, that a node belongs to."""
    if node.op in ("placeholder", "output"):
        return None
    atoms = relative(enclosing_path(node), base).split(".")
    if atoms == [""]:
        return None
    depth = next((i for i, atom in enumerate(atoms) if not atom.isdigit()), len(atoms) - 1) + 1
    while depth < len(atoms) and atoms[depth].isdigit():
        depth += 1
    return ".".join(atoms[:depth])


def _name(group: Group, modules: Mapping[str, nn.Module]) -> str:
    if group.first.op == "placeholder":
        return ""
    return shown_path(group.key or op_name(group.first, modules))


def _expression(end: Node, names: Mapping[Group, str], read: Mapping[Node, str]) -> str:
    texts: dict[Group, str] = {}
    for group, name in names.items():
        if group.first.op == "placeholder":
            texts[group] = read.get(group.first, "…")
            continue
        texts[group] = _call(group, [texts[source] for source in group.inputs], name)
        if len(texts[group]) > _LONGEST:
            raise _TooLongError
    return next((texts[group] for group in names if end in group.nodes), next(iter(read.values())))


def _call(group: Group, read: list[str], name: str) -> str:
    arguments = [text for text in dict.fromkeys(read) if text != "…"] + ["…"] * ("…" in read)
    single = group.first if group.key is None else None
    if single is not None and single.op != "call_module":
        infix = _INFIX.get(single.target)
        if infix and len(arguments) > 1:
            return infix.join(_bracketed(text) if infix == "·" else text for text in arguments)
        if (name in _LAYOUT_OPS or infix) and len(arguments) == 1:
            return arguments[0]
    return f"{name}({', '.join(arguments)})"


def _bracketed(text: str) -> str:
    return f"({text})" if " + " in text or " − " in text else text
