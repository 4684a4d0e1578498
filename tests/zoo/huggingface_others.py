"""Models of Hugging Face's transformers that hear, that combine what they see and read, and that forecast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.models.huggingface import (
    BASE,
    CODER,
    DEPTH,
    GROUPED,
    HEADS,
    PATCHES,
    SPECIAL,
    VOCABULARY,
    WIDTH,
    Family,
    Inputs,
    image,
    tokens,
)

IMAGE_TOKEN = VOCABULARY - 1


def model(name: str, prefix: str, options: Mapping[str, Any], reads: Any, head: str = "Model", **more: Any) -> Family:
    return Family(name, f"{prefix}{head}", f"{prefix}Config", options, reads, **more)


# --- speech -----------------------------------------------------------------------------------------------------------


def sound(batch: int, length: int) -> Inputs:
    return {"input_values": torch.randn(batch, 1600)}


def spectrogram(batch: int, length: int) -> Inputs:
    return {"input_values": torch.randn(batch, 24, 16)}


def features(batch: int, length: int) -> Inputs:
    return {"input_features": torch.randn(batch, 40, 16)}


def transcribed(batch: int, length: int) -> Inputs:
    return {"input_features": torch.randn(batch, 40, 8), "labels": tokens(batch, length // 2 + 1)}


def transcribed_sound(batch: int, length: int) -> Inputs:
    return {**sound(batch, length), "labels": tokens(batch, length // 2 + 1)}


CONVOLUTIONS = {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 4, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
# Its masks go by random numbers of numpy's.
SPEECH = {**BASE, **CONVOLUTIONS, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
TRANSCRIBES = {
    **CODER,
    "input_feat_per_channel": 8,
    "input_channels": 1,
    "conv_channels": 16,
    "decoder_start_token_id": 2,
}
MOONSHINE = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "encoder_num_hidden_layers": DEPTH,
    "decoder_num_hidden_layers": DEPTH,
    "encoder_num_attention_heads": HEADS,
    "decoder_num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}
SPEAKS = [
    model("wav2vec2", "Wav2Vec2", SPEECH, sound),
    model("hubert", "Hubert", SPEECH, sound),
    model("wavlm", "WavLM", SPEECH, sound),
    model("unispeech", "UniSpeech", SPEECH, sound),
    model("unispeech-sat", "UniSpeechSat", SPEECH, sound),
    model("sew", "SEW", SPEECH, sound),
    model("sew-d", "SEWD", SPEECH, sound),
    model("data2vec-audio", "Data2VecAudio", SPEECH, sound),
    model("wav2vec2-conformer", "Wav2Vec2Conformer", SPEECH, sound),
    model("wav2vec2-bert", "Wav2Vec2Bert", {**SPEECH, "feature_projection_input_dim": 16}, features),
    model("audio-spectrogram-transformer", "AST", {**BASE, "patch_size": 8, "max_length": 24, "num_mel_bins": 16,
          "frequency_stride": 8, "time_stride": 8}, spectrogram),
    model("speech_to_text", "Speech2Text", TRANSCRIBES, transcribed, "ForConditionalGeneration"),
    model("moonshine", "Moonshine", MOONSHINE, transcribed_sound, "ForConditionalGeneration"),
]  # fmt: skip

# --- images and text --------------------------------------------------------------------------------------------------


def captioned(batch: int, length: int) -> Inputs:
    ids = tokens(batch, length)
    ids[:, -1] = SPECIAL["eos_token_id"]
    return {"input_ids": ids, **image(batch, length), "attention_mask": torch.ones_like(ids)}


def contrasted(batch: int, length: int) -> Inputs:
    return {**captioned(batch, length), "return_loss": True}


def contrasted_without_mask(batch: int, length: int) -> Inputs:
    return {key: value for key, value in contrasted(batch, length).items() if key != "attention_mask"}


def described(batch: int, length: int) -> Inputs:
    inputs = captioned(batch, length)
    return {**inputs, "labels": inputs["input_ids"].clone()}


def with_image_tokens(batch: int, length: int) -> Inputs:
    """One token for each of the image's 16 patches, then text."""
    ids = torch.cat([torch.full((batch, 16), IMAGE_TOKEN), torch.clamp(tokens(batch, length), max=IMAGE_TOKEN - 1)], 1)
    return {"input_ids": ids, **image(batch, length), "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def typed(batch: int, length: int) -> Inputs:
    inputs = with_image_tokens(batch, length)
    return {**inputs, "token_type_ids": torch.cat([torch.zeros(batch, 16), torch.ones(batch, length)], 1).long()}


VISION = {**BASE, **PATCHES, "projection_dim": WIDTH}
TEXT = {**BASE, "projection_dim": WIDTH}
PAIR = {"text_config": TEXT, "vision_config": VISION, "projection_dim": WIDTH}
BLIP_TEXT = {**TEXT, "encoder_hidden_size": WIDTH}
QFORMER = {**BASE, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 1}
CLIP_VISION = {**VISION, "model_type": "clip_vision_model"}
LLAMA = {**GROUPED, "model_type": "llama"}
LLAVA = {
    "vision_config": {**CLIP_VISION, "num_hidden_layers": 3},
    "text_config": LLAMA,
    "image_token_index": IMAGE_TOKEN,
}
GEMMA = {**GROUPED, "model_type": "gemma"}
PALI = {
    "vision_config": {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
    "text_config": GEMMA,
    "image_token_index": IMAGE_TOKEN,
    "projection_dim": WIDTH,
}
VILT = {**VISION, "max_image_length": -1}
SEES_AND_READS = [
    model("clip-pair", "CLIP", PAIR, contrasted),
    model("chinese_clip", "ChineseCLIP", PAIR, contrasted),
    model("siglip", "Siglip", {"text_config": BASE, "vision_config": {**BASE, **PATCHES}}, contrasted_without_mask),
    model("clipseg", "CLIPSeg", PAIR, contrasted),
    model("owlvit", "OwlViT", PAIR, contrasted),
    model("blip", "Blip", {**PAIR, "text_config": BLIP_TEXT}, described, "ForConditionalGeneration"),
    model("git", "Git", {**BASE, "vision_config": VISION}, described, "ForCausalLM"),
    model("llava", "Llava", LLAVA, with_image_tokens, "ForConditionalGeneration"),
    model("paligemma", "PaliGemma", PALI, typed, "ForConditionalGeneration"),
    model("vilt", "Vilt", VILT, captioned),
    model("flava-image", "FlavaImage", VISION, image),
]

# --- time series ------------------------------------------------------------------------------------------------------


def series(batch: int, length: int) -> Inputs:
    past, future = torch.randn(batch, 24), torch.randn(batch, 4)
    return {
        "past_values": past,
        "past_time_features": torch.randn(batch, 24, 1),
        "past_observed_mask": torch.ones_like(past),
        "future_values": future,
        "future_time_features": torch.randn(batch, 4, 1),
    }


def channels(batch: int, length: int) -> Inputs:
    return {"past_values": torch.randn(batch, 32, 2), "future_values": torch.randn(batch, 4, 2)}


def decided(batch: int, length: int) -> Inputs:
    return {
        "states": torch.randn(batch, length, 5),
        "actions": torch.randn(batch, length, 3),
        "rewards": torch.randn(batch, length, 1),
        "returns_to_go": torch.randn(batch, length, 1),
        "timesteps": torch.arange(length).repeat(batch, 1),
        "attention_mask": torch.ones(batch, length),
    }


SERIES = {
    "prediction_length": 4,
    "context_length": 17,
    "num_time_features": 1,
    "d_model": WIDTH,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
PATCHED = {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "prediction_length": 4}
TST = {**PATCHED, "d_model": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "ffn_dim": 2 * WIDTH}
DECISION = {"state_dim": 5, "act_dim": 3, "hidden_size": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "max_ep_len": 32}
FORECASTS = [
    model("time_series_transformer", "TimeSeriesTransformer", SERIES, series, "ForPrediction"),
    model("informer", "Informer", SERIES, series, "ForPrediction"),
    model("autoformer", "Autoformer", {**SERIES, "label_length": 4, "moving_average": 5}, series, "ForPrediction"),
    model("patchtst", "PatchTST", TST, channels, "ForPrediction"),
    model("patchtsmixer", "PatchTSMixer", {**PATCHED, "d_model": WIDTH}, channels, "ForPrediction"),
    model("decision_transformer", "DecisionTransformer", DECISION, decided),
]

FAMILIES = [*SPEAKS, *SEES_AND_READS, *FORECASTS]
