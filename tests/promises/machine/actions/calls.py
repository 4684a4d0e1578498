"""Forward and backward passes, in all the ways that people make them."""

import math
import threading
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import mfx
from tests.promises.machine import models
from tests.promises.machine.actions.hooks import TABLES
from tests.promises.machine.actions.observers import GRADIENTS, OBSERVERS
from tests.promises.machine.layers import Checkpointed
from tests.promises.machine.participant import Call, Interrupted, Participant
from tests.promises.machine.table import Instead, Refusal, action

MOST_CALLS = 4
SEEDS, BATCHES, EXTRAS = range(8), (2, 3, 3, 5, [2, 3]), ("none", "none", "none", "mask", "scale", "other")
CHANGED = r"was changed between forward and backward|modified (by an inplace|in place)"
LATE = (
    Refusal("written", CHANGED),
    Refusal("statistics", CHANGED),
    Refusal("unparametrized", r"the parametrization of \w+ in a \w+ was removed between forward and backward"),
    Instead(r"modified by an inplace operation", CHANGED),
)
"""Errors of a backward pass, after changes since its forward pass that no recomputation can go behind."""
RARELY_WAITING = (False,) * 12 + (True,)
"""True if calls under way wait for their backward pass until after a change that may make it impossible."""


def inputs(participant: Participant, seed: int, batch: int | list[int], extra: str) -> tuple[Tensor, dict[str, Any]]:
    """Return the input of a call and its optional arguments."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(p.dtype for p in participant.model.parameters())
    sizes = [batch] if isinstance(batch, int) else batch
    if any(isinstance(module, nn.BatchNorm1d) for module in participant.model.modules()):
        sizes = [math.prod(sizes)]  # which takes the second dimension for channels
    x = torch.randn(*sizes, models.WIDTH, generator=generator).to(dtype)
    mask = torch.rand(models.WIDTH, generator=generator).to(dtype)
    if extra == "other" and not isinstance(participant.model, models.Optional):
        extra = "none"
    return x, {"none": {}, "mask": {"mask": mask}, "scale": {"scale": 0.5}, "other": {"other": 0.5 * x}}[extra]


def _tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def remember(participant: Participant, result: Any, leaves: list[Tensor]) -> None:
    """Keep the outputs of a call for a backward pass, if there are any with a history."""
    outputs = [tensor for tensor in _tensors(result) if tensor.grad_fn is not None and tensor.numel()]
    if outputs:
        participant.calls.append(Call(outputs, leaves))
        del participant.calls[:-MOST_CALLS]


def loss(outputs: list[Tensor]) -> Tensor:
    """Return a loss that all the outputs count in."""
    return torch.stack([output.double().pow(2).mean() for output in outputs]).sum()


@action(
    30,
    seed=SEEDS,
    batch=BATCHES,
    extra=EXTRAS,
    gradient=("training",) * 6 + ("no_grad", "inference_mode"),
    under=("nothing",) * 12 + tuple(OBSERVERS),
    differentiable=(False, True),
)
def forward(participant, seed, batch, extra, gradient, under, differentiable):
    """Call the model."""
    x, more = inputs(participant, seed, batch, extra)
    before = x.clone()
    x.requires_grad_(differentiable)
    seen: list[Any] = []
    noted, is_net = len(participant.log), participant.name != "plain"
    if (under, gradient) == ("FlopCounterMode", "inference_mode"):
        gradient = "no_grad"  # that counter raises an error of its own at a spectral norm in inference mode
    original = mfx.original(participant.model) if under == "original" and is_net else nullcontext()
    with GRADIENTS[gradient](), OBSERVERS[under](seen), original:
        result = participant.model(x, **more)
    remember(participant, result, [x])
    if isinstance(participant.model, models.Detector) and not participant.model.training:
        del participant.log[noted:]  # off the path expected, the call is made again with its hooks, as the limits say
        seen = [] if under == "global hook" else seen
    return result, seen, torch.equal(x, before)


@action(
    20,
    refusals=LATE,
    which=range(MOST_CALLS),
    part=("all", "all", "last", "first"),
    retain=(False, True),
    into=("grad", "grad", "grad", "inputs", "some", "create_graph"),
    again=(False,) * 60 + (True,),
    thread=(False, False, False, True),
)
def backward(participant, which, part, retain, into, again, thread):
    """Make the backward pass of a call, or of a part of its outputs."""
    if not participant.calls:
        return None
    call = participant.calls[which % len(participant.calls)]
    participant.reasons |= call.disturbed
    if not retain:
        participant.calls.remove(call)
    outputs = {"all": call.outputs, "last": call.outputs[-1:], "first": call.outputs[:1]}[part]

    def run() -> Any:
        return _backward(participant, outputs, call.leaves, retain, into)

    results = [in_thread(run) if thread else run()]
    return [*results, run()] if again else results


def _backward(participant: Participant, outputs: list[Tensor], leaves: list[Tensor], retain: bool, into: str) -> Any:
    value = loss(outputs)
    if into == "grad":
        return value.backward(retain_graph=retain)
    parameters = [p for p in participant.model.parameters() if p.requires_grad]
    some = [t for t in leaves if t.requires_grad] if into == "inputs" else parameters[::3]
    if not some:
        return value.backward(retain_graph=retain)
    if into == "create_graph":
        first = torch.autograd.grad(value, some, create_graph=True, allow_unused=True)
        penalty = [g for g in first if g is not None and g.grad_fn is not None]
        second = torch.autograd.grad(loss(penalty), some, allow_unused=True) if penalty else None
        return first, second
    return torch.autograd.grad(value, some, retain_graph=retain, allow_unused=True)


def in_thread(run: Any) -> Any:
    """Return what a function returns that runs in a thread of its own."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(run())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@action(8, refusals=LATE)
def finish(participant):
    """Make the backward passes of all calls under way."""
    while participant.calls:
        call = participant.calls.pop()
        participant.reasons |= call.disturbed
        loss(call.outputs).backward()


@action(3, set_to_none=(True, False))
def zero_grad(participant, set_to_none):
    """Clear gradients."""
    participant.model.zero_grad(set_to_none)


@action(
    6, refusals=LATE, seed=SEEDS, batch=BATCHES, kind=("clones", "fast", "fast", "some", "own", "second"), extra=EXTRAS
)
def functional(participant, seed, batch, kind, extra):
    """Call the model with other weights than its own."""
    x, more = inputs(participant, seed, batch, extra)
    own = {name: p for name, p in participant.model.named_parameters() if p.requires_grad}
    if any(isinstance(m, Checkpointed) for m in participant.model.modules()) and _has_hooks(participant):
        kind = "own"  # where a hook ends a graph, torch's checkpoint is torch's, and takes the weights of the backward
    if kind == "second":
        return _meta_gradient(participant, own, x, more)
    changed = {
        "clones": {name: p.detach().clone().requires_grad_() for name, p in own.items()},
        "fast": {name: p * 0.9 for name, p in own.items()},
        "some": {name: p * 1.1 for name, p in list(own.items())[::2]},
        "own": own,
    }[kind]
    result = functional_call(participant.model, changed, (x,), more)
    remember(participant, result, list(changed.values()) if kind == "clones" else [])
    return result


def _has_hooks(participant: Participant) -> bool:
    return any(getattr(module, table) for module in participant.layers() for table in TABLES)


def _meta_gradient(participant: Participant, own: dict[str, Tensor], x: Tensor, more: dict[str, Any]) -> Any:
    """Return gradients through a step of gradient descent, as in meta-learning."""
    if not own:
        return None
    first = loss(_tensors(functional_call(participant.model, own, (x,), more)))
    slopes = torch.autograd.grad(first, list(own.values()), create_graph=True, allow_unused=True)
    fast = {name: p if g is None else p - 0.1 * g for (name, p), g in zip(own.items(), slopes, strict=True)}
    second = loss(_tensors(functional_call(participant.model, fast, (x,), more)))
    return torch.autograd.grad(second, list(own.values()), allow_unused=True)


def _is_repeatable(participant: Participant) -> bool:
    """True if a call changes nothing that a call at the same time, or the next one, depends on."""
    hooks = [hook for module in participant.layers() for hook in module._forward_hooks.values()]
    return next(participant.model.buffers(), None) is None and not any(
        getattr(hook, "kind", "") == "drawing" for hook in hooks
    )


def _selected(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operation is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(_selected)},
}


@action(3, accepts=models.is_pure, seed=SEEDS, batch=BATCHES, kind=CHECKPOINTS)
def checkpointed(participant, seed, batch, kind):
    """Call the model under torch's checkpoint."""
    if not _is_repeatable(participant):
        return None
    x, _ = inputs(participant, seed, batch, "none")
    x.requires_grad_()
    with set_checkpoint_early_stop(False):
        result = checkpoint(participant.model, x, **CHECKPOINTS[kind])
        loss(_tensors(result)).backward()
    return result, x.grad


@action(3, accepts=models.is_pure, seed=SEEDS, batch=BATCHES, count=(2, 3))
def threads(participant, seed, batch, count):
    """Make whole training steps in several threads at once."""
    if not _is_repeatable(participant):
        return None
    noted = len(participant.log)
    results: dict[int, Any] = {}
    parameters = [p for p in participant.model.parameters() if p.requires_grad]

    def step(number: int) -> None:
        x, _ = inputs(participant, seed + number, batch, "none")
        try:
            outputs = _tensors(participant.model(x))
            gradients = torch.autograd.grad(loss(outputs), parameters, allow_unused=True) if parameters else None
            results[number] = outputs, gradients
        except Exception as error:
            results[number] = f"{type(error).__name__}: {error}"

    workers = [threading.Thread(target=step, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    del participant.log[noted:]  # of these, a capture in another thread may undo some
    return [results[number] for number in range(count)]


@action(4, seed=SEEDS, batch=BATCHES, where=range(20), kind=("error", "interrupt"))
def interrupted(participant, seed, batch, where, kind):
    """Call the model, and catch an exception that a layer raises."""
    layers = participant.layers(nn.Linear)
    layer = layers[where % len(layers)]

    def fail(module: nn.Module, args: Any) -> None:
        raise (ValueError if kind == "error" else Interrupted)("in the middle")

    handle = layer.register_forward_pre_hook(fail)
    x, _ = inputs(participant, seed, batch, "none")
    try:
        participant.model(x)
    except (ValueError, Interrupted) as error:
        return str(error)
    finally:
        handle.remove()


@action(2, seed=SEEDS, batch=BATCHES, where=range(8))
def part(participant, seed, batch, where):
    """Call a chain of the model by itself."""
    chains = [module for module in participant.model.modules() if isinstance(module, models.Chain)]
    x, _ = inputs(participant, seed, batch, "none")
    result = chains[where % len(chains)](x)
    remember(participant, result, [])
    return result
