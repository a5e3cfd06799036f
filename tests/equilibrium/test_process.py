"""What the head changes in the process around it: nothing on import, and what is explicit can be undone."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForCausalLM

import trl_ext.equilibrium as package
from tests.helpers.equilibrium import ASYMMETRIC
from tests.helpers.tiny import save_tiny_model, tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer, EPHead, EPModelForSequenceClassification


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    base = save_tiny_model(path / "base")
    EPModelForSequenceClassification.from_pretrained(base, num_labels=1, hidden_features=[8]).save_pretrained(path)
    return str(path)


SNAPSHOT = """
import sys, transformers
from torch.nn.modules import module
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
def snapshot():
    return (list(map(id, sys.meta_path)), list(sys.path_hooks), dict(module._global_module_registration_hooks),
            list(CONFIG_MAPPING), list(AutoModelForSequenceClassification._model_mapping._extra_content))
before = snapshot()
import trl_ext, trl_ext.equilibrium
from trl_ext import SparsePOTrainer, ConstrainedPPOTrainer, EPHead
print(snapshot() == before)
EPHead(2, [2], 1)
print(len(module._global_module_registration_hooks))
from trl_ext import EPConfig
registered = AutoModelForSequenceClassification._model_mapping._extra_content
print("equilibrium_propagation" in CONFIG_MAPPING, len(registered))
trl_ext.equilibrium.remove_lm_head_guard()
trl_ext.equilibrium.unregister_auto_classes()
print(snapshot() == before)
"""


def test_importing_changes_nothing_and_the_rest_is_undone():
    assert run(SNAPSHOT) == ["True", "1", "True", "1", "True"]


def test_the_head_needs_torch_alone():
    """All that it loads beside torch, whose compiler `torch.compiler.disable` loads, is its own package's."""
    code = """import sys, torch, torch._dynamo
before = {name.split(".")[0] for name in sys.modules}
from trl_ext.equilibrium import EPHead, EPValueHeads
EPValueHeads(2, 1)
head = EPHead(2, [3, 3], 1, feedback="asymmetric", feedback_angle=90.0)
(head(torch.ones(1, 2)).sum() + head.homeostasis_loss()).backward()
loaded = {name.split(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
print(sorted(loaded), {"transformers", "trl", "accelerate", "matplotlib"} & set(sys.modules))"""
    assert run(code) == ["['trl_ext']", "set()"]


@pytest.mark.parametrize(
    "imports",
    [
        "from trl_ext import EPModelForSequenceClassification",
        "from trl_ext.equilibrium import register_auto_classes; register_auto_classes()",
    ],
)
def test_auto_classes_know_it_in_a_fresh_process(imports, saved):
    code = (
        f"{imports}\nfrom transformers import AutoConfig, AutoModelForSequenceClassification as Auto\n"
        f"print(type(AutoConfig.from_pretrained({saved!r})).__name__, type(Auto.from_pretrained({saved!r})).__name__)"
    )
    assert run(code) == ["EPConfig", "EPModelForSequenceClassification"]


@pytest.fixture
def unregistered():
    package.unregister_auto_classes()
    yield
    package.register_auto_classes()


def test_constrained_ppo_knows_rewards_by_name(saved, unregistered, tmp_path):
    tiny_tokenizer().save_pretrained(saved)
    arguments = ConstrainedPPOConfig(
        str(tmp_path), method="ppo", use_cpu=True, bf16=False, report_to="none", max_completion_length=4,
        per_device_train_batch_size=4,
    )  # fmt: skip
    prompts = tiny_pairs(8).select_columns("prompt")
    trainer = ConstrainedPPOTrainer(f"{saved}/base", [saved], arguments, prompts, processing_class=tiny_tokenizer())
    assert type(trainer.reward_funcs[0]) is EPModelForSequenceClassification


def test_registration_is_idempotent_and_undone(saved, unregistered):
    for _ in range(2):
        package.register_auto_classes()
    assert type(AutoModelForSequenceClassification.from_pretrained(saved)) is EPModelForSequenceClassification
    for _ in range(2):
        package.unregister_auto_classes()
    with pytest.raises(ValueError, match="equilibrium_propagation"):
        AutoConfig.from_pretrained(saved)


def test_a_refused_registration_is_logged(unregistered, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise ValueError("taken")

    from trl_ext.equilibrium import modeling

    with monkeypatch.context() as patch:
        patch.setattr(AutoConfig, "register", refuse)
        modeling._register_on_import()
    assert "load it by its own class" in caplog.text and "ValueError: taken" in caplog.text


def guards():
    hooks = torch_module._global_module_registration_hooks.values()
    return [hook for hook in hooks if getattr(hook, "__name__", "") == "refuse_behind_lm_head"]


def test_the_guard_goes_in_once_and_out_again():
    package.remove_lm_head_guard()
    assert not guards()
    tiny_model()  # a model without a head does not pay for it
    assert not guards()
    for _ in range(2):
        head = EPHead(32, [8], 36)
    assert len(guards()) == 1
    for _ in range(2):
        package.remove_lm_head_guard()
    model = tiny_model()
    model.lm_head = head
    assert not guards() and model.lm_head is head
    package.install_lm_head_guard()
    with pytest.raises(ValueError, match="EPHead"):
        tiny_model().lm_head = head


def test_settings_build_a_head_of_the_same_kind():
    head = EPHead(3, [5, 4], 2, activation="dsilu", spectral_cap=0.5, **ASYMMETRIC)
    twin = EPHead(**head.settings())
    assert twin.settings() == head.settings() and twin.feedback_angle == 90.0 and twin.hidden_features == [5, 4]
    twin.load_state_dict(head.state_dict())
    hidden = torch.randn(2, 3)
    assert torch.equal(twin.eval()(hidden), head.eval()(hidden))


class OwnHead(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = EPHead(config.hidden_size, [8], config.vocab_size)


class OwnName(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.vocabulary = self.lm_head

    def get_output_embeddings(self):
        return self.vocabulary


@pytest.mark.parametrize(
    "call",
    [
        lambda: setattr(tiny_model(), "lm_head", EPHead(32, [8], 36)),
        lambda: tiny_model().set_output_embeddings(EPHead(32, [8], 36)),
        lambda: setattr(OwnName(tiny_model().config), "vocabulary", EPHead(32, [8], 36)),
        lambda: setattr(tiny_model(), "lm_head", nn.Sequential(EPHead(32, [8], 36), nn.Linear(36, 36))),
        lambda: OwnHead(tiny_model().config),
    ],
    ids=["lm_head", "set_output_embeddings", "own name", "nested", "own class"],
)
def test_behind_lm_head_is_refused(call):
    with pytest.raises(ValueError, match="EPHead.*output embeddings.*bypassed.*critic_head='equilibrium'"):
        call()


def test_other_places_are_not_refused():
    model = tiny_model()
    model.lm_head = nn.Linear(32, 36)
    model.value_heads = EPHead(32, [8], 2)
    model.model.norm = nn.Sequential(EPHead(32, [8], 32), model.model.norm)  # before the output embeddings
    other = nn.Module()
    other.lm_head = EPHead(32, [8], 2)  # no model of transformers
    assert isinstance(other.lm_head, EPHead) and isinstance(model.value_heads, EPHead)


def test_unknown_name_of_the_package():
    import trl_ext.equilibrium as package

    assert package.EPHead is EPHead
    with pytest.raises(AttributeError, match="EPHead"):
        package.EPHed  # noqa: B018
