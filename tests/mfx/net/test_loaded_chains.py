"""The steps of the chains, noted beside the weights: another set of chains is another function of the same weights."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

import mfx
from tests.mfx.models import WIDTH, ConvNet, Stack, images, inputs
from tests.sampling import grid

OTHER = "saved with other chains than it has"
PIECES = [["blocks.0"], ["blocks.1"], ["blocks.2"]]


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def follow(error, model, **options):
    """Do what an error advises."""
    (call,) = re.findall(r"call (mfx\.momentumize\(.*?\)) without any other", str(error.value))
    return eval(call.replace("(model", "(model, **options", 1), {"mfx": mfx, "model": model, "options": options})


CHOICES = {
    "fewer here": ({}, {"skip": "blocks.1"}),
    "fewer there": ({"skip": "blocks.1"}, {}),
    "an end left out": ({"only": ["blocks.0", "blocks.1"]}, {}),
    "other ones": ({"skip": "blocks.2"}, {"skip": "blocks.0"}),
    "chains of 2 there": ({"only": PIECES}, {}),
    "chains of 2 here": ({}, {"only": PIECES}),
    "cut within a block": ({"only": [["blocks.0", "blocks.1:1"], ["blocks.1:2", "blocks.2"]]}, {}),
    "short ones left out": ({"only": [["blocks.0"], ["blocks.1", "blocks.2"]], "min_steps": 3}, {}),
    "a step left out": ({"skip": "blocks.1:1"}, {}),
}


@grid(
    2 * len(CHOICES),
    choice=CHOICES,
    called={"before a call": False, "after one": True},
    travel={"as it is": lambda state: state, "saved": saved, "copied": copy.deepcopy},
)
def test_other_chains_are_an_error_whose_advice_works(choice, called, travel):
    there, here = choice
    net, other, x = mfx.momentumize(Stack(), **there), mfx.momentumize(Stack(), **here), inputs()
    if called:
        net(x), other(x)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(mfx.MfxError, match=OTHER) as error:
        other.load_state_dict(travel(net.state_dict()))
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    again = follow(error, Stack())
    again.load_state_dict(travel(net.state_dict()))
    assert torch.equal(again(x), net(x))
    again.load_state_dict(travel(net.state_dict()))


@grid(
    8, options=[{}, {"min_steps": 1}, {"only": PIECES}, {"skip": "blocks.1"}], called=[(0, 0), (0, 1), (1, 0), (1, 1)]
)
def test_the_same_chains_load_in_silence(options, called):
    nets = [mfx.momentumize(Stack(), **options) for _ in called]
    for net, is_called in zip(nets, called, strict=True):
        if is_called:
            net(inputs())
    nets[1].load_state_dict(saved(nets[0].state_dict()), strict=False)
    nets[1].load_state_dict(saved(nets[0].state_dict()), assign=True)
    assert torch.equal(nets[0](inputs()), nets[1](inputs()))


@pytest.mark.parametrize("arguments", [{"strict": False}, {"assign": True}])
def test_however_they_are_loaded(arguments):
    net, other = mfx.momentumize(Stack(), skip="blocks.1"), mfx.momentumize(Stack())
    with pytest.raises(mfx.MfxError, match=OTHER):
        other.load_state_dict(net.state_dict(), **arguments)


@pytest.mark.parametrize("route", ["symbolic", "dynamo"])
@pytest.mark.parametrize("build", [Stack, ConvNet])
def test_the_way_of_capture_does_not_matter(build, route):
    x = images() if build is ConvNet else inputs()
    net, other = mfx.momentumize(build()), mfx.momentumize(build(), capture=route)
    net(x), other(x)
    assert (
        net.state_dict()._metadata[""]["mfx.chains"]["chains"]
        == other.state_dict()._metadata[""]["mfx.chains"]["chains"]
    )
    net.load_state_dict(other.state_dict())


def test_chains_that_are_found_later_are_compared_then():
    state = mfx.momentumize(Stack(), skip="blocks.1").state_dict()
    net, x = mfx.momentumize(Stack(), capture="dynamo"), inputs()
    trained = mfx.momentumize(Stack(), skip="blocks.1")
    trained(x)
    net.load_state_dict(trained.state_dict())
    for _ in range(2):
        with pytest.raises(mfx.MfxError, match=OTHER) as error:
            net(x)
    net.load_state_dict(dict(state))  # as the message says
    net(x)
    same = follow(error, Stack(), capture="dynamo")
    same.load_state_dict(trained.state_dict())
    assert torch.equal(same(x), trained(x))


def test_a_net_without_a_call_passes_the_record_on():
    first, x = mfx.momentumize(Stack(), skip="blocks.1"), inputs()
    first(x)
    between, last = (mfx.momentumize(Stack(), capture="dynamo") for _ in range(2))
    between.load_state_dict(first.state_dict())
    last.load_state_dict(saved(between.state_dict()))
    with pytest.raises(mfx.MfxError, match=OTHER):
        last(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_know_their_chains(copied):
    net = mfx.momentumize(Stack(), skip="blocks.1", capture="dynamo")
    net(inputs())
    with pytest.raises(mfx.MfxError, match=OTHER):
        mfx.momentumize(Stack(), example_inputs=inputs(), capture="dynamo").load_state_dict(copied(net).state_dict())


class Lossy(nn.Module):
    """A step is lost at the first call, which finds that its branch is broadcast over the stream."""

    def __init__(self):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(WIDTH, 1 if i == 2 else WIDTH) for i in range(5))

    def forward(self, x):
        for fc in self.fcs:
            x = x + fc(x)
        return x


def losing(net):
    with pytest.warns(UserWarning, match="left as it was"):
        net(inputs())
    return net


def test_steps_that_a_call_loses():
    net, fresh = losing(mfx.momentumize(Lossy())), mfx.momentumize(Lossy())
    assert set(net.state_dict()._metadata[""]["mfx.gamma"]) == {"fcs", "fcs#2"}
    fresh.load_state_dict(net.state_dict())
    losing(fresh).load_state_dict(net.state_dict())
    assert torch.equal(fresh(inputs()), net(inputs()))
    with pytest.raises(mfx.MfxError, match=OTHER):
        mfx.momentumize(Lossy(), skip="fcs.4").load_state_dict(net.state_dict())
    with pytest.raises(mfx.MfxError, match=OTHER):
        losing(mfx.momentumize(Lossy(), skip="fcs.4", min_steps=1)).load_state_dict(net.state_dict())


class Parts(nn.Module):
    """Two chains, one of which not every call computes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Stack().blocks, Stack().blocks

    def forward(self, x, decode=True):
        for block in (*self.encoder, *(self.decoder if decode else ())):
            x = block(x).tanh() if block is self.encoder[-1] else block(x)
        return x


def test_chains_that_the_other_net_never_computed_are_no_other_chains():
    net, other = mfx.momentumize(Parts(), capture="dynamo"), mfx.momentumize(Parts())
    net(inputs(), decode=False)
    assert set(net.state_dict()._metadata[""]["mfx.gamma"]) == {"encoder"}
    other(inputs())
    other.load_state_dict(saved(net.state_dict()))
    net.load_state_dict(saved(other.state_dict()))
    less = mfx.momentumize(Parts(), skip="encoder.1")
    less(inputs())
    with pytest.raises(mfx.MfxError, match=OTHER):
        less.load_state_dict(net.state_dict())


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Stack(), Stack()

    def encode(self, x):
        return self.encoder(x)

    def forward(self, x):
        return self.decoder(torch.cat([self.encode(x)] * 3, dim=-1)[..., :WIDTH])


def test_a_net_called_module_by_module():
    net, x = mfx.momentumize(Methods(), only=[[f"encoder.blocks.{i}"] for i in range(3)], capture="dynamo"), inputs()
    net.encode(x)
    state = saved(net.state_dict())
    assert state._metadata[""]["mfx.gamma"]
    other = mfx.momentumize(Methods(), capture="dynamo")
    other.load_state_dict(state)
    with pytest.raises(mfx.MfxError, match=OTHER) as error:
        other.encode(x)
    again = follow(error, Methods(), capture="dynamo")
    again.load_state_dict(state)
    assert torch.equal(again.encode(x), net.encode(x))


def test_at_gamma_zero_it_is_no_error():
    net, model, x = mfx.momentumize(Stack(), skip="blocks.1"), Stack(), inputs()
    still = mfx.momentumize(model, gamma=0.0)
    with pytest.warns(UserWarning, match=rf"another function of the same weights.*Besides.*{OTHER}"):
        still.load_state_dict(net.state_dict())
    assert torch.equal(still(x), model(x))
    with pytest.raises(mfx.MfxError, match=OTHER):
        mfx.set_gamma(still, 0.9)  # which would not be the function that was saved
    assert torch.equal(still(x), model(x))
    with pytest.warns(UserWarning, match="another gamma than this net has") as caught:
        net.load_state_dict(still.state_dict())
    assert "Besides" not in str(caught[0].message)  # its chains are the model


def test_without_a_record_they_load_as_ever():
    net, other = mfx.momentumize(Stack(), skip="blocks.1"), mfx.momentumize(Stack())
    state = net.state_dict()
    del state._metadata[""]["mfx.chains"]
    with pytest.warns(UserWarning, match="another gamma than this net has"):  # by name
        other.load_state_dict(state)
    other.load_state_dict(dict(net.state_dict()))
    other.load_state_dict(Stack().state_dict())
    other(inputs())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints(tmp_path):
    """Their files hold tensors alone."""
    net, other = mfx.momentumize(Stack(), skip="blocks.1"), mfx.momentumize(Stack())
    checkpoint.save(get_model_state_dict(net), checkpoint_id=tmp_path, no_dist=True)
    state = get_model_state_dict(other)
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, state)
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    with pytest.raises(mfx.MfxError, match=OTHER):
        set_model_state_dict(other, get_model_state_dict(net))


class Wrapped(nn.Module):
    def __init__(self, module, name="module"):
        super().__init__()
        self.add_module(name, module)


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_prefixes(name):
    """Of DistributedDataParallel and torch.compile."""
    state = saved(Wrapped(mfx.momentumize(Stack(), skip="blocks.1"), name).state_dict())
    with pytest.raises(mfx.MfxError, match=OTHER):
        Wrapped(mfx.momentumize(Stack()), name).load_state_dict(state)
    Wrapped(mfx.momentumize(Stack(), skip="blocks.1"), name).load_state_dict(state)
    consume_prefix_in_state_dict_if_present(state, f"{name}.")
    with pytest.raises(mfx.MfxError, match=OTHER):
        mfx.momentumize(Stack()).load_state_dict(state)
    mfx.momentumize(Stack(), skip="blocks.1").load_state_dict(state)


def test_compiled_nets():
    net = torch.compile(mfx.momentumize(Stack(), skip="blocks.1"), backend="eager")
    with pytest.raises(mfx.MfxError, match=OTHER):
        torch.compile(mfx.momentumize(Stack()), backend="eager").load_state_dict(net.state_dict())
    model = Stack()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # checkpoints are cleaned of its name
    state = mfx.momentumize(model, skip="blocks.1*").state_dict()
    for key in [key for key in state if "_orig_mod" in key]:
        state[key.replace("_orig_mod.", "")] = state.pop(key)
    mfx.momentumize(Stack(), skip="blocks.1").load_state_dict(state)


def test_part_of_a_net():
    net, other = mfx.momentumize(Stack(), skip="blocks.1"), mfx.momentumize(Stack())
    other.blocks.load_state_dict(net.blocks.state_dict())  # has no record
    other.load_state_dict(net.state_dict(prefix="net."), strict=False)


def test_graph_modules():
    net, other = mfx.momentumize(mfx.trace(Stack()), skip="blocks.1"), mfx.momentumize(mfx.trace(Stack()))
    with pytest.raises(mfx.MfxError, match=OTHER):
        other.load_state_dict(saved(net.state_dict()))
    with pytest.raises(mfx.MfxError, match=OTHER):
        mfx.momentumize(Stack()).load_state_dict(saved(net.state_dict()), strict=False)
    other.load_state_dict(saved(mfx.momentumize(Stack()).state_dict()), strict=False)


class Renamed(mfx.MomentumNet):
    pass


def functions():
    return [nn.Linear(WIDTH, WIDTH) for _ in range(3)]


def test_momentum_nets():
    net = mfx.MomentumNet(functions())
    Renamed(functions()).load_state_dict(saved(net.state_dict()))  # in silence
    with pytest.raises(mfx.MfxError, match=f"{OTHER}.*Make this net as the other one was made"):
        mfx.MomentumNet(functions(), is_residual=False).load_state_dict(saved(net.state_dict()))
    with pytest.warns(UserWarning, match="saved at gamma = 0.9, and this net has gamma = 0.5"):
        Renamed(functions(), 0.5).load_state_dict(net.state_dict())


def test_named_layers():
    net = mfx.transform_to_momentumnet(Stack(), ["blocks"])
    with pytest.raises(mfx.MfxError, match=f"{OTHER}.*as the other one was made"):
        mfx.momentumize(Stack()).load_state_dict(net.state_dict())
    with pytest.raises(mfx.MfxError, match=f"{OTHER}.*as the other one was made"):
        net.load_state_dict(mfx.momentumize(Stack()).state_dict())
    mfx.transform_to_momentumnet(Stack(), ["blocks"]).load_state_dict(net.state_dict())


class Rooted(nn.Module):
    """Steps that all have one path."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for factor in (1, 2, 3, 4, 5):
            x = x + torch.tanh(factor * self.fc(x))
        return x


def test_steps_of_one_path():
    """A path does not tell which of them are meant."""
    net = mfx.momentumize(Rooted(), skip=":3")
    assert set(net.state_dict()._metadata[""]["mfx.gamma"]) == {"root", "root#2"}
    with pytest.raises(mfx.MfxError, match=f"{OTHER}.*root of 2 steps, root#2 of 2 steps there.*is known to give"):
        mfx.momentumize(Rooted()).load_state_dict(net.state_dict())
