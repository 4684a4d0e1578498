"""The attributes in which a net shows the graph that ran last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mfx.program.rewritten import RewrittenGraph


class Shown:
    """Sets ``graph``, ``code`` and ``print_readable`` on a net, as on a `torch.fx.GraphModule`, and ``extra_repr``.

    Args:
        net: the net; attributes of its own are left alone.
        methods: the methods among these, by name.

    Attributes:
        active: the graph that is shown.
        names: names of the attributes that were set.
    """

    def __init__(self, net: nn.Module, methods: Mapping[str, Callable[..., str]]) -> None:
        self._net = net
        self._methods = methods
        self.active: RewrittenGraph | None = None
        self.names: tuple[str, ...] = ()

    def show(self, graph: RewrittenGraph) -> None:
        """Show a graph."""
        if graph is self.active:
            return
        self.active = graph
        graph.graph.replaceable = True  # by the next call
        values: dict[str, Any] = {
            "graph": graph.graph,
            "code": graph.graph.python_code("self").src,
            **self._methods,
        }
        for name, value in values.items():
            if name in self.names or not hasattr(self._net, name) or _is_torchs(self._net, name):
                self._net.__dict__[name] = value
                self.names = tuple(dict.fromkeys((*self.names, name)))

    def __getstate__(self) -> dict[str, Any]:
        # The graphs that are not copied are captured anew.
        is_copied = self.active is not None and self.active.is_portable
        return {**self.__dict__, "active": self.active if is_copied else None}


def _is_torchs(net: nn.Module, name: str) -> bool:
    """True for ``extra_repr``, which every module has and torch calls, if the net has none in its own ``__dict__``."""
    return name == "extra_repr" and name not in net.__dict__
