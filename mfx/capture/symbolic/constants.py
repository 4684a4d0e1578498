"""The tensors that a symbolic trace meets and the model does not have: made by its forward, or global."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Constants(nn.Module):
    """Holds the constants of a graph, in the place of the model, on which `torch.fx` would leave them.

    They are attributes, neither parameters nor buffers.

    Args:
        root: the model, of whose attributes this must not have the name.

    Attributes:
        name: the name by which the graph reads this.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.name = "tensor_constants"
        while hasattr(root, self.name):
            self.name += "_"

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def count(self) -> int:
        """The number of constants."""
        return len(self.__dict__.keys() - _OWN)

    @property
    def values(self) -> list[Any]:
        """The constants."""
        return [value for name, value in self.__dict__.items() if name not in _OWN]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the constants that are tensors, by the path by which the graph reads them."""
        own = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        return {f"{self.name}.{name}": value for name, value in own.items() if isinstance(value, torch.Tensor)}

    def add(self, value: torch.Tensor | torch.ScriptObject) -> str:
        """Hold a constant; return the path by which the graph reads it."""
        attribute = f"constant_{self.count}"
        self.__dict__[attribute] = value
        return f"{self.name}.{attribute}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Constants:
        copied = Constants(nn.Module())
        values = {name: memo.get(id(value), value) for name, value in self.__dict__.items() if name not in _OWN}
        copied.__dict__.update(values, name=self.name)  # a tensor that the model does not have is not copied with it
        return copied


_OWN = Constants(nn.Module()).__dict__.keys()
