"""Copies of a model, and going on with them."""

import copy
import io
import pickle

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.promises.machine.table import action

MOST_MODELS = 3


def _pickled(model):
    return copy.deepcopy(model) if _is_parametrized(model) else pickle.loads(pickle.dumps(model))


def _saved(model):
    if _is_parametrized(model):
        return copy.deepcopy(model)  # torch refuses to pickle these
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _holds_a_history(model):
    """True if a module keeps a tensor that it has computed, as the hook of a spectral norm does."""
    values = (value for module in model.modules() for value in vars(module).values())
    return any(isinstance(value, Tensor) and value.grad_fn is not None for value in values)


def _is_parametrized(model):
    return any(parametrize.is_parametrized(module) for module in model.modules())


def _with_modules_of_its_own(model):
    """Return a shallow copy whose submodules are copies, with other weights: what meta-learning libraries make."""
    other = copy.copy(model)
    other._modules = {name: copy.deepcopy(module) for name, module in model._modules.items()}
    return _moved(other)


def _from_dict(model):
    other = type(model).__new__(type(model))
    other.__dict__ = model.__dict__.copy()
    other._modules = {name: copy.deepcopy(module) for name, module in model._modules.items()}
    return _moved(other)


def _moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "save": _saved,
    "copy": copy.copy,
    "copy with modules of its own": _with_modules_of_its_own,
    "from its __dict__": _from_dict,
}


@action(5, kind=COPIES)
def go_on_with_copy(participant, kind):
    """Copy the model, and go on with the copy."""
    if _holds_a_history(participant.model):
        kind = "copy"  # torch copies no tensor that was computed
    participant.models.append(COPIES[kind](participant.model))
    del participant.models[:-MOST_MODELS]


@action(2)
def go_back(participant):
    """Go on with the model that was copied."""
    participant.models.insert(0, participant.models.pop())


@action(1, where=range(8))
def copy_part(participant, where):
    """Put a copy of a branch in its place, and the old one aside."""
    lists = [m for m in participant.model.modules() if isinstance(m, nn.ModuleList)]
    found = lists[where % len(lists)]
    if not participant.calls and not _holds_a_history(found[0]):
        found[0] = copy.deepcopy(found[0])
