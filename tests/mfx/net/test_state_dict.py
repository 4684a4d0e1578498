"""γ beside the weights: in the metadata of a state_dict, without a key more."""

import copy
import io
import pickle
import re

import pytest
import torch
import torchvision
from torch import nn

import mfx
from tests.mfx.models import Masked, Stack, inputs


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(params=["as it is", "saved", "copied"])
def travel(request):
    return {"as it is": lambda state: state, "saved": saved, "copied": copy.deepcopy}[request.param]


def test_no_new_keys():
    model = Stack()
    net = mfx.momentumize(model, gamma=0.5)
    assert list(net.state_dict()) == list(model.state_dict())
    assert "mfx.gamma" not in model.state_dict()._metadata[""]
    assert net.state_dict()._metadata[""]["mfx.gamma"] == {"blocks": (1, 2)}


def test_loading_at_another_gamma_warns_once(travel):
    net = mfx.momentumize(Stack(), gamma=0.9)
    other = mfx.momentumize(Stack(), gamma=0.5)
    with pytest.warns(UserWarning, match="mfx: the weights") as caught:
        other.load_state_dict(travel(net.state_dict()))
    (warning,) = caught
    assert re.search(r"saved at gamma = 0\.9, and this net has gamma = 0\.5", str(warning.message))
    assert "mfx.set_gamma(net, 0.9)" in str(warning.message)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_the_warning_advises_works(travel):
    net, x = mfx.momentumize(Stack(), gamma=0.1), inputs()
    mfx.set_gamma(net, 0.875)  # what counts is γ when it was saved
    other = mfx.momentumize(Stack(), gamma=0.5)
    with pytest.warns(UserWarning, match="mfx: the weights") as caught:
        other.load_state_dict(travel(net.state_dict()))
    (advice,) = re.findall(r"call (mfx\.set_gamma\(.*\))\.", str(caught[0].message))
    exec(advice, {"mfx": mfx, "net": other})
    assert torch.equal(other(x), net(x))
    other.load_state_dict(travel(net.state_dict()))  # in silence


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Masked(), Masked(), Masked()

    def forward(self, x):
        return self.third(self.second(self.first(x).tanh()).tanh())


def test_only_what_differs_is_listed(travel):
    """As in checkpoints that do not say of which steps the chains were."""
    net = mfx.momentumize(Stages(), gamma={"first*": 0.1, "*": 0.9})
    other = mfx.momentumize(Stages(), gamma={"first*": 0.1, "second*": 0.2, "*": 0.9}, skip="third*")
    state = net.state_dict()
    del state._metadata[""]["mfx.chains"]
    with pytest.warns(UserWarning, match="mfx: the weights") as caught:
        other.load_state_dict(travel(state))
    (warning,) = caught
    message = str(warning.message)
    assert "second: 0.9 there, 0.2 here" in message
    assert "third: 0.9 there, not rewritten here" in message
    assert "first" not in message
    assert "mfx.set_gamma(net, {'second': 0.9})" in message


def test_a_chain_that_is_not_rewritten_is_one_at_zero():
    net = mfx.momentumize(Stages(), gamma={"third*": 0.0, "*": 0.9})
    other = mfx.momentumize(Stages(), gamma=0.9, skip="third*")
    other.load_state_dict(net.state_dict())
    net.load_state_dict(other.state_dict())


def test_silence_where_nothing_is_wrong(travel):
    model = Stack()
    net = mfx.momentumize(model, gamma=0.9)
    net.load_state_dict(travel(Stack().state_dict()))  # pretrained weights
    net.load_state_dict(travel(mfx.momentumize(Stack(), gamma=0.9).state_dict()))
    net.load_state_dict(dict(mfx.momentumize(Stack(), gamma=0.5).state_dict()))  # a plain dict says nothing of γ
    model.load_state_dict(travel(net.state_dict()))


def test_inside_another_module():
    outer = nn.ModuleDict({"encoder": mfx.momentumize(Stack(), gamma=0.9), "head": nn.Linear(3, 3)})
    other = nn.ModuleDict({"encoder": mfx.momentumize(Stack(), gamma=0.5), "head": nn.Linear(3, 3)})
    with pytest.warns(UserWarning, match=r"gamma = 0\.9, and this net has gamma = 0\.5") as caught:
        other.load_state_dict(saved(outer.state_dict()))
    assert len(caught) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), mfx.momentumize])
def test_copies_note_and_compare_too(copied):
    net = copied(mfx.momentumize(Stack(), gamma=0.9))
    other = mfx.momentumize(Stack(), gamma=0.5)
    with pytest.warns(UserWarning, match=r"gamma = 0\.9, and this net has gamma = 0\.5") as caught:
        other.load_state_dict(net.state_dict())
    with pytest.warns(UserWarning, match=r"gamma = 0\.5, and this net has gamma = 0\.9") as back:
        net.load_state_dict(other.state_dict())
    assert len(caught) == len(back) == 1


def test_before_the_first_capture():
    pytest.importorskip("mfx.dynamo")
    state = mfx.momentumize(Stack(), gamma=0.9).state_dict()
    for gamma in (0.5, {"blocks": 0.5}):
        net = mfx.momentumize(Stack(), gamma=gamma, capture="dynamo")
        with pytest.warns(UserWarning, match=r"gamma = 0\.9, and this net has gamma = 0\.5"):
            net.load_state_dict(state)
        mfx.set_gamma(net, 0.9)
        net.load_state_dict(state)
    other = mfx.momentumize(Stack(), gamma=0.9)
    other.load_state_dict(state)
    assert torch.equal(net(inputs()), other(inputs()))


def test_graph_modules():
    net, other = (mfx.momentumize(mfx.trace(Stack()), gamma=gamma) for gamma in (0.9, 0.5))
    with pytest.warns(UserWarning, match=r"gamma = 0\.9, and this net has gamma = 0\.5"):
        other.load_state_dict(saved(net.state_dict()))
    mfx.set_gamma(other, 0.9)
    other.load_state_dict(saved(net.state_dict()))


def test_a_copy_without_its_rewritten_forward_is_an_ordinary_model():
    net = mfx.momentumize(Stack(), gamma=0.9)
    graph_module = mfx.trace(net)  # traces the function of the class
    assert "mfx.gamma" not in graph_module.state_dict()._metadata[""]


def test_a_real_checkpoint():
    model = torchvision.models.resnet18()
    net = mfx.momentumize(model, gamma=0.9)
    state = saved(net.state_dict())
    assert list(state) == list(model.state_dict())
    assert state._metadata[""]["mfx.gamma"] == {"layer1": (9, 10)}
    torchvision.models.resnet18().load_state_dict(state)
    with pytest.warns(UserWarning, match=r"this ResNet were saved at gamma = 0\.9, and this net has gamma = 0\.0"):
        mfx.momentumize(model, gamma=0.0).load_state_dict(state)
