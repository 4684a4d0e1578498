"""The random numbers of parameters that a capture initializes (`nn.LazyLinear`), drawn as by a call of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from mfx.compat import patched
from mfx.modules.random_state import generators_for


def is_initialized(net: nn.Module) -> bool:
    """True if no parameter or buffer of a model waits for its first call."""
    return not any(map(is_lazy, (*net.parameters(), *net.buffers())))


@contextmanager
def initialization_draws(net: nn.Module) -> Iterator[None]:
    """Leave the random generators, at the end of this context, as what was initialized in it has left them.

    Args:
        net: the model that is captured in this context. TorchDynamo initializes it, and puts the generators back.
    """
    if is_initialized(net):
        yield
        return
    generators = list(generators_for(net))
    states = [generator.read() for generator in generators]
    initialize: Any = LazyModuleMixin._infer_parameters

    def put() -> None:
        for generator, state in zip(generators, states, strict=True):
            generator.write(state)

    def infer(module: Any, *args: Any, **kwargs: Any) -> None:
        put()
        initialize(module, *args, **kwargs)
        states[:] = [generator.read() for generator in generators]

    try:
        with patched(LazyModuleMixin, "_infer_parameters", infer):
            yield
    finally:
        put()
