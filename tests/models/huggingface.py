"""Tiny models of Hugging Face's transformers in their default settings, and the chains that their architecture has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import transformers
from torch import nn

VOCABULARY, WIDTH, DEPTH, HEADS = 99, 32, 2, 4
PAD, START, END = 0, 1, 2

Inputs: TypeAlias = dict[str, Any]


def tokens(batch: int, length: int, **options: Any) -> torch.Tensor:
    """Ordinary tokens, none of the special ones."""
    return torch.randint(END + 1, VOCABULARY, (batch, length), **options)


def causal(batch: int, length: int) -> Inputs:
    ids = tokens(batch, length)
    return {"input_ids": ids, "labels": ids.clone()}


def masked(batch: int, length: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -(length // 3) :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def translation(batch: int, length: int) -> Inputs:
    return {"input_ids": tokens(batch, length), "labels": tokens(batch, length // 2 + 1)}


def image(batch: int, length: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def speech(batch: int, length: int) -> Inputs:
    return {"input_features": torch.randn(batch, 8, 40), "labels": tokens(batch, length // 2 + 1)}


@dataclass(frozen=True)
class Family:
    """A model to judge.

    Args:
        name: in the test's id.
        model: name of its class.
        config: name of its configuration's class.
        options: of the configuration.
        make_inputs: makes the arguments of a call for a batch size and a length; the length of images is fixed.
        chains: how many steps each chain has, by name; None where that is not written down.
        length: of the inputs, where nothing else is asked for.
        compiles_alike: whether the model computes the same while it is captured. Where transformers asks
            `torch.compiler.is_compiling()` and then computes the same function in another way, only rounding differs.
        dtype: of its parameters.
        unrolls: whether it loops over the tokens in Python, so that each length needs a graph.
        hooks_itself: whether transformers puts hooks on it that cannot be pickled.
    """

    name: str
    model: str
    config: str
    options: Mapping[str, Any]
    make_inputs: Callable[[int, int], Inputs]
    chains: Mapping[str, int] | None = None
    length: int = 10
    compiles_alike: bool = True
    dtype: torch.dtype = torch.float32
    unrolls: bool = False
    hooks_itself: bool = False

    def build(self, **options: Any) -> nn.Module:
        """The model with random weights."""
        config = getattr(transformers, self.config)(**{**self.options, **options})
        model: nn.Module = getattr(transformers, self.model)(config)
        return model.to(self.dtype)

    def make(self, **options: Any) -> nn.Module:
        """The same model every time; everything that begins at 0 or 1 is moved away from there."""
        torch.manual_seed(0)
        model = self.build(**options)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        return model.train()

    def draw(self, batch: int = 2, length: int | None = None) -> Inputs:
        """Arguments of a call."""
        made = self.make_inputs(batch, length or self.length)
        return {name: self._cast(x) for name, x in made.items()}

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def inputs(self, batch: int = 2, length: int = 10) -> Inputs:
        """The same arguments for the same sizes every time."""
        torch.manual_seed(batch * 1000 + length)
        return self.draw(batch, length)

    @property
    def reads(self) -> str:
        """Name of the main input."""
        return next(iter(self.inputs()))

    @property
    def is_text(self) -> bool:
        return self.reads == "input_ids"

    @property
    def is_coder(self) -> bool:
        return self.model.endswith("ConditionalGeneration")

    @property
    def has_cache(self) -> bool:
        return self.generates and self.name != "mamba"

    @property
    def generates(self) -> bool:
        return self.model.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))


SPECIAL = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
BASE = {
    **SPECIAL,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": WIDTH // HEADS}
SHORT = {"n_layer": DEPTH, "n_head": HEADS, "vocab_size": VOCABULARY, "bos_token_id": START, "eos_token_id": END}
GPT = {**SHORT, "n_embd": WIDTH, "n_positions": 64}
CODER = {
    **SPECIAL,
    "d_model": WIDTH,
    "encoder_layers": DEPTH,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "vocab_size": VOCABULARY,
}
BART = {**CODER, "max_position_embeddings": 64, "decoder_start_token_id": END, "forced_eos_token_id": END}
WHISPER = {
    **CODER,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 40,
    "decoder_start_token_id": START,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
T5 = {
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": 2 * WIDTH,
    "num_layers": DEPTH,
    "num_heads": HEADS,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": PAD,
}
DISTIL = {
    "dim": WIDTH,
    "n_layers": DEPTH,
    "n_heads": HEADS,
    "hidden_dim": 2 * WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
PATCHES = {"image_size": 32, "patch_size": 8}
DINO = {**PATCHES, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
CONVNEXT = {"hidden_sizes": [16, 32], "depths": [2, 3], "num_stages": 2, "image_size": 32}
OPT = {**BASE, "ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH}
BLOOM = {**SHORT, "hidden_size": WIDTH, "pad_token_id": PAD}
MAMBA = {
    **SPECIAL,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "vocab_size": VOCABULARY,
    "state_size": 4,
}
DEBERTA = {**BASE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
MIXTRAL = {**GROUPED, "num_local_experts": 4, "output_router_logits": True}
QWEN_MOE = {
    **GROUPED,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
}

# Sums in a layer: attention and MLP; or both at once; in a decoder with cross attention, one more.
LAYER, PARALLEL, CROSS = 2 * DEPTH, DEPTH, 3 * DEPTH


def language_model(
    name: str, prefix: str, options: Mapping[str, Any], chains: Mapping[str, int], **more: Any
) -> Family:
    return Family(name, f"{prefix}ForCausalLM", f"{prefix}Config", options, causal, chains, **more)


def backbone(name: str, prefix: str, options: Mapping[str, Any], chains: Mapping[str, int], reads: Any) -> Family:
    return Family(name, f"{prefix}Model", f"{prefix}Config", options, reads, chains)


def coder(name: str, prefix: str, options: Mapping[str, Any], chains: Mapping[str, int], reads: Any) -> Family:
    return Family(name, f"{prefix}ForConditionalGeneration", f"{prefix}Config", options, reads, chains)


decoder = partial(language_model, chains={"model.layers": LAYER})

FAMILIES = [
    Family("bert", "BertForMaskedLM", "BertConfig", BASE, causal, {"bert.encoder.layer": LAYER}),
    backbone("roberta", "Roberta", BASE, {"encoder.layer": LAYER}, masked),
    Family("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT, causal, {"transformer.h": LAYER}),
    language_model("gpt_neox", "GPTNeoX", BASE, {"gpt_neox.layers": PARALLEL}),
    language_model("gptj", "GPTJ", {**GPT, "rotary_dim": 4}, {"transformer.h": PARALLEL}),
    decoder("llama", "Llama", GROUPED),
    decoder("mistral", "Mistral", GROUPED),
    decoder("qwen2", "Qwen2", GROUPED),
    decoder("qwen3", "Qwen3", GROUPED),
    decoder("gemma", "Gemma", GROUPED),
    decoder("gemma2", "Gemma2", GROUPED),
    language_model("cohere", "Cohere", GROUPED, {"model.layers": PARALLEL}),
    language_model("opt", "OPT", OPT, {"model.decoder.layers": LAYER}),
    language_model("bloom", "Bloom", BLOOM, {"transformer.h": LAYER}),
    coder("t5", "T5", T5, {"encoder.block": LAYER, "decoder.block": CROSS}, translation),
    coder("bart", "Bart", BART, {"model.encoder.layers": LAYER, "model.decoder.layers": CROSS}, translation),
    backbone("distilbert", "DistilBert", DISTIL, {"transformer.layer": LAYER}, masked),
    backbone(
        "albert",
        "Albert",
        {**BASE, "embedding_size": 16},
        {"encoder.albert_layer_groups.0.albert_layers.0": LAYER},
        masked,
    ),
    backbone("deberta", "DebertaV2", DEBERTA, {"encoder.layer": LAYER}, masked),
    Family("vit", "ViTForImageClassification", "ViTConfig", {**BASE, **PATCHES}, image, {"vit.layers": LAYER}),
    backbone("dinov2", "Dinov2", DINO, {"encoder.layer": LAYER}, image),
    backbone("swin", "Swin", SWIN, {"encoder.layers.0.blocks": 4, "encoder.layers": 4}, image),
    backbone(
        "convnextv2", "ConvNextV2", CONVNEXT, {f"encoder.stages.{i}.layers": n for i, n in enumerate([2, 3])}, image
    ),
    backbone("clip", "CLIPVision", {**BASE, **PATCHES}, {"encoder.layers": LAYER}, image),
    coder("whisper", "Whisper", WHISPER, {"model.encoder.layers": LAYER, "model.decoder.layers": CROSS}, speech),
    Family(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**BASE, "cls_token_id": START, "sep_token_id": END},
        causal,
        {"model.layers": LAYER},
    ),
    language_model(
        "mamba",
        "Mamba",
        MAMBA,
        {"backbone.layers": DEPTH},
        compiles_alike=False,
        dtype=torch.float64,
        unrolls=True,
    ),
    # torch's grouped matrix product, which these use, knows no float64
    decoder("mixtral", "Mixtral", MIXTRAL, compiles_alike=False, hooks_itself=True),
    decoder("qwen3_moe", "Qwen3Moe", QWEN_MOE, compiles_alike=False, hooks_itself=True),
]
