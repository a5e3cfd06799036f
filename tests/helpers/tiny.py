"""Tiny models, a tokenizer and preference pairs that tests build in a moment, without a hub."""

import math

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
FAMILIES = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    "qwen3": {**_SIZES, "head_dim": 8},
    "gpt2": _GPT2_SIZES,
    "gpt_neox": {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"},
    "gemma2": {**_SIZES, "head_dim": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "mixtral": {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
}
WORDS = [
    "<pad>", "<eos>", "<unk>", *"the a film book meal was is very quite so good bad fine dull great poor".split(),
    *"i we they liked hated found loved it and but then because place room story end plot".split(),
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(family: str = "llama", seed: int = 0, **overrides) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {**FAMILIES.get(family, {}), **overrides}
    sizes.setdefault("vocab_size", len(WORDS))
    config = AutoConfig.for_model(family, **sizes)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, None
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def save_tiny_model(folder, family: str = "llama", seed: int = 0, **overrides) -> str:
    tiny_model(family, seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_pairs(num_pairs: int = 16, seed: int = 0, conversational: bool = False) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def sentence(length: int) -> str:
        ids = torch.randint(3, len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[index] for index in ids)

    rows = []
    for index in range(num_pairs):
        texts = [sentence(2 + index % 3), sentence(3 + index % 5), sentence(4 + index % 4)]
        if conversational:
            prompt, chosen, rejected = (
                [{"role": role, "content": text}]
                for role, text in zip(("user", "assistant", "assistant"), texts, strict=True)
            )
        else:
            prompt, chosen, rejected = texts[0], f" {texts[1]} <eos>", f" {texts[2]} <eos>"
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def tokenizer_of_size(vocab_size: int) -> PreTrainedTokenizerFast:
    """The playground's tokenizer with as many more tokens as a model of `vocab_size` rows must have to be taken."""
    from trl_ext.core.tokenizer_check import SMALLEST_SHARE
    from trl_ext.playground import build_tokenizer

    tokenizer = build_tokenizer()
    missing = math.ceil(SMALLEST_SHARE * vocab_size) - len(tokenizer)
    tokenizer.add_tokens([f"<unused {number}>" for number in range(missing)])
    return tokenizer


def qlora_arguments() -> dict:
    """Arguments of a TRL trainer: 4-bit weights of the model at a path, computing in bfloat16, under LoRA."""
    from peft import LoraConfig

    return {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
        "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"]),
    }
