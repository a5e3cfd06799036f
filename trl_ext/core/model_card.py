"""Model cards: TRL's own, mended and completed with what a method adds."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from .._version import __version__
from .card_metadata import completed_metadata, hub_datasets
from .safe_text import as_string, for_markdown, for_markdown_code, known_secrets, redacted, shown_folder


def settings_table(rows: dict[str, object]) -> str:
    """A Markdown table of settings and values."""
    lines = [f"| {for_markdown_code(name)} | {_shown(value)} |" for name, value in rows.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else for_markdown(value)


def finish_model_card(
    content: str,
    *,
    model_id: str,
    base_model: str | None,
    method_section: str,
    known: Mapping[str, Any] | None = None,
) -> str:
    """
    Mends TRL's card and adds a method's section before the framework versions.

    TRL writes `[None](https://huggingface.co/None)` for a base model in a local folder, `model="None"` where the model
    is not on the Hub, and the misspelt metadata `licence: license`.

    Args:
        content (`str`):
            Text of TRL's card, metadata included.
        model_id (`str`):
            Hub id of the model, or the folder it is saved in.
        base_model (`str` or `None`):
            Name of the base model to show; `None` where it has no name on the Hub.
        method_section (`str`):
            Markdown put into the training procedure.
        known (`Mapping[str, Any]`, *optional*):
            Arguments of [`completed_metadata`], what is known of data, base model and results; and `recipe`, the
            settings that were given, as YAML.

    Returns:
        `str`
    """
    if base_model is None:
        content = content.replace(
            "a fine-tuned version of [None](https://huggingface.co/None)", "fine-tuned from a local base model"
        )
    content = content.replace('model="None"', f"model={as_string(model_id)}")
    card = ModelCard(content)
    body = card.text
    facts = dict(known or {})
    recipe = facts.pop("recipe", None)
    if recipe:
        method_section = f"{method_section.strip()}\n\n{_recipe_section(recipe)}"
    versions = "### Framework versions\n\n"
    if versions not in body:
        body += f"\n{versions}"
    body = body.replace(versions, f"{method_section.strip()}\n\n{versions}- trl_ext: {__version__}\n", 1)
    card.text = re.sub(r"[ \t]+\n", "\n", body)
    card.data = completed_metadata(card.data.to_dict(), **facts)
    return str(card)


def _recipe_section(recipe: str) -> str:
    # Longer than any row of backticks in it, so that nothing in the recipe ends the block
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))
    return f"### Recipe\n\nThe settings that were given; all others are defaults.\n\n{fence}yaml\n{recipe}\n{fence}"


def write_method_card(
    folder: str | Path,
    *,
    model_id: str | None,
    base_model: str | None,
    method_section: str,
    token: str | None = None,
    known: Mapping[str, Any] | None = None,
) -> None:
    """
    Rewrites the `README.md` that TRL left in a folder (see [`finish_model_card`]).

    Args:
        folder (`str` or `Path`):
            Folder with TRL's card.
        model_id (`str` or `None`):
            Hub id of the model; `None` is the folder.
        base_model (`str` or `None`):
            Name of the base model, or `None`.
        method_section (`str`):
            Markdown of the method.
        token (`str`, *optional*):
            The run's `hub_token`, which must not stand in the card.
        known (`Mapping[str, Any]`, *optional*):
            What is known of a trainer's data, base model and results ([`known_of`]).
    """
    path = Path(folder) / "README.md"
    content = finish_model_card(
        path.read_text(encoding="utf-8"),
        model_id=model_id or shown_folder(folder),
        base_model=base_model,
        method_section=method_section,
        known=known,
    )
    path.write_text(redacted(content, known_secrets(token)), encoding="utf-8")


def known_of(trainer: Any, base_model: str | None) -> dict[str, Any]:
    """What a trainer knows for its card, as `known` of [`finish_model_card`]."""
    return {
        "datasets": hub_datasets(getattr(trainer, "train_dataset", None), getattr(trainer, "dataset_names", ())),
        "base_model": base_model,
        "log_history": trainer.state.log_history,
        "recipe": getattr(trainer.args, "given_recipe", None),  # set by a command that parsed it
    }


class MethodCardMixin(Trainer):
    """
    Base of a trainer, before TRL's, whose model card says what its method did. The card is written with every save, at
    checkpoints by TRL.
    """

    def _method_section(self, model_id: str) -> str:
        """Markdown of the method for a model of this Hub id or folder."""
        raise NotImplementedError

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            model_id = self.hub_model_id or shown_folder(self.args.output_dir)
            base_model = self.model.config.name_or_path
            write_method_card(
                self.args.output_dir,
                model_id=model_id,
                base_model=base_model if base_model and not Path(base_model).is_dir() else None,
                method_section=self._method_section(model_id),
                token=self.args.hub_token,
                known=known_of(self, base_model),
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            self._write_card_into(Path(self.args.output_dir if output_dir is None else output_dir))
        super().save_model(output_dir, _internal_call=_internal_call)

    def _write_card_into(self, folder: Path) -> None:
        self.create_model_card(model_name=(self.args.hub_model_id or folder.resolve().name).split("/")[-1])
        card = Path(self.args.output_dir) / "README.md"
        if self.args.should_save and card.is_file() and folder.resolve() != Path(self.args.output_dir).resolve():
            folder.mkdir(parents=True, exist_ok=True)
            content = card.read_text(encoding="utf-8")
            if not self.hub_model_id:
                own, others = (as_string(shown_folder(each)) for each in (self.args.output_dir, folder))
                content = content.replace(own, others)
            (folder / "README.md").write_text(content, encoding="utf-8")
