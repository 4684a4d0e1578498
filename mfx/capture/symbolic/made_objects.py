"""Objects that a forward pass makes and returns with tensors in them, as Hugging Face's models do with a cache."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.node import map_arg

from mfx.capture.symbolic.recorded import is_of_attributes


class MadeObjects:
    """The objects in the result of a trace, recorded as made of their attributes.

    Only those that hold traced values, for these are of the call alone: the others may be kept by somebody else.

    Args:
        tracer: the tracer, once the forward pass is over.
    """

    def __init__(self, tracer: fx.Tracer) -> None:
        self._tracer = tracer
        self._nodes: dict[int, fx.Node | None] = {}  # None while the attributes of one are recorded

    def node_of(self, value: Any) -> fx.Node | None:
        """Return the node that makes an object anew, the same one each time; None if there can be none."""
        if id(value) not in self._nodes:
            if not is_of_attributes(value):
                return None
            self._nodes[id(value)] = None
            attributes = {name: self._tracer.create_arg(item) for name, item in vars(value).items()}
            found: list[fx.Node] = []
            map_arg(attributes, found.append)
            if all(node.op == "get_attr" for node in found):
                return None
            self._nodes[id(value)] = self._tracer.create_node("call_function", Maker(type(value)), (), attributes)
        return self._nodes[id(value)]


class Maker:
    """Makes objects of a class of their attributes, as unpickling does: without a call of ``__init__``."""

    def __init__(self, cls: type) -> None:
        self._class = cls
        self.__name__, self.__qualname__, self.__module__ = cls.__name__, cls.__qualname__, cls.__module__

    def __call__(self, /, **attributes: Any) -> Any:
        """Return a new object."""
        made: Any = object.__new__(self._class)
        vars(made).update(attributes)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Maker) and self._class is other._class

    def __hash__(self) -> int:
        return hash(self._class)
