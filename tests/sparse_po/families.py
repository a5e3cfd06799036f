"""A tiny model of each decoder-only family of transformers, made from the family's own configuration.

A family is a `model_type` in transformers' table of causal language models. Its configuration is taken as it stands,
and every size in it that [`SIZES`] knows by name is set to a small one. Where a configuration has several kinds of
layers, one of each is kept, so that sliding windows, recurrences and experts are there and short sequences show them.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.helpers.tiny import WORDS, tiny_tokenizer
from tests.sparse_po.families_page import LEFT_OUT


SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64,
    "max_position_embeddings": 64, "n_inner": 64, "rotary_dim": 4, "ffn_dim": 64, "word_embed_proj_dim": 32,
    "n_embd": 32, "n_head": 4, "d_model": 32, "attention_heads": 4, "n_heads": 4,
    "sliding_window": 6, "window_size": 6, "attention_chunk_size": 6, "embedding_size": 32, "d_inner": 64, "dff": 64,
    # Mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "dense_intermediate_size": 64, "intermediate_size_mlp": 64, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 16, "prefix_dense_intermediate_size": 64, "zero_expert_num": 2,
    "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "shared_experts_intermediate_size": 16,
    "router_hidden_size": 16, "num_mtp_layers": 0,
    # Latent and sparse attention
    "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "o_lora_rank": 8, "o_groups": 2, "index_topk": 6, "index_head_dim": 8, "index_n_heads": 2, "index_block_size": 4,
    "index_topk_blocks": 2, "gated_norm_rank": 8,
    # State spaces and linear attention
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_d_ssm": 64, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_chunk_size": 4, "chunk_size": 4,
    "n_groups": 1, "n_mamba_heads": 4, "lru_width": 32, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4,
    "block_size": 4, "attention_hidden_size": 32,
}  # fmt: skip
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
LAYER_KINDS = ("layer_types", "mlp_layer_types")
# A setting that the configuration works out for itself
OWN = object()

_LOGIT_MULTIPLIERS = {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5}
# What a family needs beside small sizes, or what makes it differ from its kin
SETTINGS: dict[str, dict[str, Any]] = {
    "granite": _LOGIT_MULTIPLIERS,
    "granite_swa": _LOGIT_MULTIPLIERS,
    "granitemoe": _LOGIT_MULTIPLIERS,
    "granitemoe_swa": _LOGIT_MULTIPLIERS,
    "granitemoehybrid": {**_LOGIT_MULTIPLIERS, "layer_types": ["linear_attention", "full_attention"]},
    "granitemoeshared": _LOGIT_MULTIPLIERS,
    "hyperclovax": {**_LOGIT_MULTIPLIERS, "logits_scaling": 0.5},
    # Of few heads all may score zero, and the length of a row then decides which tokens an indexer keeps
    "axk2": {"index_n_heads": 16},
    "deepseek_v32": {"index_n_heads": 16},
    "glm_moe_dsa": {"index_n_heads": 16},
    "bert": {"is_decoder": True},
    "bamba": {"attn_layer_indices": [1]},
    "bloom": {"n_head": 8},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 16}},
    "flint": {"mlp_only_layers": [0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "reformer": {"is_decoder": True},
    "xlstm": {"num_heads": 4, "v_head_dim": OWN, "embedding_dim": 32, "num_blocks": 2, "v_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "head_dim": OWN},
    "zaya": {"num_experts_per_tok": 1},
}
# One family more than once, by shape
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "doge, experts": ("doge", {"is_moe": True}),
    "opt-350m": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "falcon, alibi": ("falcon", {"alibi": True, "multi_query": False}),
    "mixtral, router loss": ("mixtral", {"output_router_logits": True}),
}


def family_names() -> list[str]:
    """Every row of the table, by name."""
    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    return sorted([name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in left_out] + list(VARIANTS))


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of a row of the table."""
    family, variant = VARIANTS.get(name, (name, {}))
    config_class = CONFIG_MAPPING[family]
    default = config_class()

    def known(size: str) -> bool:
        """Whether the configuration has it, and does not work it out for itself."""
        kept = getattr(config_class, config_class.attribute_map.get(size, size), None)
        return not isinstance(kept, property) and size in dir(default)

    settings: dict[str, Any] = {size: value for size, value in SIZES.items() if known(size)}
    kinds = {kind: list(dict.fromkeys(getattr(default, kind) or [])) for kind in LAYER_KINDS if known(kind)}
    depth = max([2, *map(len, kinds.values())])
    for kind, found in kinds.items():
        if found:
            settings[kind] = [found[place % len(found)] for place in range(depth)]
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # latent attention has no groups of heads
    settings |= {"num_hidden_layers": depth, "vocab_size": len(WORDS)} | SETTINGS.get(family, {}) | variant
    own_names = {config_class.attribute_map.get(size, size): v for size, v in settings.items() if v is not OWN}
    return config_class(**own_names, **IDS)


def tiny_family_model(name: str) -> PreTrainedModel:
    """A tiny model with random weights, the same each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model.eval()


def save_tiny_family(name: str, folder: str) -> str:
    """Saves a tiny model with its tokenizer."""
    tiny_family_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
