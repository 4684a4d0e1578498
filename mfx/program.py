"""Graphs made runnable on somebody else's modules."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.fx import Graph

Program = Callable[[Graph], Callable[..., Any]]  # what makes a function of a graph


def compile_graph(graph: Graph) -> Callable[..., Any]:
    """The function a graph stands for; its first argument is the object that holds the modules the graph calls.

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
