"""What the experiments on a pretrained model share: prompts of reviews' first words, an adapter on the last layers."""

from dataclasses import dataclass, field

from peft import LoraConfig
from transformers import AutoConfig


@dataclass
class AdaptedModelArguments:
    """
    Arguments of an experiment that trains an adapter on a pretrained model, from prompts made of reviews.

    Args:
        prompt_words (`int`):
            Words of a review that make a prompt.
        lora_rank (`int`):
            Rank of the adapter.
        lora_layers (`int`):
            How many of the last layers have one; 0 for all.
    """

    prompt_words: int = field(default=5, metadata={"help": "Words of a review that make a prompt."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_layers: int = field(default=10, metadata={"help": "How many of the last layers have one; 0 for all."})

    def adapter(self, model: str) -> LoraConfig:
        """
        LoRA on all linear layers of the last blocks.

        Args:
            model (`str`):
                Name or folder of the model.

        Returns:
            [`~peft.LoraConfig`]
        """
        number = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
        used = min(self.lora_layers or number, number)
        return LoraConfig(
            r=self.lora_rank, lora_alpha=2 * self.lora_rank, task_type="CAUSAL_LM",
            layers_to_transform=list(range(number - used, number)),
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )  # fmt: skip
