"""The code that the momentumnet package's own pages show, after a change of the import, in float64 against the package.

States have 40 fraction bits: a floor a step is below n·2⁻⁴⁰·T^1.5 after T steps at γ = n/d = 9/10. CONDITION is how
much an error grows on its way to the output; networks without training, as these are, do not shrink it.
"""

import momentumnet
import pytest
import torch
from torch import nn
from torchvision.models import resnet101
from vit_pytorch import ViT

from mfx import MomentumNet, transform_to_momentumnet

CONDITION = 1000


def assert_close(actual, expected, steps):
    assert (actual - expected).norm() <= CONDITION * 9 * 2**-40 * steps**1.5 * expected.norm()


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_ten_functions():
    hidden, d = 8, 500
    function = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, d))
    mresnet = MomentumNet([function] * 10, gamma=0.9)
    x = torch.randn(4, d)
    assert_close(mresnet(x), momentumnet.MomentumNet([function] * 10, gamma=0.9)(x), 10)


@pytest.mark.zoo
def test_resnet101():
    resnet, x = resnet101().eval(), torch.randn(1, 3, 64, 64)
    mresnet101 = transform_to_momentumnet(resnet, gamma=0.9, use_backprop=False)
    expected = momentumnet.transform_to_momentumnet(resnet, gamma=0.9, use_backprop=True)(x)
    assert_close(mresnet101(x), expected, 22)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # from the constructor: batch_first is not set
def test_transformer():
    transformer = nn.Transformer(num_encoder_layers=6, num_decoder_layers=6).eval()
    layers = ["encoder.layers", "decoder.layers"]
    mtransformer = transform_to_momentumnet(
        transformer, sub_layers=layers, gamma=0.9, use_backprop=False, keep_first_layer=False
    )
    encoder, decoder = transformer.encoder, transformer.decoder
    mencoder, mdecoder = (momentumnet.MomentumNet(part.layers, 0.9, is_residual=False) for part in (encoder, decoder))
    src, tgt = torch.randn(5, 2, 512), torch.randn(4, 2, 512)
    expected = decoder.norm(mdecoder(tgt, encoder.norm(mencoder(src))))
    assert_close(mtransformer(src, tgt), expected, 6)


def test_vit_pytorch():
    v = ViT(image_size=16, patch_size=8, num_classes=10, dim=32, depth=3, heads=2, mlp_dim=64).eval()
    v.transformer = nn.Sequential(*(layer for pair in v.transformer.layers for layer in pair))
    options = {"gamma": 0.9, "keep_first_layer": False, "is_residual": True}
    mv = transform_to_momentumnet(v, ["transformer"], use_backprop=False, **options)
    images = torch.randn(2, 3, 16, 16)
    expected = momentumnet.transform_to_momentumnet(v, ["transformer"], use_backprop=True, **options)(images)
    assert_close(mv(images), expected, 6)
