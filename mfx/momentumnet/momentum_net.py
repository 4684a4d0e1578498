"""A momentum net made of functions: the class of the momentumnet package, run by mfx's engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, Proxy

from mfx.engine import ARITHMETICS, ChainPlan, ChainSettings, Stream
from mfx.net.state_dict import note_gamma
from mfx.options.gamma import BDIA, Gamma
from mfx.options.options import Options
from mfx.program.chain_call import Momentum
from mfx.text import described
from mfx_passes import ChainGraphs, MfxError, StepGraphs
from mfx_passes.ir import Kind
from mfx_passes.ops.step_markers import added, mapped
from mfx_passes.rewrite.portable_graph import PortableGraph


class MomentumNet(nn.Module):
    """A momentum residual network: v ← γ·v + (1−γ)·f(x), x ← x + v, for each f of ``functions``.

    The recurrence of Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks" (ICML 2021), with the arguments
    and the names of parameters of the momentumnet package: checkpoints load both ways.

    >>> import torch
    >>> function = nn.Sequential(nn.Linear(50, 8), nn.Tanh(), nn.Linear(8, 50))
    >>> net = MomentumNet([function] * 10, gamma=0.9)
    >>> net(torch.randn(3, 50)).shape
    torch.Size([3, 50])

    Args:
        functions: modules, at least one, that are called as ``f(x, *args, **kwargs)`` and return a tensor with the
            shape, dtype and device of x. One module may be there several times.
        gamma: momentum, 0 <= γ <= 1. At 1 the velocity stays what it was before the first step, and the values of
            the functions have no weight. Or an `mfx.BDIA`.
        init_speed: True for the velocity ``init_function(x)`` before the first step; else it is 0.
        init_function: a module. Without ``init_speed`` it is kept, with its parameters, but not called.
        use_backprop: True for ordinary backpropagation, which keeps all activations; False to rebuild them in the
            backward pass. The function is the same.
        is_residual: False if a function gives the next state h(x) of a residual network instead of f(x) = h(x) − x.
        arithmetic: ``"exact"`` or ``"float"``; see `mfx.momentumize`.
        verify: ``"warn"``, ``"raise"`` or ``"off"``; see `mfx.momentumize`.
        offload: None or ``"cpu"``; see `mfx.momentumize`.

    Attributes:
        chain: the module that runs the steps, as in a momentumized net.

    Raises:
        MfxError: an argument is wrong.
    """

    def __init__(
        self,
        functions: Iterable[nn.Module],
        gamma: float | BDIA = 0.9,
        init_speed: bool = False,
        init_function: nn.Module | None = None,
        use_backprop: bool = True,
        is_residual: bool = True,
        *,
        arithmetic: str = "exact",
        verify: str = "warn",
        offload: str | None = None,
    ) -> None:
        super().__init__()
        modules = _checked(functions)
        check_flags(init_speed=init_speed, use_backprop=use_backprop, is_residual=is_residual)
        if init_speed and not isinstance(init_function, nn.Module):
            raise MfxError(f"init_speed=True needs a module as init_function, not {described(init_function)}.")
        budget = 1.0 if use_backprop else 0.0
        options = Options(arithmetic=arithmetic, memory_budget=budget, verify=verify, offload=offload)
        self.network = nn.Module()
        for name, module in modules.items():
            self.network.add_module(name, module)
        if init_function is not None:
            self.network.add_module("init", init_function)
        self.use_backprop = use_backprop
        self.init_speed = init_speed
        self.is_residual = is_residual
        self.chain = Momentum(
            _graphs(type(self).__name__, list(modules), "residual" if is_residual else "map"),
            ChainSettings(
                gamma=Gamma.of(gamma, or_one=True),
                arithmetic=ARITHMETICS[options.arithmetic],
                velocity="module" if init_speed else "zero",
                verify=options.verify,
                offload=options.offload is not None,
                plan=ChainPlan.keep_all(len(modules)) if use_backprop else None,
            ),
        )
        self.chain.owner = "network"
        note_gamma(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the state after the last step.

        Args:
            x: the state before the first, of any shape and floating dtype.
            *args: further arguments of every function: tensors, which get gradients, or anything else.
            **kwargs: further arguments by name.

        Raises:
            MfxError: x is not floating-point, or the value of a function does not fit it.
        """
        check_state(x)
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            from mfx.compiler.call import run_outside  # imports TorchDynamo, which takes a second

            return run_outside(self, x, args, kwargs)
        return self.run(x, args, kwargs)

    def run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the steps, without the check of x and wherever it is called.

        Args:
            x: the state before the first step.
            args: further arguments of every function, by position.
            kwargs: further arguments by name.
        """
        v0 = self.init_function(x) if self.init_speed and self.init_function is not None else None
        return self.chain((x,), (args, kwargs), {"network": self.network}, v0)

    def streams(self, x: Any = None, *_: Any, **__: Any) -> dict[str, tuple[Stream, ...]]:
        """Return the chain's stream in a call with these arguments, by the chain's name.

        Args:
            x: the state before the first step.
            *_: further arguments of every function, which do not matter here.
            **__: further arguments by name, which do not matter here.

        Raises:
            MfxError: x is not a floating-point tensor.
        """
        check_state(x)
        return {self.chain.chain: (Stream(tuple(x.shape), x.dtype, len(self.functions)),)}

    @property
    def gamma(self) -> float | BDIA:
        """The momentum, which may be set; see `mfx.set_gamma`."""
        return self.chain.gamma.given

    @gamma.setter
    def gamma(self, value: float | BDIA) -> None:
        self.chain.gamma = Gamma.of(value, or_one=True)

    @property
    def functions(self) -> list[nn.Module]:
        """The functions, in order."""
        return [module for name, module in self.network._modules.items() if name != "init" and module is not None]

    @property
    def init_function(self) -> nn.Module | None:
        """The module that computes the first velocity, or None."""
        return self.network._modules.get("init")

    def extra_repr(self) -> str:
        """Return the settings that ``print(net)`` shows."""
        return f"use_backprop={self.use_backprop}, is_residual={self.is_residual}, init_speed={self.init_speed}"


def call_function(module: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a function's value; the call in a step's graph."""
    return module(x, *args, **kwargs)


def _graphs(name: str, functions: list[str], kind: Kind) -> ChainGraphs:
    """Return steps that call one module each; their captures are the further arguments, positional and named."""
    steps = []
    for function in functions:
        branch = _graph(function, None if kind == "residual" else mapped)
        original = _graph(function, added) if kind == "residual" else branch
        steps.append(StepGraphs(function, (kind,), branch, original, (0, 1), (f"network.{function}",), ()))
    return ChainGraphs(name, tuple(steps), ())


def _graph(function: str, marker: Any) -> PortableGraph:
    graph = PortableGraph()
    x, args, kwargs = (graph.placeholder(name) for name in ("x", "args", "kwargs"))
    module = graph.create_node("get_attr", f"network.{function}")
    value: Node = graph.call_function(call_function, (module, x, args, kwargs))
    if marker is not None:
        value = graph.call_function(marker, (x, value))
    graph.output((value,))
    return graph


def _checked(functions: Any) -> dict[str, nn.Module]:
    if not isinstance(functions, Iterable):
        raise MfxError(f"functions are modules in a list or a Sequential, not {described(functions)}.")
    modules = {str(number): module for number, module in enumerate(functions)}
    if not modules:
        raise MfxError("functions is empty; a momentum net has at least one.")
    for number, module in modules.items():
        if not isinstance(module, nn.Module):
            raise MfxError(f"functions[{number}] is {described(module)}, not a torch.nn.Module.")
    return modules


def check_state(x: Any) -> None:
    """Check that a momentum net can run on a value.

    Raises:
        MfxError: it is not a floating-point tensor.
    """
    if isinstance(x, Proxy):
        raise MfxError(
            "a MomentumNet consists of momentum steps already, so there is no graph of it to rewrite, to draw or to "
            "profile against others. A model that contains it can be traced and momentumized; mfx.explain(net, x) says "
            "what the net keeps, and mfx.profile(net, x, against={'kept': other, 'rebuilt': net}) compares nets."
        )
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = str(x.dtype) if isinstance(x, Tensor) else described(x)
        raise MfxError(f"a MomentumNet runs on a floating-point tensor x, not on {what}.")


def check_flags(**flags: Any) -> None:
    """Check that arguments are True or False.

    Raises:
        MfxError: one is not.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise MfxError(f"{name}={flag!r}: must be True or False.")
