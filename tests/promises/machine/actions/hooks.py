"""Hooks, added and removed at any moment."""

from typing import Any

import torch
from torch import Tensor, nn

import mfx
from tests.promises.machine.compare import Bits
from tests.promises.machine.participant import LOGS
from tests.promises.machine.table import action


class Hook:
    """A user's hook, which copies and pickles take along: it notes what it sees, or changes it."""

    def __init__(self, owner: str, kind: str) -> None:
        self.owner, self.kind = owner, kind

    def note(self, what: Any) -> None:
        """Note a value, but for that of a second run."""
        if not mfx.recomputing():
            LOGS[self.owner].append((self.kind, what))

    def __call__(self, *args: Any) -> Any:
        """Be called."""
        return getattr(self, self.kind)(*args)

    def noting(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Note an output."""
        self.note(Bits.of(output))

    def doubling(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Double an output."""
        self.note("doubled")
        return 2 * output

    def halving_input(self, module: nn.Module, args: Any) -> Any:
        """Halve an input."""
        return (args[0] * 0.5, *args[1:])

    def noting_arguments(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note arguments."""
        self.note((len(args), sorted(kwargs)))

    def noting_gradient(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        """Note gradients."""
        self.note([None if g is None else Bits.of(g) for g in (*grad_input, *grad_output)])

    def halving_gradient(self, module: nn.Module, grad_output: Any) -> Any:
        """Halve a gradient."""
        return tuple(None if g is None else 0.5 * g for g in grad_output)

    def drawing(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Add noise."""
        return output + 0.1 * torch.rand_like(output)


ADD = {
    "noting": lambda module, hook: module.register_forward_hook(hook),
    "doubling": lambda module, hook: module.register_forward_hook(hook, always_call=True),
    "halving_input": lambda module, hook: module.register_forward_pre_hook(hook, prepend=True),
    "noting_arguments": lambda module, hook: module.register_forward_pre_hook(hook, with_kwargs=True),
    "noting_gradient": lambda module, hook: module.register_full_backward_hook(hook),
    "halving_gradient": lambda module, hook: module.register_full_backward_pre_hook(hook),
    "drawing": lambda module, hook: module.register_forward_hook(hook),
}
TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@action(6, where=range(40), kind=ADD)
def add_hook(participant, where, kind):
    """Add a hook to a layer in a branch."""
    layers = participant.layers()
    ADD[kind](layers[where % len(layers)], Hook(participant.name, kind))


@action(5, which=range(6))
def remove_hook(participant, which):
    """Remove one of the hooks."""
    found = [
        (table, key)
        for module in participant.layers()
        for table in (vars(module)[name] for name in TABLES)
        for key, hook in table.items()
        if isinstance(hook, Hook)
    ]
    if found:
        table, key = found[which % len(found)]
        del table[key]


@action(3, where=range(40), kind=("gradient", "accumulated"))
def add_tensor_hook(participant, where, kind):
    """Have a parameter's gradient noted."""
    parameters = [p for layer in participant.layers() for p in layer.parameters(recurse=False) if p.requires_grad]
    if not parameters:
        return
    parameter, log = parameters[where % len(parameters)], participant.log
    if kind == "gradient":
        parameter.register_hook(lambda g: log.append(("gradient", Bits.of(g))))
    else:
        parameter.register_post_accumulate_grad_hook(lambda p: log.append(("accumulated", Bits.of(p.grad))))
