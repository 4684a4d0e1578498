"""Changes of a model: modes, attributes, modules, parametrizations."""

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import mfx
from tests.promises.machine import layers, models
from tests.promises.machine.actions.calls import RARELY_WAITING
from tests.promises.machine.table import action


@action(6, training=(True, True, False))
def train(participant, training):
    """Set the training mode of the model."""
    participant.model.train(training)


@action(4, where=range(60), training=(True, False))
def train_part(participant, where, training):
    """Set the training mode of a part."""
    modules = list(participant.model.modules())
    modules[where % len(modules)].train(training)


ATTRIBUTES = {
    nn.Dropout: ("p", (0.1, 0.5)),
    nn.BatchNorm1d: ("momentum", (0.1, 0.3, None)),
    nn.LayerNorm: ("eps", (1e-5, 1e-2)),
    layers.Scaled: ("factor", (0.5, 1.0, 2.0)),
    layers.Counter: ("calls", (0, 3)),
    layers.Lazy: ("first", (None,)),
    models.Chain: ("strength", (0.5, 1.0)),
}


@action(6, where=range(60), what=range(6))
def set_attribute(participant, where, what):
    """Change a number that a module holds."""
    modules = [module for module in participant.model.modules() if type(module) in ATTRIBUTES]
    module = modules[where % len(modules)]
    name, values = ATTRIBUTES[type(module)]
    setattr(module, name, values[what % len(values)])


@action(2, where=range(60))
def switch(participant, where):
    """Change a flag that decides what a layer computes."""
    found = participant.layers(layers.Scaled)
    if found:
        module = found[where % len(found)]
        module.smooth = not module.smooth


@action(2, where=range(60))
def replace_dict(participant, where):
    """Put a copy in the place of the dictionary that holds a layer's attributes."""
    layers = participant.layers()
    layer = layers[where % len(layers)]
    layer.__dict__ = dict(layer.__dict__)


class Adapter(nn.Module):
    """A low-rank update beside a layer, as LoRA adds it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        kind = {"dtype": base.bias.dtype}
        self.down = nn.Linear(models.WIDTH, 2, bias=False, **kind)
        self.up = nn.Linear(2, models.WIDTH, bias=False, **kind)

    def forward(self, x):
        """Return the layer's output and the update."""
        return self.base(x) + self.up(self.down(x))


@action(3, where=range(20), waiting=RARELY_WAITING)
def add_adapter(participant, where, waiting):
    """Put an adapter in the place of a linear layer."""
    linears = [layer for layer in participant.layers(nn.Linear) if type(_parent(participant, layer)[0]) is not Adapter]
    if linears:
        layer = linears[where % len(linears)]
        parent, name = _parent(participant, layer)
        setattr(parent, name, Adapter(layer).train(layer.training))


@action(2, where=range(20), waiting=RARELY_WAITING)
def remove_adapter(participant, where, waiting):
    """Put a linear layer back in the place of its adapter."""
    if adapters := participant.layers(Adapter):
        adapter = adapters[where % len(adapters)]
        parent, name = _parent(participant, adapter)
        setattr(parent, name, adapter.base)


def _parent(participant, module):
    path = next(path for path, other in participant.model.named_modules() if other is module)
    above, _, name = path.rpartition(".")
    return participant.model.get_submodule(above), name


class Halved(nn.Module):
    """A parametrization: half of a weight."""

    def forward(self, weight):
        """Return half of it."""
        return weight * 0.5


@action(3, where=range(20), kind=("halved", "weight_norm", "spectral_norm"), waiting=RARELY_WAITING)
def parametrize_layer(participant, where, kind, waiting):
    """Register a parametrization of a weight."""
    linears = [layer for layer in participant.layers(nn.Linear) if "weight" in layer._parameters]
    if linears:
        layer = linears[where % len(linears)]
        if kind == "halved":
            parametrize.register_parametrization(layer, "weight", Halved())
        else:
            getattr(parametrizations, kind)(layer)
        participant.disturb("written")  # torch sets the weight to itself, in place


@action(2, where=range(20), waiting=RARELY_WAITING)
def remove_parametrization(participant, where, waiting):
    """Remove a parametrization, and keep the weight."""
    linears = [layer for layer in participant.layers(nn.Linear) if parametrize.is_parametrized(layer, "weight")]
    if linears:
        parametrize.remove_parametrizations(linears[where % len(linears)], "weight")
        participant.disturb("unparametrized")
        participant.disturb("written")  # torch writes the weight into the original of it


@action(1, waiting=(False,), dtype=("float32", "float64"))
def cast(participant, waiting, dtype):
    """Cast the model."""
    participant.model.to(getattr(torch, dtype))
    for parameter in participant.model.parameters():
        parameter.grad = None


@action(1, gamma=(0.0, 0.5, 0.9))
def set_gamma(participant, gamma):
    """Set γ of the nets that have one."""
    if participant.is_momentum:
        mfx.set_gamma(participant.model, gamma)
