"""Language models of Hugging Face's transformers: encoders, decoders, and both."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from tests.models.huggingface import (
    BART,
    BASE,
    CODER,
    DEBERTA,
    DEPTH,
    GPT,
    GROUPED,
    HEADS,
    MAMBA,
    QWEN_MOE,
    SPECIAL,
    T5,
    VOCABULARY,
    WIDTH,
    Family,
    causal,
    translation,
)

LONG = 32  # tokens, where the model looks at blocks of them


def model(
    name: str, prefix: str, options: Mapping[str, Any], head: str, *, config: str = "", reads: Any = causal, **more: Any
) -> Family:
    return Family(name, f"{prefix}{head}", config or f"{prefix}Config", options, reads, **more)


encoder = partial(model, head="ForMaskedLM")
decoder = partial(model, head="ForCausalLM")
coder = partial(model, head="ForConditionalGeneration", reads=translation)

FUNNEL = {
    "vocab_size": VOCABULARY,
    "block_sizes": [2, 2],
    "num_decoder_layers": 2,
    "d_model": WIDTH,
    "n_head": HEADS,
    "d_head": WIDTH // HEADS,
    "d_inner": 2 * WIDTH,
}
MOBILE = {**BASE, "embedding_size": 16, "intra_bottleneck_size": 16}
SQUEEZED = {**BASE, "embedding_size": WIDTH}
XLM = {
    "vocab_size": VOCABULARY,
    "emb_dim": WIDTH,
    "n_layers": DEPTH,
    "n_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
XLNET = {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "d_inner": 2 * WIDTH}
ENCODERS = [
    encoder("electra", "Electra", {**BASE, "embedding_size": 16}),
    encoder("mpnet", "MPNet", BASE),
    encoder("deberta-v1", "Deberta", DEBERTA),
    encoder("xlm-roberta", "XLMRoberta", BASE),
    encoder("camembert", "Camembert", BASE),
    encoder("data2vec-text", "Data2VecText", BASE),
    encoder("megatron-bert", "MegatronBert", BASE),
    encoder("ernie", "Ernie", BASE),
    encoder("rembert", "RemBert", {**BASE, "input_embedding_size": 16, "output_embedding_size": 16}),
    encoder("ibert", "IBert", BASE),
    encoder("xmod", "Xmod", {**BASE, "default_language": "en_XX"}),
    encoder("esm", "Esm", {**BASE, "mask_token_id": 4}),
    encoder("funnel", "Funnel", FUNNEL),
    encoder("longformer", "Longformer", {**BASE, "attention_window": 4}),
    encoder("big_bird", "BigBird", {**BASE, "block_size": 4, "num_random_blocks": 1}, length=LONG),
    encoder("nystromformer", "Nystromformer", {**BASE, "segment_means_seq_len": LONG, "num_landmarks": 4}, length=LONG),
    encoder("mra", "Mra", BASE, length=LONG),
    encoder("yoso", "Yoso", BASE),
    encoder("fnet", "FNet", BASE),
    encoder("squeezebert", "SqueezeBert", SQUEEZED),
    encoder("mobilebert", "MobileBert", MOBILE),
    encoder("convbert", "ConvBert", {**BASE, "embedding_size": WIDTH}),
    encoder("roformer", "RoFormer", BASE),
    encoder("eurobert", "EuroBert", {**GROUPED, "mask_token_id": 4}),
    model("xlm", "XLM", XLM, "WithLMHeadModel"),
    model("flaubert", "Flaubert", XLM, "WithLMHeadModel"),
    model("xlnet", "XLNet", XLNET, "LMHeadModel"),
]

MPT = {"d_model": WIDTH, "n_heads": HEADS, "n_layers": DEPTH, "vocab_size": VOCABULARY, "max_seq_len": 64}
XGLM = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "ffn_dim": 2 * WIDTH,
    "num_layers": DEPTH,
    "attention_heads": HEADS,
    "max_position_embeddings": 64,
}
NEO = {
    **SPECIAL,
    "hidden_size": WIDTH,
    "num_layers": DEPTH,
    "num_heads": HEADS,
    "attention_types": [[["global", "local"], 1]],
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
CTRL = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "dff": 2 * WIDTH}
MOE = {**GROUPED, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
DEEPSEEK = {
    **BASE,
    "num_key_value_heads": HEADS,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DECODERS = [
    model("openai-gpt", "OpenAIGPT", GPT, "LMHeadModel"),
    model("ctrl", "CTRL", CTRL, "LMHeadModel"),
    decoder("gpt_neo", "GPTNeo", NEO),
    decoder("gpt_bigcode", "GPTBigCode", GPT),
    decoder("codegen", "CodeGen", {**GPT, "rotary_dim": 4}),
    decoder("falcon", "Falcon", BASE),
    decoder("mpt", "Mpt", MPT),
    decoder("xglm", "XGLM", XGLM),
    decoder("biogpt", "BioGpt", BASE),
    decoder("phi", "Phi", BASE),
    decoder("phi3", "Phi3", GROUPED),
    decoder("stablelm", "StableLm", GROUPED),
    decoder("starcoder2", "Starcoder2", GROUPED),
    decoder("persimmon", "Persimmon", BASE),
    decoder("nemotron", "Nemotron", GROUPED),
    decoder("gemma3", "Gemma3", GROUPED, config="Gemma3TextConfig"),
    decoder("cohere2", "Cohere2", GROUPED),
    decoder("olmo", "Olmo", GROUPED),
    decoder("olmo2", "Olmo2", GROUPED),
    decoder("granite", "Granite", GROUPED),
    decoder("glm", "Glm", GROUPED),
    decoder("glm4", "Glm4", GROUPED),
    decoder("helium", "Helium", GROUPED),
    decoder("smollm3", "SmolLM3", GROUPED),
    decoder("exaone4", "Exaone4", GROUPED),
    decoder("seed_oss", "SeedOss", GROUPED),
    decoder("hunyuan", "HunYuanDenseV1", GROUPED),
    decoder("qwen2_moe", "Qwen2Moe", {**QWEN_MOE, "shared_expert_intermediate_size": 16}, compiles_alike=False),
    decoder("olmoe", "Olmoe", MOE, compiles_alike=False),
    decoder("granitemoe", "GraniteMoe", MOE, compiles_alike=False),
    decoder("gpt_oss", "GptOss", MOE, compiles_alike=False),
    decoder("deepseek_v3", "DeepseekV3", DEEPSEEK, compiles_alike=False),
]

JAMBA = {**GROUPED, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
MAMBA2 = {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
ZAMBA = {
    **BASE,
    "num_hidden_layers": 6,
    "num_key_value_heads": HEADS,
    "attention_head_dim": 16,
    "n_mamba_heads": 2,
    "mamba_d_state": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
RECURRENT = {**GROUPED, "num_hidden_layers": 3, "lru_width": WIDTH, "attention_window_size": 16}
RWKV = {**SPECIAL, "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "context_length": 64}
STATE_SPACES = [
    decoder("mamba2", "Mamba2", MAMBA2, compiles_alike=False),
    decoder("falcon_mamba", "FalconMamba", MAMBA, compiles_alike=False),
    decoder("jamba", "Jamba", JAMBA, compiles_alike=False),
    decoder("zamba", "Zamba", ZAMBA, compiles_alike=False),
    decoder("recurrent_gemma", "RecurrentGemma", RECURRENT),
    decoder("rwkv", "Rwkv", RWKV),
    decoder("lfm2", "Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
]

MT5 = {**T5, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
LONGT5 = {**T5, "local_radius": 4}
SWITCH = {
    **T5,
    "num_decoder_layers": DEPTH,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 2,
    "expert_capacity": 16,
}
LED = {
    **CODER,
    "attention_window": 4,
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
PROPHET = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "num_encoder_layers": DEPTH,
    "num_decoder_layers": DEPTH,
    "num_encoder_attention_heads": HEADS,
    "num_decoder_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 0,
}
NLLB = {**BART, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 16}
CODERS = [
    coder("mt5", "MT5", MT5),
    coder("umt5", "UMT5", MT5),
    coder("longt5", "LongT5", LONGT5),
    coder("switch_transformers", "SwitchTransformers", SWITCH, compiles_alike=False),
    coder("mbart", "MBart", BART),
    coder("pegasus", "Pegasus", BART),
    coder("plbart", "PLBart", BART),
    coder("m2m_100", "M2M100", BART),
    coder("blenderbot", "Blenderbot", BART),
    coder("blenderbot-small", "BlenderbotSmall", BART),
    coder("led", "LED", LED),
    coder("prophetnet", "ProphetNet", PROPHET),
    coder("nllb-moe", "NllbMoe", NLLB, compiles_alike=False),
    model("marian", "Marian", BART, "MTModel", reads=translation),
]

FAMILIES = [*ENCODERS, *DECODERS, *STATE_SPACES, *CODERS]
