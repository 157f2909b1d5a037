"""Models of many transformers architectures with random weights, so small that each is built and saved in a moment."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

WIDTH: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**WIDTH, "vocab_size": 100, "max_position_embeddings": 64}
DECODER = {**TEXT, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {**DECODER, "num_experts": 4, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {**DECODER, "num_local_experts": 4}
IMAGE = {**WIDTH, "image_size": 32, "patch_size": 16}
PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
DEEPSEEK = {
    **EXPERTS, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
JAMBA = {
    **DECODER, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
}  # fmt: skip

#: Name → class of the model, class of its config, arguments of the config. An argument that is itself a config is a pair of the same kind.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertForMaskedLM", "BertConfig", TEXT),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", {**TEXT, "pad_token_id": 1}),
    "DistilBERT": ("DistilBertForMaskedLM", "DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "ALBERT": ("AlbertForMaskedLM", "AlbertConfig", {**TEXT, "embedding_size": 16}),
    "DeBERTa v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", TEXT),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "Llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 16}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 16}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", DECODER),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100}),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", LOCAL_EXPERTS),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 16}),
    "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", {**DECODER, "num_experts": 4}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", {**LOCAL_EXPERTS, "head_dim": 16, "rope_parameters": {"rope_type": "default"}}),
    "Granite MoE": ("GraniteMoeForCausalLM", "GraniteMoeConfig", LOCAL_EXPERTS),
    "Phi-MoE": ("PhimoeForCausalLM", "PhimoeConfig", LOCAL_EXPERTS),
    "Jamba": ("JambaForCausalLM", "JambaConfig", JAMBA),
    "T5": ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}),
    "BART": ("BartForConditionalGeneration", "BartConfig", {**PAIR, "max_position_embeddings": 64}),
    "Marian": ("MarianMTModel", "MarianConfig", {**PAIR, "max_position_embeddings": 64}),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32},
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **WIDTH, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2, "vocab_size": 100,
        },
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "BEiT": ("BeitForImageClassification", "BeitConfig", IMAGE),
    "DINOv2": ("Dinov2Model", "Dinov2Config", IMAGE),
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4},
    ),
    "ConvNeXt": ("ConvNextForImageClassification", "ConvNextConfig", {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2}),
    "ResNet": ("ResNetForImageClassification", "ResNetConfig", RESNET),
    "DETR": (
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "use_timm_backbone": False, "backbone": None, "backbone_config": ("ResNetConfig", {**RESNET, "out_features": ["stage2"]}),
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5,
        },
    ),
    "CLIP": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, "vision_config": IMAGE, "projection_dim": 16},
    ),
    "SigLIP": ("SiglipModel", "SiglipConfig", {"text_config": {**TEXT, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": IMAGE}),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"text_config": ("LlamaConfig", DECODER), "vision_config": ("CLIPVisionConfig", IMAGE), "image_token_id": 5},
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
        },
    ),
}  # fmt: skip

#: Architectures whose experts are one tensor in memory.
FUSED = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "DeepSeek-V3", "Granite MoE", "Phi-MoE", "Jamba")


def tiny(name: str, seed: int = 0) -> Any:
    """A model of the architecture ``name``, with every third parameter frozen."""
    import transformers

    model_class, config_class, arguments = ARCHITECTURES[name]
    arguments = {
        key: getattr(transformers, value[0])(**value[1]) if _is_config(value) else value for key, value in arguments.items()
    }
    torch.manual_seed(seed)
    with contextlib.redirect_stderr(io.StringIO()):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    return model


def _is_config(value: object) -> bool:
    return isinstance(value, tuple) and isinstance(value[0], str)
