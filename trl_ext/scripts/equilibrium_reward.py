# /// script
# dependencies = ["trl-ext"]
# ///
"""
Train a reward model with an equilibrium-propagation head.

# The playground, on a CPU
python -m trl_ext.scripts.equilibrium_reward --config recipes/equilibrium/playground_reward.yaml
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .recipe.strict_parser import StrictParser


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, head_args: Any) -> None:
    """Trains, evaluates and saves as the parsed arguments say."""
    from ..equilibrium.report import EPAlignmentCallback
    from ..equilibrium.training import EPRewardTrainer
    from .recipe.equilibrium_arguments import adapter_config, check_head_arguments, load_model
    from .recipe.loading import (
        last_checkpoint,
        load_datasets,
        require_model_and_data,
        resolve_model,
        split_of,
        train_and_save,
    )
    from .recipe.tokenizer import load_tokenizer

    require_model_and_data(model_args, script_args, dataset_args)
    check_head_arguments(head_args, training_args.homeostasis_coef)
    checkpoint = last_checkpoint(training_args)
    dataset = load_datasets(script_args, dataset_args)
    evaluate = training_args.eval_strategy != "no"
    train_dataset = split_of(dataset, "dataset_train_split", script_args)
    eval_dataset = split_of(dataset, "dataset_test_split", script_args) if evaluate else None
    tokenizer = load_tokenizer(resolve_model(model_args.model_name_or_path), model_args, training_args, head_args)
    model = load_model(model_args, training_args, head_args, num_labels=1)
    training_args.model_init_kwargs = None
    trainer = EPRewardTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=adapter_config(model_args),
    )
    if head_args.show_alignment > 0:
        trainer.add_callback(EPAlignmentCallback(trainer, head_args.show_alignment))
    train_and_save(trainer, checkpoint, "Reward model", script_args.dataset_name)


def make_parser(prog: str | None = None) -> "StrictParser":
    """The strict parser of the script's arguments."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from ..equilibrium.training import EPRewardConfig
    from ..optim import register
    from .recipe.equilibrium_arguments import EPHeadArguments
    from .recipe.strict_parser import StrictParser

    register()  # before the parser lists the choices of `optim`
    return StrictParser(
        (ScriptArguments, EPRewardConfig, ModelConfig, DatasetMixtureConfig, EPHeadArguments), prog=prog
    )


if __name__ == "__main__":
    from .recipe.strict_parser import run_strictly

    run_strictly(make_parser, main)
