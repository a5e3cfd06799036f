# /// script
# dependencies = ["trl-ext"]
# ///
"""
Train a text classifier, or a regressor, with an equilibrium-propagation head.

# Sentiment of IMDB reviews
python -m trl_ext.scripts.equilibrium_classifier --config recipes/equilibrium/imdb_classifier.yaml
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..core.checks import Range, check_fields, shown


if TYPE_CHECKING:
    from rich.table import Table

    from .recipe.strict_parser import StrictParser


@dataclass
class EPClassifierScriptArguments:
    """
    The data and the task of a classifier.

    Args:
        text_column (`str`, *optional*, defaults to `"text"`):
            Column with the text.
        label_column (`str`, *optional*, defaults to `"label"`):
            Column with classes, numbers, or lists of zeros and ones.
        num_labels (`int`, *optional*, defaults to `2`):
            Number of outputs.
        problem_type (`str`, *optional*):
            `"single_label_classification"`, `"multi_label_classification"` or `"regression"`. Defaults to what the
            labels' type says, as in transformers.
        max_length (`int`, *optional*, defaults to `512`):
            Tokens kept of a text.
        truncation_side (`str`, *optional*, defaults to `"right"`):
            Side that is cut from longer texts.
    """

    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    label_column: str = field(default="label", metadata={"help": "Column with the labels."})
    num_labels: int = field(default=2, metadata={"help": "Number of outputs."})
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = field(
        default=None, metadata={"help": "Kind of the labels. Read off them where not given."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens kept of a text."})
    truncation_side: Literal["left", "right"] = field(
        default="right", metadata={"help": "Side that is cut from longer texts."}
    )

    def __post_init__(self) -> None:
        named, count = Range(empty=False), Range(at_least=1)
        ranges = {"text_column": named, "label_column": named, "num_labels": count, "max_length": count}
        check_fields(self, ranges)


def tokenize(dataset: Any, tokenizer: Any, task_args: EPClassifierScriptArguments) -> Any:
    """
    Tokens and labels of a dataset.

    Args:
        dataset (`~datasets.Dataset`):
            Texts and labels.
        tokenizer (`~transformers.PreTrainedTokenizerBase`):
            Tokenizer.
        task_args ([`EPClassifierScriptArguments`]):
            The columns and the length.

    Returns:
        `~datasets.Dataset` with the columns `input_ids`, `attention_mask` and `labels`.

    Raises:
        RecipeError: If a column is missing.
    """
    from .recipe.strict_parser import RecipeError

    for name in ("text_column", "label_column"):
        if getattr(task_args, name) not in dataset.column_names:
            raise RecipeError(
                f"`{name}: {getattr(task_args, name)}` is not among the dataset's columns "
                f"{sorted(dataset.column_names)}. Set it to one of them."
            )

    _check_columns(dataset, task_args)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            rows[task_args.text_column],
            truncation=True,
            max_length=task_args.max_length,
            return_token_type_ids=False,
        )
        labels = rows[task_args.label_column]
        if task_args.problem_type == "regression":
            labels = [float(label) for label in labels] if task_args.num_labels == 1 else labels
        return {**encoded, "labels": labels}

    return dataset.map(encode, batched=True, remove_columns=dataset.column_names)


def _check_columns(dataset: Any, task_args: EPClassifierScriptArguments) -> None:
    """Refuses rows without a text, or with a label that is none."""
    from ..core.dataset_rows import check_rows
    from .recipe.strict_parser import RecipeError

    check_rows(dataset, "text", required=(task_args.text_column,))
    if not isinstance(dataset[0][task_args.text_column], str):
        raise RecipeError(f"`text_column: {task_args.text_column}` holds messages. Name a column of texts.")
    is_class = task_args.problem_type in (None, "single_label_classification") and task_args.num_labels > 1
    for row, label in enumerate(dataset[task_args.label_column]):
        numbers = label if isinstance(label, list) else [label]
        found = len(numbers) if isinstance(label, list) else 1
        if not numbers or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise RecipeError(
                f"Row {row}: `{task_args.label_column}` holds {shown(label)}, which is no label. Fill it in, or "
                "filter the row."
            )
        if is_class and found == 1 and isinstance(label, int) and not 0 <= label < task_args.num_labels:
            raise RecipeError(
                f"Row {row}: `{task_args.label_column}` holds {label}, and `num_labels: {task_args.num_labels}` has "
                f"the classes 0 to {task_args.num_labels - 1}. Set `num_labels`, or filter the row."
            )


def score(prediction: Any) -> dict[str, float]:
    """
    Accuracy, or for numbers the mean squared error.

    Args:
        prediction ([`~transformers.EvalPrediction`]):
            Logits `(N, num_labels)` and labels.

    Returns:
        `dict[str, float]`
    """
    logits, labels = prediction.predictions, prediction.label_ids
    if labels.ndim == 1 and labels.dtype.kind in "iu":
        return {"accuracy": float((logits.argmax(-1) == labels).mean())}
    if labels.ndim == 2 and set(labels.flatten().tolist()) <= {0.0, 1.0}:
        return {"accuracy": float(((logits > 0) == (labels > 0.5)).mean())}
    return {"mean_squared_error": float(((logits.reshape(labels.shape) - labels) ** 2).mean())}


def confusion_matrix(logits: Any, labels: Any) -> Any:
    """
    Counts of classes, or where several labels hold at once, of each label.

    Args:
        logits (`numpy.ndarray` of shape `(N, num_labels)`):
            Logits.
        labels (`numpy.ndarray`):
            Classes of shape `(N,)`, or zeros and ones of shape `(N, num_labels)`.

    Returns:
        `numpy.ndarray`, `int64`: for classes `(num_labels, num_labels)`, the true class in rows and the predicted one
        in columns; for labels `(num_labels, 2, 2)`, such a matrix of absent and present for each.
    """
    import numpy as np

    def counts(true: Any, predicted: Any, size: int) -> Any:
        return np.bincount(true * size + predicted, minlength=size * size).reshape(size, size)

    if labels.ndim == 1:
        return counts(labels.astype(np.int64), logits.argmax(-1), logits.shape[-1])
    true, predicted = (labels > 0.5).astype(np.int64), (logits > 0).astype(np.int64)
    return np.stack([counts(true[:, label], predicted[:, label], 2) for label in range(labels.shape[1])])


def confusion_table(counts: Any, names: list[str]) -> "Table":
    """
    A [`confusion_matrix`] to print, with the recall of each class or label.

    Args:
        counts (`numpy.ndarray`):
            Counts.
        names (`list[str]`):
            Names of the classes or labels.

    Returns:
        `rich.table.Table`
    """
    from rich.table import Table

    of_classes = counts.ndim == 2
    title = "Confusion matrix of the evaluation data: true classes in rows, predicted ones in columns"
    table = Table(title=title if of_classes else "Confusion of each label on the evaluation data")
    kinds = names if of_classes else ["true negative", "false positive", "false negative", "true positive"]
    for column in ("true class" if of_classes else "label", *kinds, "recall"):
        table.add_column(column, justify="right")
    for index, (name, row) in enumerate(zip(names, counts, strict=True)):
        right, total = (row[index], row.sum()) if of_classes else (row[1, 1], row[1].sum())
        recall = f"{right / total:.3f}" if total else "-"
        table.add_row(name, *(str(count) for count in row.flatten()), recall)
    return table


def main(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, head_args: Any, task_args: Any
) -> None:
    """Trains, evaluates and saves as the parsed arguments say."""
    from peft import get_peft_model
    from transformers import DataCollatorWithPadding

    from ..core.agreement import end_processes
    from ..equilibrium.report import EPAlignmentCallback
    from ..equilibrium.training import EPTrainer
    from .recipe.equilibrium_arguments import adapter_config, check_head_arguments, load_model
    from .recipe.loading import (
        last_checkpoint,
        load_datasets,
        require_model_and_data,
        resolve_model,
        saved_text,
        split_of,
    )
    from .recipe.tokenizer import load_tokenizer

    require_model_and_data(model_args, script_args, dataset_args)
    check_head_arguments(head_args, training_args.homeostasis_coef)
    checkpoint = last_checkpoint(training_args)
    dataset = load_datasets(script_args, dataset_args)
    name = resolve_model(model_args.model_name_or_path)
    tokenizer = load_tokenizer(name, model_args, training_args, head_args, truncation_side=task_args.truncation_side)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    evaluate = training_args.eval_strategy != "no"
    train_dataset = tokenize(split_of(dataset, "dataset_train_split", script_args), tokenizer, task_args)
    eval_dataset = None
    if evaluate:
        eval_dataset = tokenize(split_of(dataset, "dataset_test_split", script_args), tokenizer, task_args)
    model = load_model(
        model_args, training_args, head_args, num_labels=task_args.num_labels, problem_type=task_args.problem_type
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    features = split_of(dataset, "dataset_train_split", script_args).features or {}
    names = getattr(features.get(task_args.label_column), "names", None)
    if names is not None and len(names) == task_args.num_labels:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    peft_config = adapter_config(model_args)
    trainer = EPTrainer(
        model=model if peft_config is None else get_peft_model(model, peft_config),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=score,
    )
    if head_args.show_alignment > 0:
        trainer.add_callback(EPAlignmentCallback(trainer, head_args.show_alignment))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset=script_args.dataset_name)
    if evaluate:
        _print_confusion(trainer, eval_dataset)
    trainer.accelerator.print(saved_text("Classifier", training_args.output_dir))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=script_args.dataset_name)
    end_processes(trainer)


def _print_confusion(trainer: Any, dataset: Any) -> None:
    """Prints the confusion matrix of the model as it is saved; of numbers there is none."""
    from rich.console import Console

    found = trainer.predict(dataset, metric_key_prefix="eval")
    if not trainer.is_world_process_zero() or "eval_accuracy" not in found.metrics:
        return
    names = trainer.model.config.id2label
    table = confusion_table(confusion_matrix(found.predictions, found.label_ids), [names[i] for i in sorted(names)])
    Console().print(table)


def make_parser(prog: str | None = None) -> "StrictParser":
    """The strict parser of the script's arguments."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from ..equilibrium.training import EPTrainingArguments
    from ..optim import register
    from .recipe.equilibrium_arguments import EPHeadArguments
    from .recipe.strict_parser import StrictParser

    register()  # before the parser lists the choices of `optim`
    return StrictParser(
        (ScriptArguments, EPTrainingArguments, ModelConfig, DatasetMixtureConfig, EPHeadArguments,
         EPClassifierScriptArguments),
        prog=prog,
    )  # fmt: skip


if __name__ == "__main__":
    from .recipe.strict_parser import run_strictly

    run_strictly(make_parser, main)
