"""One training step of a model, and what is compared and counted of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

import mfx
from mfx_passes import Rejection
from tests.oracles import Grads, residual_adds

Named: TypeAlias = Mapping[str, Any]
NOTHING: Named = {}


@dataclass(frozen=True)
class Outcome:
    """The result of a forward and a backward pass."""

    outputs: list[Tensor]
    grads: Grads
    state: dict[str, Tensor]
    rng: Tensor


def train_step(net: nn.Module, inputs: Sequence[Any], named: Named = NOTHING) -> Outcome:
    """One forward and backward pass from a fixed random state. The net's buffers and gradients are put back."""
    parameters = dict(net.named_parameters())
    before = state_of(net)
    torch.manual_seed(2)
    with deterministic():
        outputs = tensors_in(net(*inputs, **named))
        loss_of(outputs).backward()
    rng = torch.get_rng_state()
    outcome = Outcome(
        [output.detach() for output in outputs],
        {name: p.grad for name, p in parameters.items()},
        state_of(net),
        rng,
    )
    net.load_state_dict(before, strict=False)
    for p in parameters.values():
        p.grad = None
    return outcome


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy of what a step may change without an optimizer: the state but for the parameters."""
    parameters = {id(p) for p in net.parameters()}
    state = net.state_dict(keep_vars=True)  # which has versions beside the tensors
    for name, value in list(state.items()):
        if id(value) in parameters:
            del state[name]
        else:
            state[name] = value.detach().clone()
    return state


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(outputs: Iterable[Tensor]) -> Tensor:
    """A number on which every output has a say of its own: a sum or a square is blind to what a final norm returns."""
    generator = torch.Generator().manual_seed(3)
    return sum((x * torch.randn(x.shape, generator=generator).to(x)).mean() for x in outputs)


@contextmanager
def deterministic():
    """The gradient of an indexed table (swin's position bias) is otherwise summed in whatever order threads finish."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_bit_equal(actual: Outcome, expected: Outcome) -> None:
    assert len(actual.outputs) == len(expected.outputs), "another number of outputs"
    assert all(map(torch.equal, actual.outputs, expected.outputs)), "outputs differ"
    assert actual.grads.keys() == expected.grads.keys()
    different = [name for name, grad in actual.grads.items() if not _equal(grad, expected.grads[name])]
    assert not different, f"gradients differ: {different}"
    different = [name for name, value in actual.state.items() if not torch.equal(value, expected.state[name])]
    assert not different, f"buffers differ after the step: {different}"
    assert torch.equal(actual.rng, expected.rng), "the random state differs after the step"


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def identity_adds(model: nn.Module, inputs: Sequence[Any], named: Named = NOTHING) -> int:
    return len(residual_adds(graph_of(model, inputs, named)))


def graph_of(model: nn.Module, inputs: Sequence[Any], named: Named = NOTHING) -> Tensor:
    """A number with a forward pass's autograd graph behind it, which begins at the inputs. Buffers are put back."""
    asking, asking_named = tree_map_only(Tensor, _requiring_grad, (tuple(inputs), dict(named)))
    before = state_of(model)
    try:
        outputs = model(*asking, **asking_named)
    except RuntimeError as error:  # wav2vec2 asks its own features for gradients, which must have none yet
        if "you can only change requires_grad flags of leaf" not in str(error):
            raise
        outputs = model(*inputs, **named)
    loss = loss_of(tensors_in(outputs))
    model.load_state_dict(before, strict=False)
    return loss


def _requiring_grad(x: Tensor) -> Tensor:
    return x.clone().requires_grad_() if x.is_floating_point() else x


# Sums that stay as they were and that nobody would call x + f(x) with f and x of one shape.
_NO_IDENTITY = re.compile(
    "both sides of the sum are computed|the skip is scaled, gated or subtracted|is broadcast over"
)


def is_identity(rejection: Rejection) -> bool:
    subtracts = getattr(rejection.node.target, "__name__", rejection.node.target) in ("sub", "isub", "subtract")
    return not subtracts and not _NO_IDENTITY.search(rejection.reason)  # the oracle counts additions


class Memory(NamedTuple):
    """Bytes of activations alive."""

    kept: int  # between forward and backward
    peak: int


def measure(net: nn.Module, inputs: Sequence[Any], named: Named = NOTHING) -> Memory:
    """A training step's activations, after another step: what happens at the first call only is not counted."""
    with _grads_freed(net):
        loss_of(tensors_in(net(*inputs, **named))).backward()
    return weigh(net, inputs, named)


def weigh(net: nn.Module, inputs: Sequence[Any], named: Named = NOTHING) -> Memory:
    """A training step's activations. Gradients are freed as they come, as an optimizer fused into backward does."""
    with _grads_freed(net), mfx.ActivationMeter(exclude=list(net.parameters())) as meter:
        loss = loss_of(tensors_in(net(*inputs, **named)))
        kept = meter.live
        loss.backward()
    return Memory(kept, meter.peak)


@contextmanager
def _grads_freed(net: nn.Module):
    hooks = [p.register_post_accumulate_grad_hook(_free_grad) for p in net.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _free_grad(parameter: Tensor) -> None:
    parameter.grad = None
