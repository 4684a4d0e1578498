"""Modules of TorchScript, whose tensors and submodules lie in an object of C++."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

Table = MutableMapping[Any, Any]  # of a module: its parameters, buffers, modules, hooks or attributes


def tensor_tables(module: nn.Module) -> tuple[Table, Table]:
    """Return a module's table of parameters and its table of buffers, which can be written (torch 2.11 to 2.15)."""
    if isinstance(module, torch.jit.ScriptModule):
        return _ScriptTable(module._parameters), _ScriptTable(module._buffers)
    return module._parameters, module._buffers


class _ScriptTable(MutableMapping[str, Any]):
    """The parameters or the buffers of a scripted module, of which TorchScript offers less than a mapping."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __getitem__(self, name: str) -> Any:
        return self._table[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._table[name] = value

    def __delitem__(self, name: str) -> None:
        del self._table[name]  # torch says that it cannot be done

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.keys())

    def __len__(self) -> int:
        return len(self._table)


def scripted_copy(module: torch.jit.ScriptModule, tensor: Callable[[Tensor], Tensor] | None) -> torch.jit.ScriptModule:
    """Return a copy of a scripted module and of those in it; ``tensor`` gives its parameters and buffers.

    None for the same tensors. A deep copy would have others, whatever its memo says (torch 2.11 to 2.15). What is
    scripted tells as others do whether it writes into its input (``inplace``); and has a training flag, frozen or not.
    """
    copied: torch.jit.ScriptModule = torch.jit._recursive.wrap_cpp_module(_copy(module._c))
    for inner in copied.modules():
        inner.__dict__["inplace"] = _writes_into_input(inner)
        if not hasattr(inner, "training"):
            inner.__dict__["training"] = False
        if tensor is not None:
            for table in tensor_tables(inner):
                table.update({name: None if value is None else tensor(value) for name, value in table.items()})
    return copied


def _writes_into_input(module: Any) -> bool:
    if not hasattr(module, "inlined_graph"):
        return False  # it has no forward
    graph = module.inlined_graph
    aliases, inputs = graph.alias_db(), list(graph.inputs())[1:]
    # For the alias analysis, attributes of the module may be the input.
    written = [value for value in _written(graph) if value.node().kind() != "prim::GetAttr"]
    return any(aliases.may_contain_alias(value, given) for value in written for given in inputs)


def _written(block: Any) -> Iterator[Any]:
    """Yield the values that operations of a graph, or of one of its blocks, write into."""
    for node in block.nodes():
        if node.schema() != "(no schema)":
            arguments = torch._C.parse_schema(node.schema()).arguments
            values = zip(node.inputs(), arguments, strict=False)
            yield from (value for value, argument in values if _is_write(argument))
        for inner in node.blocks():
            yield from _written(inner)


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _copy(module: Any) -> Any:
    copied = copy.copy(module)
    for name, child in torch._C.ModuleDict(module).items():
        copied.setattr(name, _copy(child))
    return copied
