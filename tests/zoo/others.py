"""Models of libraries that have a few models each, at tiny sizes. A library that is not installed is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.zoo.entry import Call, Entry

BATCH = 2

# --- arguments of calls -----------------------------------------------------------------------------------------------


def tensor(*shape: int) -> Call:
    return (torch.randn(BATCH, *shape),), {}


def images(size: int = 32, channels: int = 3) -> Call:
    return tensor(channels, size, size)


def tokens(length: int = 12, most: int = 20) -> Call:
    return (torch.randint(4, most, (BATCH, length)),), {}


def timed(size: int = 16, channels: int = 3) -> Call:
    """Images with noise, and how much."""
    return (torch.randn(BATCH, channels, size, size), torch.tensor([3, 7])), {}


def latents() -> Call:
    return (torch.randn(BATCH, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2])), {}


def prompted() -> Call:
    texts = {"encoder_hidden_states": torch.randn(BATCH, 5, 32), "pooled_projections": torch.randn(BATCH, 16)}
    return (torch.randn(BATCH, 4, 8, 8),), {**texts, "timestep": torch.tensor([3, 7])}


def placed() -> Call:
    """Patches and a text with their places."""
    texts = {"encoder_hidden_states": torch.randn(BATCH, 5, 32), "pooled_projections": torch.randn(BATCH, 16)}
    places = {"img_ids": torch.randn(16, 3).round(), "txt_ids": torch.zeros(5, 3)}
    return (torch.randn(BATCH, 16, 4),), {**texts, **places, "timestep": torch.tensor([0.3, 0.7])}


def captioned() -> Call:
    return (torch.randn(BATCH, 3, 32, 32), torch.randint(1, 60, (BATCH, 16))), {}


def graph(width: int = 16) -> Call:
    return (torch.randn(10, width), torch.randint(10, (2, 30))), {}


def frames(length: int = 20, width: int = 32) -> Call:
    return (torch.randn(BATCH, length, width), torch.full((BATCH,), length)), {}


def translated(*, source: int, target: int) -> Call:
    return (torch.randint(1, source, (BATCH, 12)), torch.randint(1, target, (BATCH, 9))), {}


def spoken() -> Call:
    return (torch.randn(BATCH, 20, 16), torch.randint(1, 20, (BATCH, 7))), {}


def table() -> Call:
    return (torch.randn(BATCH, 4), torch.randint(3, (BATCH, 2))), {}


def pointed() -> Call:
    """Return an image's features, their places, and what a user points at."""
    return (torch.randn(BATCH, 32, 4, 4), torch.randn(BATCH, 32, 4, 4), torch.randn(BATCH, 5, 32)), {}


# --- models -----------------------------------------------------------------------------------------------------------


def of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def made(path: str, *args: Any, **options: Any) -> nn.Module:
    model: nn.Module = of(path)(*args, **options)
    return model


def layers(path: str, **options: Any) -> nn.Module:
    """Layers of x_transformers, which a wrapper is given."""
    return made(f"x_transformers.{path}", dim=32, heads=2, attn_dim_head=16, **options)


def wrapped(path: str, inner: str, of_inner: Mapping[str, Any], **options: Any) -> nn.Module:
    return made(f"x_transformers.{path}", attn_layers=layers(inner, **of_inner), **options)


def graph_layers(make: Callable[[], nn.Module]) -> nn.Module:
    nn_ = import_module("torch_geometric.nn")
    model: nn.Module = nn_.Sequential("x, edge_index", [(make(), "x, edge_index -> x") for _ in range(4)])
    return model


def deep_gcn_layer() -> nn.Module:
    conv = made("torch_geometric.nn.GENConv", 16, 16)
    return made("torch_geometric.nn.DeepGCNLayer", conv, nn.LayerNorm(16), nn.ReLU(), block="res+", dropout=0.1)


def gps_layer() -> nn.Module:
    return made("torch_geometric.nn.GPSConv", 16, made("torch_geometric.nn.GCNConv", 16, 16), heads=2)


def msa_transformer() -> nn.Module:
    options = {"embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 4, "layers": 3, "embed_positions_msa": False}
    limits = {"max_tokens": 2**14, "max_positions": 64, "max_tokens_per_msa": 2**14, "logit_bias": False}
    dropouts = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    alphabet = of("esm.data.Alphabet").from_architecture("msa_transformer")
    return made("esm.model.msa_transformer.MSATransformer", SimpleNamespace(**options, **limits, **dropouts), alphabet)


CONV = {"conv_op": nn.Conv2d, "norm_op": nn.InstanceNorm2d, "nonlin": nn.LeakyReLU, "conv_bias": True}
UNET = {"block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 4}
KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
ATTENDED = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENT = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3}
PROJECTED = {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 16, "out_channels": 4}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 3},
}
SWINIR = {"img_size": 16, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "upscale": 2}
ARCH = "spandrel.architectures"
VOLUME = {"in_channels": 1, "img_size": (16, 16, 16), "hidden_size": 32, "mlp_dim": 64, "num_heads": 4}
TABLE = {"n_blocks": 3, "d_block": 32, "attention_n_heads": 4, "attention_dropout": 0.1, "residual_dropout": 0.0}
TABLE_FFN = {"ffn_d_hidden": None, "ffn_d_hidden_multiplier": 2.0, "ffn_dropout": 0.1}
LAYERS = {"depth": 3}

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Call]]] = {
    "conformer.Conformer": (
        partial(made, "conformer.Conformer", dim=32, depth=3, dim_head=16, heads=2),
        partial(tensor, 12, 32),
    ),
    "demucs.HTDemucs": (
        partial(
            made, "demucs.htdemucs.HTDemucs", ["a", "b"], audio_channels=1, channels=8, nfft=256, depth=3, t_layers=3
        ),
        partial(tensor, 1, 2048),
    ),
    "denoising_diffusion_pytorch.Unet": (
        partial(made, "denoising_diffusion_pytorch.Unet", dim=8, dim_mults=(1, 2), attn_dim_head=8),
        timed,
    ),
    "diffusers.UNet2DModel": (partial(made, "diffusers.UNet2DModel", sample_size=16, **UNET, **ATTENDED), timed),
    "diffusers.AutoencoderKL": (partial(made, "diffusers.AutoencoderKL", **UNET, **KL), images),
    "diffusers.DiTTransformer2DModel": (
        partial(made, "diffusers.DiTTransformer2DModel", **LATENT, **HEADS, num_embeds_ada_norm=10, norm_num_groups=4),
        latents,
    ),
    "diffusers.SD3Transformer2DModel": (
        partial(made, "diffusers.SD3Transformer2DModel", **LATENT, **HEADS, **PROJECTED),
        prompted,
    ),
    "diffusers.FluxTransformer2DModel": (partial(made, "diffusers.FluxTransformer2DModel", **FLUX, **HEADS), placed),
    "dynamic_network_architectures.ResidualEncoderUNet": (
        partial(
            made,
            "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            1,
            3,
            [8, 16, 32],
            kernel_sizes=3,
            strides=[1, 2, 2],
            n_blocks_per_stage=[3, 3, 3],
            num_classes=2,
            n_conv_per_stage_decoder=[1, 1],
            **CONV,
        ),
        partial(images, channels=1),
    ),
    "efficientnet_pytorch.EfficientNet": (
        lambda: of("efficientnet_pytorch.EfficientNet").from_name("efficientnet-b0", num_classes=10),
        partial(images, 64),
    ),
    "encodec.SEANetEncoder": (
        partial(
            made,
            "encodec.modules.SEANetEncoder",
            n_filters=4,
            n_residual_layers=3,
            ratios=[4, 2],
            true_skip=True,
            dimension=16,
        ),
        partial(tensor, 1, 256),
    ),
    "esm.ESM2": (partial(made, "esm.model.esm2.ESM2", num_layers=3, embed_dim=32, attention_heads=4), tokens),
    "esm.MSATransformer": (msa_transformer, lambda: ((torch.randint(4, 20, (BATCH, 3, 8)),), {})),
    "kornia.VisionTransformer": (
        partial(
            made, "kornia.models.vit.VisionTransformer", image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2
        ),
        images,
    ),
    "kornia.MobileViT": (partial(made, "kornia.models.vit_mobile.MobileViT", mode="xxs"), partial(images, 256)),
    "monai.ViT": (
        partial(made, "monai.networks.nets.ViT", patch_size=(8, 8, 8), num_layers=3, **VOLUME),
        partial(tensor, 1, 16, 16, 16),
    ),
    "monai.UNETR": (
        partial(made, "monai.networks.nets.UNETR", out_channels=2, feature_size=4, **VOLUME),
        partial(tensor, 1, 16, 16, 16),
    ),
    "monai.SegResNet": (
        partial(made, "monai.networks.nets.SegResNet", spatial_dims=2, blocks_down=(2, 2, 3), blocks_up=(1, 1)),
        partial(images, channels=1),
    ),
    "monai.UNet": (
        partial(made, "monai.networks.nets.UNet", 2, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=3),
        partial(images, channels=1),
    ),
    "monai.SwinUNETR": (
        partial(made, "monai.networks.nets.SwinUNETR", in_channels=1, out_channels=2, feature_size=12, spatial_dims=2),
        partial(images, channels=1, size=64),
    ),
    "neuralop.FNO": (
        partial(made, "neuralop.models.FNO", n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8),
        partial(images, 16, channels=1),
    ),
    "open_clip.CLIP": (partial(made, "open_clip.model.CLIP", **CLIP), captioned),
    "rtdl_revisiting_models.FTTransformer": (
        partial(
            made,
            "rtdl_revisiting_models.FTTransformer",
            n_cont_features=4,
            cat_cardinalities=[3, 3],
            d_out=1,
            **TABLE,
            **TABLE_FFN,
        ),
        table,
    ),
    "rtdl_revisiting_models.ResNet": (
        partial(
            made,
            "rtdl_revisiting_models.ResNet",
            d_in=8,
            d_out=1,
            n_blocks=4,
            d_block=16,
            d_hidden=None,
            d_hidden_multiplier=2.0,
            dropout1=0.1,
            dropout2=0.1,
        ),
        partial(tensor, 8),
    ),
    "segment_anything.ImageEncoderViT": (
        partial(
            made,
            "segment_anything.modeling.ImageEncoderViT",
            img_size=64,
            patch_size=8,
            embed_dim=32,
            depth=4,
            num_heads=2,
            out_chans=16,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1, 3),
        ),
        partial(images, 64),
    ),
    "segment_anything.TwoWayTransformer": (
        partial(
            made, "segment_anything.modeling.TwoWayTransformer", depth=3, embedding_dim=32, num_heads=2, mlp_dim=64
        ),
        pointed,
    ),
    "segmentation_models_pytorch.Unet": (
        partial(made, "segmentation_models_pytorch.Unet", "resnet18", encoder_weights=None),
        partial(images, 64),
    ),
    "segmentation_models_pytorch.Segformer": (
        partial(made, "segmentation_models_pytorch.Segformer", "mit_b0", encoder_weights=None),
        partial(images, 64),
    ),
    "spandrel.SwinIR": (partial(made, f"{ARCH}.SwinIR.__arch.SwinIR.SwinIR", **SWINIR), partial(images, 16)),
    "spandrel.RRDBNet": (
        partial(made, f"{ARCH}.ESRGAN.__arch.RRDB.RRDBNet", num_filters=8, num_blocks=3, scale=2),
        partial(images, 16),
    ),
    "spandrel.HAT": (
        partial(made, f"{ARCH}.HAT.__arch.HAT.HAT", **SWINIR, squeeze_factor=4, upsampler="pixelshuffle"),
        partial(images, 16),
    ),
    "spandrel.NAFNet": (
        partial(
            made,
            f"{ARCH}.NAFNet.__arch.NAFNet_arch.NAFNet",
            width=8,
            middle_blk_num=2,
            enc_blk_nums=[2, 2],
            dec_blk_nums=[2, 2],
        ),
        images,
    ),
    "speechbrain.TransformerASR": (
        partial(
            made,
            "speechbrain.lobes.models.transformer.TransformerASR.TransformerASR",
            20,
            16,
            d_model=32,
            nhead=2,
            num_encoder_layers=3,
            num_decoder_layers=3,
            d_ffn=64,
        ),
        spoken,
    ),
    "speechbrain.ECAPA_TDNN": (
        partial(
            made,
            "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN",
            20,
            channels=[16, 16, 16, 16, 48],
            attention_channels=8,
            res2net_scale=4,
            se_channels=8,
            lin_neurons=8,
        ),
        partial(tensor, 16, 20),
    ),
    "torch_geometric.DeepGCNLayer": (partial(graph_layers, deep_gcn_layer), graph),
    "torch_geometric.GPSConv": (partial(graph_layers, gps_layer), graph),
    "torchaudio.Conformer": (partial(made, "torchaudio.models.Conformer", 32, 2, 64, 3, 7), frames),
    "torchaudio.ConvTasNet": (
        partial(
            made,
            "torchaudio.models.ConvTasNet",
            enc_kernel_size=8,
            enc_num_feats=16,
            msk_num_feats=8,
            msk_num_hidden_feats=16,
            msk_num_layers=3,
            msk_num_stacks=2,
        ),
        partial(tensor, 1, 256),
    ),
    "vocos.VocosBackbone": (
        partial(made, "vocos.models.VocosBackbone", 16, 32, 64, 4),
        partial(tensor, 16, 20),
    ),
    "x_transformers.TransformerWrapper": (
        partial(wrapped, "TransformerWrapper", "Decoder", LAYERS, num_tokens=20, max_seq_len=16),
        tokens,
    ),
    "x_transformers.ViTransformerWrapper": (
        partial(wrapped, "ViTransformerWrapper", "Encoder", LAYERS, image_size=32, patch_size=8, num_classes=10),
        images,
    ),
    "x_transformers.XTransformer": (
        partial(
            made,
            "x_transformers.XTransformer",
            dim=32,
            enc_num_tokens=20,
            enc_depth=3,
            enc_heads=2,
            enc_max_seq_len=16,
            dec_num_tokens=20,
            dec_depth=3,
            dec_heads=2,
            dec_max_seq_len=16,
        ),
        partial(translated, source=20, target=20),
    ),
}
"""How a model is made, and what it is called with; its name begins with the package that it is of."""

ENTRIES = [Entry("others", name, *both, note="tiny", package=name.partition(".")[0]) for name, both in MODELS.items()]
