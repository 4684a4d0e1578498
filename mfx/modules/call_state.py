"""The state that a call of a model may change, as it was before the call, to put it back where the call is undone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mfx.compat import tensor_tables, unobserved
from mfx.modules.python_state import PythonState
from mfx.modules.random_state import generators_for
from mfx_passes import MfxError


class CallState:
    """Random states, buffers and, if asked for, Python state of a model, at this moment.

    Args:
        model: the model.
        arguments: tensors that the call is given.
        python: True to note the Python state, too.
    """

    @unobserved()
    def __init__(self, model: nn.Module, arguments: Iterable[Tensor], *, python: bool) -> None:
        self._random = [(generator, generator.read()) for generator in generators_for(model)]
        self._tables = [(table, dict(table)) for module in model.modules() for table in tensor_tables(module)]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._versions = [
            (tensor, tensor._version) for tensor in (*arguments, *model.parameters()) if not tensor.is_inference()
        ]
        self._python = PythonState(model) if python else None

    @unobserved()
    def put_back(self) -> None:
        """Put all of it back, after a call that is to be as if it had not been.

        Raises:
            MfxError: the call has changed an argument or a parameter in place.
        """
        if self._python is not None:
            self._python.put_back()
        for generator, state in self._random:
            generator.write(state)
        for table, tensors in self._tables:
            table.clear()
            table.update(tensors)
        with torch.no_grad():
            for buffer, value in self._buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        if any(tensor._version != version for tensor, version in self._versions):
            raise MfxError(
                "a call that has to be made anew, because a condition on the value of a tensor came out otherwise than "
                "before, has changed an argument or a parameter in place, which cannot be undone. Do that out of "
                "place, or leave this part of the model as it is."
            )
