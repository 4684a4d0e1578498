"""Other weights: optimizers, averages, loading, freezing."""

import torch
from torch import nn

from tests.promises.machine.actions.calls import RARELY_WAITING
from tests.promises.machine.table import action


@action(6, waiting=RARELY_WAITING)
def optimize(participant, waiting):
    """Make a step of gradient descent."""
    for parameter in participant.model.parameters():
        if parameter.grad is not None:
            with torch.no_grad():
                parameter.sub_(0.01 * parameter.grad.clamp(-1, 1))
            participant.disturb("written")


@action(2, waiting=RARELY_WAITING)
def average(participant, waiting):
    """Write other values into all weights, as of a moving average."""
    with torch.no_grad():
        for parameter in participant.model.parameters():
            parameter.copy_(parameter * 0.95)
    participant.disturb("written")


@action(3, where=range(20))
def replace_parameter(participant, where):
    """Put another parameter in the place of a layer's; calls under way go on with the old one."""
    linears = [layer for layer in participant.layers(nn.Linear) if "weight" in layer._parameters]
    if linears:
        layer = linears[where % len(linears)]
        participant.retired = [*participant.retired, layer.weight][-4:]
        layer.weight = nn.Parameter(layer.weight.detach() * 0.8, requires_grad=layer.weight.requires_grad)


@action(2, scale=(0.9, 1.1), waiting=(False,))
def set_data(participant, scale, waiting):
    """Assign to the data of all parameters."""
    for parameter in participant.model.parameters():
        parameter.data = parameter.data * scale


@action(3, assign=(False, True), strict=(True, False), waiting=RARELY_WAITING)
def load(participant, assign, strict, waiting):
    """Load a state dict."""
    state = participant.model.state_dict()
    changed = {name: t * 0.9 if t.is_floating_point() else t.clone() for name, t in state.items()}
    if not strict:
        changed.pop(next(iter(changed)))
    before = list(participant.model.parameters())
    keys = participant.model.load_state_dict(changed, strict=strict, assign=assign)
    participant.disturb("written")
    if assign:
        participant.retired = [p for p in before if p.grad is not None][:4]
    return keys.missing_keys, keys.unexpected_keys


@action(4, where=range(60), trained=(True, False), waiting=RARELY_WAITING)
def freeze(participant, where, trained, waiting):
    """Freeze or unfreeze a part of the model."""
    modules = [module for module in participant.model.modules() if next(module.parameters(), None) is not None]
    modules[where % len(modules)].requires_grad_(trained)
