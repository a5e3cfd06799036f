# /// script
# dependencies = ["trl-ext"]
# ///
"""
Train a policy with SparsePO.

# The playground, on a CPU
python -m trl_ext.scripts.sparse_po --config recipes/sparse_po/playground.yaml

# LoRA with ZeRO-3 on a node
accelerate launch --config_file trl_ext/accelerate_configs/zero3.yaml -m trl_ext.scripts.sparse_po \
    --config recipes/sparse_po/qwen3_lora_zero3.yaml
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.checks import Range, check_fields
from .recipe.tokenizer import TOKENIZER_RANGES, TokenizerArguments


if TYPE_CHECKING:
    from .recipe.strict_parser import StrictParser


@dataclass
class SparsePOScriptArguments(TokenizerArguments):
    """
    Arguments of the script beyond TRL's.

    Args:
        tokenizer_name_or_path (`str`, *optional*):
            Name or folder of the tokenizer. Defaults to the model's own.
        show_token_masks (`int`, *optional*, defaults to `0`):
            Number of evaluation pairs whose tokens are shown coloured by weight, in the terminal, as HTML and as PNG.
    """

    show_token_masks: int = field(
        default=0,
        metadata={"help": "Number of evaluation pairs whose tokens are shown coloured by weight (0 shows none)."},
    )

    def __post_init__(self) -> None:
        check_fields(self, {"show_token_masks": Range(at_least=0), **TOKENIZER_RANGES})


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, mask_args: Any) -> None:
    """Trains, evaluates and saves as the parsed arguments say."""
    from trl import get_peft_config, get_quantization_config

    from ..sparse_po.report import TokenMaskCallback
    from ..sparse_po.sparse_po_trainer import SparsePOTrainer
    from .recipe.loading import (
        ignore_boolean_buffers,
        last_checkpoint,
        load_datasets,
        model_init_kwargs,
        require_model_and_data,
        resolve_model,
        split_of,
        train_and_save,
    )
    from .recipe.tokenizer import load_tokenizer

    require_model_and_data(model_args, script_args, dataset_args)
    checkpoint = last_checkpoint(training_args)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    model = resolve_model(model_args.model_name_or_path)
    dataset = load_datasets(script_args, dataset_args)
    evaluate = training_args.eval_strategy != "no"
    train_dataset = split_of(dataset, "dataset_train_split", script_args)
    eval_dataset = split_of(dataset, "dataset_test_split", script_args) if evaluate else None
    tokenizer = load_tokenizer(model, model_args, training_args, mask_args)
    trainer = SparsePOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer if mask_args.tokenizer_name_or_path else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.ignore_bias_buffers:
        ignore_boolean_buffers(trainer.model)
    if mask_args.show_token_masks > 0:
        trainer.add_callback(TokenMaskCallback(trainer, num_pairs=mask_args.show_token_masks))
    train_and_save(trainer, checkpoint, "Model and masks", script_args.dataset_name)


def make_parser(prog: str | None = None) -> "StrictParser":
    """The strict parser of the script's arguments."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from ..optim import register
    from ..sparse_po.sparse_po_config import SparsePOConfig
    from .recipe.strict_parser import StrictParser

    register()  # before the parser lists the choices of `optim`
    return StrictParser(
        (ScriptArguments, SparsePOConfig, ModelConfig, DatasetMixtureConfig, SparsePOScriptArguments), prog=prog
    )


if __name__ == "__main__":
    from .recipe.strict_parser import run_strictly

    run_strictly(make_parser, main)
