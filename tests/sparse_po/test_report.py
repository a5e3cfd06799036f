import re

import matplotlib.image
import pytest
from rich.console import Console

from tests.helpers.sparse_po import make_trainer
from tests.helpers.tiny import tiny_pairs, tiny_tokenizer
from trl_ext.core.token_colors import WeightedText, highest_weight, save_png, to_html, to_rich, token_pieces
from trl_ext.sparse_po.report import TokenMaskCallback


@pytest.mark.parametrize("independent", [False, True])
def test_callback_writes_table_html_and_png(independent, tmp_path, tiny_path, tokenizer):
    console = Console(record=True, width=120)
    trainer = make_trainer(
        tmp_path, tiny_path, tokenizer, max_steps=2, eval_strategy="steps", eval_steps=1, mask_learning_rate=0.3,
        independent_masks=independent, trainer_arguments={"eval_dataset": tiny_pairs(4, seed=5)},
    )  # fmt: skip
    callback = TokenMaskCallback(trainer, num_pairs=2, console=console)
    trainer.add_callback(callback)
    trainer.train()
    folder = tmp_path / "token_masks"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_1.html", "step_1.png", "step_2.html", "step_2.png",
    ]  # fmt: skip
    page = (folder / "step_2.html").read_text()
    pair = tiny_pairs(4, seed=5)[0]
    shown = re.sub(r"<[^>]+>", "", page).replace("&lt;eos&gt;", "<eos>")
    assert " ".join((pair["prompt"] + pair["chosen"]).split()) in " ".join(shown.split())
    assert page.count("<h2>") == (8 if independent else 4) and ("divergence mask" in page) == independent
    assert matplotlib.image.imread(folder / "step_2.png").std() > 0.01
    assert "chosen 1" in console.export_text()


def test_weights_stand_on_their_tokens(tmp_path, tiny_path, tokenizer):
    trainer = make_trainer(tmp_path, tiny_path, tokenizer)
    callback = TokenMaskCallback(trainer, num_pairs=1)
    chosen, rejected = callback.weighted_pairs()[0]
    row = trainer.train_dataset[0]
    weights = trainer.token_masks(trainer.data_collator([row]))["reward"]
    num_prompt = len(row["prompt_ids"])
    assert all(weight != weight for weight in chosen.weights[:num_prompt])
    length = num_prompt + len(row["chosen_ids"])
    assert chosen.weights[num_prompt:] == weights[0, num_prompt - 1 : length - 1].tolist()
    assert "".join(rejected.pieces) == tokenizer.decode(row["prompt_ids"] + row["rejected_ids"])


def test_wrong_number(tmp_path, tiny_path, tokenizer):
    with pytest.raises(ValueError, match="`num_pairs`.*0"):
        TokenMaskCallback(make_trainer(tmp_path, tiny_path, tokenizer), num_pairs=0)


def test_rendering(tmp_path):
    text = WeightedText("<b>", ["a", " <x>&", " c\nd"], [float("nan"), 0.0, 2.0])
    assert highest_weight([text]) == 2.0 and highest_weight([]) == 0.0
    page = to_html([text], "heading")
    assert "&lt;b&gt;" in page and " &lt;x&gt;&amp;" in page and 'title="2.000"' in page and "#ffffff" in page
    rich_text = to_rich(text, 2.0)
    assert rich_text.plain == "a <x>& c↵\nd" and "#ffffff" in str(rich_text.spans[1].style)
    save_png([text, WeightedText("long", ["word " * 40, "x" * 300], [1.0, 0.5])], "heading", tmp_path / "a.png")
    assert matplotlib.image.imread(tmp_path / "a.png").shape[2] == 4


def test_pieces_join_to_the_text():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the film was very good")["input_ids"]
    assert token_pieces(tokenizer, ids) == ["the", " film", " was", " very", " good"]
