"""Graphs turned into functions: as plain Python, or compiled by a torch.compile backend."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg

from mfx import compat
from mfx.capture.outputs import says_something
from mfx.engine import BLOCK_KERNELS, FusedKernels, Kernels
from mfx_passes.ir import is_momentum_call
from mfx_passes.rewrite.portable_graph import PortableGraph

Function = Callable[..., Any]
_NODE = re.compile(r"\bProxy\(\w+\)")


class BackendCompiler:
    """A graph compiler by a torch.compile backend; graphs that differ only in names share a compiled function.

    Args:
        inner: a torch.compile backend, or its name.
        **settings: further arguments of `torch.compile`.

    Attributes:
        kernels: those of exact arithmetic in chains whose branches it compiles.
    """

    def __init__(self, inner: Any, **settings: Any) -> None:
        self._inner = inner
        self._settings = settings
        self._compiled: dict[Any, Function] = {}
        # Another backend may not fuse elementwise operations, and then blocks of torch operations are faster.
        self.kernels: Kernels = FusedKernels(_elementwise) if compat.is_inductor(inner) else BLOCK_KERNELS

    def __call__(self, graph: Graph) -> Function:
        """Return a graph's function; its first argument is the object under which the graph reads by path.

        Modules and tensors read by path are inputs of the compiled function, so that blocks of one structure share it,
        and a module that is replaced is another input.
        """
        if any(map(is_momentum_call, graph.find_nodes(op="call_module"))) or says_something(graph.nodes):
            return to_function(graph)  # a chain inside of a branch; its own branches are compiled
        paths, shared = _with_inputs_only(graph)
        source = shared.python_code("self")
        key = source.src, tuple(sorted((name, id(value)) for name, value in source.globals.items()))
        if key not in self._compiled:
            self._compiled[key] = torch.compile(to_function(shared), backend=self._inner, **self._settings)
        compiled = self._compiled[key]

        getters = [attrgetter(path) for path in paths]

        def run(root: Any, *inputs: Any) -> Any:
            return compiled(None, *inputs, *(get(root) for get in getters))

        return run


def _elementwise(graph: Graph) -> Function:
    from mfx.compat.inductor import elementwise  # imports Inductor

    return elementwise(graph)


def _with_inputs_only(graph: Graph) -> tuple[list[str], Graph]:
    """Return the paths a graph reads, and the graph with inputs in their place and its nodes named by number."""
    shared = PortableGraph()
    copies: dict[Node, Node] = {}
    read: dict[str, Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        copies[node] = shared.placeholder(f"a{len(copies)}")
    for node in graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if path not in read:
            read[path] = shared.placeholder(f"p{len(read)}")
        copies[node] = read[path]
    for node in graph.nodes:
        if node in copies:
            continue
        if node.op == "call_module":
            path = str(node.target)
            if path not in read:
                read[path] = shared.placeholder(f"p{len(read)}")
        args = map_aggregate(map_arg(node.args, copies.__getitem__), _without_numbers)
        kwargs = map_aggregate(map_arg(node.kwargs, copies.__getitem__), _without_numbers)
        op, target = node.op, node.target
        if op == "call_module":
            op, target, args = "call_function", _call, (read[str(node.target)], *args)
        copies[node] = shared.create_node(op, target, args, kwargs, name=f"n{len(copies)}")
    return list(read), shared


def _without_numbers(value: Any) -> Any:
    """Drop proxy numbers from assertion messages, so that equal blocks share a key."""
    return _NODE.sub("Proxy", value) if isinstance(value, str) else value


def _call(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


GraphCompiler = Callable[[Graph], Callable[..., Any]]  # turns a graph into a function


def to_function(graph: Graph) -> Callable[..., Any]:
    """Return a graph's function in Python; its first argument is the object under which the graph reads by path.

    The modules are looked up at every call, so replacing one takes effect.
    """
    code = graph.python_code("self")
    filename = f"<mfx graph {abs(hash(code.src))}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # what torch.fx does for a GraphModule
    function = namespace["forward"]
    assert isinstance(function, FunctionType)
    return function
