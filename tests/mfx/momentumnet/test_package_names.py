"""Weights of the momentumnet package's models in mfx's, and back."""

import copy
import warnings

import momentumnet
import pytest
import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

import mfx
from mfx.momentumnet import from_package_names, to_package_names

STAGES = ["layer1", "layer2", "layer3", "layer4"]


class Stages(nn.Module):
    """Layers at paths that end in a number, one of which could be read as part of the package's names."""

    def __init__(self):
        super().__init__()
        self.stage = nn.ModuleList(nn.Sequential(*(self.block() for _ in range(3))) for _ in range(2))

    def block(self):
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        for stage in self.stage:
            x = stage(x)
        return x


def resnet():
    return ResNet(BasicBlock, [2, 3, 1, 2], num_classes=4).double().eval()


def stages():
    return Stages().double()


CASES = [
    (resnet, STAGES, True, (1, 3, 33, 33)),
    (stages, ["stage.0", "stage.1"], False, (2, 4)),
    (stages, ["stage.1"], True, (2, 4)),
]


@pytest.mark.parametrize("make, layers, keep_first, size", CASES)
def test_both_ways(make, layers, keep_first, size):
    x = torch.randn(size, dtype=torch.float64)
    theirs = [
        momentumnet.transform_to_momentumnet(make(), layers, keep_first, use_backprop=True).eval() for _ in range(2)
    ]
    ours = mfx.transform_to_momentumnet(make(), layers, use_backprop=True, keep_first_layer=keep_first)
    for net in (ours, copy.deepcopy(ours)):
        net.load_state_dict(theirs[0].state_dict())
        torch.testing.assert_close(net(x), theirs[0](x), rtol=1e-7, atol=1e-7)  # the state has 40 fraction bits
    assert not torch.allclose(theirs[1](x), theirs[0](x))
    theirs[1].load_state_dict(to_package_names(ours.state_dict(), layers, keep_first))
    assert torch.equal(theirs[1](x), theirs[0](x))
    plain = make()
    plain.load_state_dict(from_package_names(theirs[0].state_dict(), layers, keep_first))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name


def test_without_names_the_layers_are_the_packages_default():
    """Of a ResNet-18 the first stage alone has two identity skips, of which the package makes one step."""
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    theirs = momentumnet.transform_to_momentumnet(resnet(), use_backprop=True).eval()
    ours = mfx.transform_to_momentumnet(resnet(), use_backprop=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-7, atol=1e-7)


def test_inside_another_model():
    theirs = momentumnet.transform_to_momentumnet(stages(), ["stage.0"], True)
    ours = nn.ModuleDict({"net": mfx.transform_to_momentumnet(stages(), ["stage.0"])})
    ours.load_state_dict({f"net.{name}": tensor for name, tensor in theirs.state_dict().items()})
    assert torch.equal(ours["net"].stage[0][1][0].weight, theirs.state_dict()["stage.0.1.0.network.0.0.weight"])


@pytest.mark.parametrize("options", [{}, {"sub_layers": ["layer2"]}, {"sub_layers": STAGES, "keep_first_layer": False}])
def test_another_function_is_said(options):
    theirs = momentumnet.transform_to_momentumnet(resnet(), ["layer1", "layer2"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mfx: .* changes|mfx: .*shape")
        ours = mfx.transform_to_momentumnet(resnet(), **({"gamma": 0.5} | options))
    with pytest.warns(UserWarning, match=r"computes another function .* \['layer1', 'layer2'\], keep_first_layer=True"):
        ours.load_state_dict(theirs.state_dict())


def test_layers_that_are_not_there():
    theirs = momentumnet.transform_to_momentumnet(resnet(), ["layer1", "layer2"])
    with pytest.raises(mfx.MfxError, match=r"layer4 without its first module.* It has layer1 without its first module"):
        from_package_names(theirs.state_dict(), ["layer1", "layer4"])
    with pytest.raises(mfx.MfxError, match="It has none of its layers"):
        from_package_names(resnet().state_dict(), "layer1")


def test_keys_that_do_not_fit_stay_an_error():
    ours = mfx.transform_to_momentumnet(stages(), ["stage.0"])
    with pytest.raises(RuntimeError, match=r"Unexpected key.* \"stage\.5\.1\.0\.network\.0\.weight\""):
        ours.load_state_dict({**ours.state_dict(), "stage.5.1.0.network.0.weight": torch.zeros(1)})
