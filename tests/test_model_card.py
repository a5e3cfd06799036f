from pathlib import Path

from huggingface_hub import ModelCard

import trl_ext
from tests.helpers.sparse_po import make_trainer
from tests.helpers.tiny import save_tiny_model, tiny_tokenizer
from trl_ext.core.model_card import finish_model_card, settings_table


def test_card_of_a_saved_model(tmp_path):
    path = save_tiny_model(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "out", path, tiny_tokenizer(), max_steps=1, save_strategy="steps", save_steps=1,
        mask_l1_reward=0.125, independent_masks=True,
    )  # fmt: skip
    trainer.train()
    assert "Token masks" in (tmp_path / "out" / "README.md").read_text()
    trainer.save_model(str(tmp_path / "saved"))
    text = (tmp_path / "saved" / "README.md").read_text()
    card = ModelCard(text)
    assert {"trl", "trl_ext", "sparse-po"} <= set(card.data.tags)
    assert "licence" not in card.data.to_dict()
    assert "None](" not in text and 'model="None"' not in text and "local base model" in text
    assert f"- trl_ext: {trl_ext.__version__}" in text
    assert "| `mask_l1_reward` | 0.125 |" in text and "| `independent_masks` | True |" in text
    assert "| `mask/reward/sparsity_chosen` |" in text and "`token_masks.safetensors`" in text
    assert "christopoulou" in text and "huggingface.co/papers/2410.05102" in text
    assert "AutoModelForCausalLM.from_pretrained" in text


def test_base_model_on_the_hub_is_named():
    content = (
        "---\nlicence: license\ntags:\n- trl\n---\n\n# Model Card\n\nThis model is a fine-tuned version of "
        "[org/base](https://huggingface.co/org/base).\n\n### Framework versions\n\n- TRL: 1.16.0\n"
    )
    card = finish_model_card(content, model_id="org/mine", base_model="org/base", method_section="### Masks\n\ntext")
    assert "[org/base](https://huggingface.co/org/base)" in card
    assert card.index("### Masks") < card.index("### Framework versions") < card.index("- TRL: 1.16.0")
    again = finish_model_card(
        content.replace("### Framework", "### Other"), model_id="x", base_model="y", method_section="z"
    )
    assert f"- trl_ext: {trl_ext.__version__}" in again and "z" in again


def test_settings_table():
    assert (
        settings_table({"beta": 0.5, "kind": "a"})
        == "| setting | value |\n|---|---|\n| `beta` | 0.5 |\n| `kind` | a |"
    )


def test_license_and_changelog_exist():
    root = Path(trl_ext.__file__).parents[1]
    assert "Apache License" in (root / "LICENSE").read_text()
    assert trl_ext.__version__ in (root / "CHANGELOG.md").read_text()
