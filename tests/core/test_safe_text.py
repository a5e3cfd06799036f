"""What comes from data, names and recipes is shown as it is, and never as markup; secrets and local folders never."""

import copy
import pickle
from html.parser import HTMLParser
from io import StringIO

import pytest
import yaml
from rich.console import Console

from tests.helpers.constrained_ppo import make
from tests.helpers.tiny import save_tiny_model
from trl_ext import ConstrainedPPOConfig, EPRewardConfig, SparsePOConfig
from trl_ext.constrained_ppo.constraints import Constraint
from trl_ext.constrained_ppo.dashboard import dashboard_table, draw_dashboard
from trl_ext.constrained_ppo.proxy_points.fit import constraints_block
from trl_ext.core.model_card import settings_table
from trl_ext.core.safe_text import (
    HIDDEN,
    as_string,
    for_markdown,
    for_markdown_code,
    known_secrets,
    redacted,
    shown_folder,
)
from trl_ext.core.token_colors import WeightedText, save_png, to_html


HOSTILE = ["[/x]", "[bold]", "<script>alert(1)</script>", "a|b", "two\nlines", "`code`", "$x_{$", "\x1b[31m", "[a](b)"]


def printed(renderable):
    console = Console(file=StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_reward_of_any_name(name, tmp_path):
    log = [{"step": step, f"rewards/{name}/mean": 0.5, f"rewards/{name}/std": 0.1} for step in (1, 2)]
    constraints = [Constraint(name, 0.5, ">=")]
    text = printed(dashboard_table(log, constraints, title=f"run {name}"))
    stripped = "".join(sign for sign in " ".join(name.split()) if sign.isprintable())
    assert stripped in text and "\x1b[31m" not in text
    draw_dashboard(log, tmp_path / "a.png", constraints, title=name)
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert yaml.safe_load(constraints_block([name], [0.5]))["constraints"][0]["reward"] == name


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_of_cards_keep_their_shape(name):
    lines = settings_table({name: name}).splitlines()
    assert len(lines) == 3 and "<script>" not in lines[2].split(" | ")[-1]
    bare = lines[2].replace("\\|", "")
    assert bare.count("|") == 3
    assert for_markdown_code(name).count("`") == 2 and "\n" not in for_markdown(name)
    assert for_markdown("[a](javascript:b)") == "\\[a\\](javascript:b)"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def test_html_of_tokens_has_no_tags_of_the_data(tmp_path):
    pieces = ["<script>alert(1)</script>", '" onload="x', "<img src=x onerror=y>", "&lt;", "\x00\x1b", "a\nb"]
    texts = [WeightedText('<b title="x">', pieces, [0.5] * len(pieces))]
    parser = Tags()
    parser.feed(to_html(texts, "<i>heading</i>"))
    assert parser.tags <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "br"}
    save_png(texts, "$\\frac{$", tmp_path / "a.png")


def test_code_in_cards_is_quoted():
    name = 'x"); import os; os.system("y'
    assert eval(as_string(name)) == name and eval(as_string("C:\\new")) == "C:\\new"


def test_folders_as_others_may_see_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_folder("outputs/run") == "outputs/run"
    assert shown_folder(tmp_path / "outputs" / "run") == "outputs/run"
    assert shown_folder("/somewhere/else/run") == "run" and shown_folder(tmp_path) == tmp_path.name


def test_secrets_are_hidden(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("MY_API_KEY", "key_12345678")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false_value")
    assert redacted("a hf_abcdefgh key_12345678 false_value") == f"a {HIDDEN} {HIDDEN} false_value"
    assert redacted("a secret_of_hub", known_secrets("secret_of_hub", None)) == f"a {HIDDEN}"


@pytest.mark.parametrize("cls", [SparsePOConfig, ConstrainedPPOConfig, EPRewardConfig])
def test_saved_arguments_have_no_token_and_copies_have(cls, tmp_path):
    settings = {"method": "ppo"} if cls is ConstrainedPPOConfig else {}
    args = cls(str(tmp_path), use_cpu=True, bf16=False, hub_token="hf_abcdefgh", **settings)
    assert b"hf_abcdefgh" not in pickle.dumps(args) and args.hub_token == "hf_abcdefgh"
    assert pickle.loads(pickle.dumps(args)).output_dir == str(tmp_path)
    assert copy.copy(args).hub_token == copy.deepcopy(args).hub_token == "hf_abcdefgh"
    assert copy.deepcopy(args) == args
    with pytest.raises(ValueError, match="`hub_token` must be a text") as error:
        cls(str(tmp_path), use_cpu=True, bf16=False, hub_token=["hf_abcdefgh"], **settings)
    assert "hf_abcdefgh" not in str(error.value)


def test_nothing_that_a_run_writes_has_a_token_or_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_environment")
    path = save_tiny_model(tmp_path / "base")
    trainer = make(
        tmp_path / "out",
        path,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        dashboard=True,
        hub_token="hf_argument",
    )
    trainer.end_training(f"<script> | hf_environment {trainer.args.hub_token}")
    trainer.train()
    trainer.save_model(trainer.args.output_dir)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"README.md", "training_args.bin", "dashboard.png"} <= {file.name for file in files}
    for file in files:
        data = file.read_bytes()
        for secret in (b"hf_environment", b"wandb_environment", b"hf_argument"):
            assert secret not in data, file
    for card in (tmp_path / "out").rglob("README.md"):
        text = card.read_text()
        assert str(tmp_path) not in text and "<script>" not in text
