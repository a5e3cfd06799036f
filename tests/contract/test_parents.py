"""What we rely on in TRL, transformers and accelerate beyond their public documentation.

For every name: it exists, it has the signature that `signatures.json` records, and the parent still calls it. After a
deliberate change run `python -m tests.contract.test_parents` to record the signatures anew.
"""

import ast
import inspect
import json
import textwrap
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import PreTrainedConfig, Trainer, TrainerState, TrainingArguments, masking_utils
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardTrainer, TrlParser
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import disable_gradient_checkpointing
from trl.scripts import dpo, grpo, kto, reward, rloo, sft
from trl.trainer import grpo_trainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import (
    RepeatSampler,
    add_fused_lm_head,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    use_adapter,
)

from trl_ext._upstream import cpu_without_number
from trl_ext.scripts.trl_scripts import _TRAINERS


RECORDED = Path(__file__).with_name("signatures.json")
# Name: what it is. Overridden or called by us.
USED = {
    "DPOTrainer.__init__": DPOTrainer.__init__,
    "DPOTrainer._prepare_dataset": DPOTrainer._prepare_dataset,
    "DPOTrainer._compute_loss": DPOTrainer._compute_loss,
    "DPOTrainer._set_signature_columns_if_needed": DPOTrainer._set_signature_columns_if_needed,
    "DPOTrainer.create_model_card": DPOTrainer.create_model_card,
    "GRPOTrainer.__init__": GRPOTrainer.__init__,
    "GRPOTrainer._calculate_rewards": GRPOTrainer._calculate_rewards,
    "GRPOTrainer._generate_and_score_completions": GRPOTrainer._generate_and_score_completions,
    "GRPOTrainer._get_per_token_logps_and_entropies": GRPOTrainer._get_per_token_logps_and_entropies,
    "GRPOTrainer._compute_loss": GRPOTrainer._compute_loss,
    "GRPOTrainer.compute_loss": GRPOTrainer.compute_loss,
    "GRPOTrainer._load_optimizer_and_scheduler": GRPOTrainer._load_optimizer_and_scheduler,
    "GRPOTrainer._get_train_sampler": GRPOTrainer._get_train_sampler,
    "GRPOTrainer.log": GRPOTrainer.log,
    "GRPOTrainer.training_step": GRPOTrainer.training_step,
    "Trainer.evaluate": Trainer.evaluate,
    "Trainer.train": Trainer.train,
    "VLLMGeneration._iter_named_params": VLLMGeneration._iter_named_params,
    "RewardTrainer.__init__": RewardTrainer.__init__,
    "RewardTrainer.compute_loss": RewardTrainer.compute_loss,
    "RewardTrainer.log": RewardTrainer.log,
    "RewardTrainer.create_model_card": RewardTrainer.create_model_card,
    "Trainer.create_optimizer": Trainer.create_optimizer,
    "Trainer.get_decay_parameter_names": Trainer.get_decay_parameter_names,
    "Trainer.get_optimizer_cls_and_kwargs": Trainer.get_optimizer_cls_and_kwargs,
    "Trainer.save_model": Trainer.save_model,
    "Trainer._get_output_dir": Trainer._get_output_dir,
    "Trainer._push_from_checkpoint": Trainer._push_from_checkpoint,
    "Trainer._run_epoch": Trainer._run_epoch,
    "Trainer._save_checkpoint": Trainer._save_checkpoint,
    "Trainer._save_optimizer_and_scheduler": Trainer._save_optimizer_and_scheduler,
    "Trainer._save_rng_state": Trainer._save_rng_state,
    "Trainer._save_scaler": Trainer._save_scaler,
    "TrainerState.compute_steps": TrainerState.compute_steps,
    "Trainer._save": Trainer._save,
    "Trainer._clip_grad_norm": Trainer._clip_grad_norm,
    "Trainer._init_training_state": Trainer._init_training_state,
    "Trainer._load_from_checkpoint": Trainer._load_from_checkpoint,
    "Trainer._load_best_model": Trainer._load_best_model,
    "Trainer.remove_callback": Trainer.remove_callback,
    "SyncRefModelCallback.__init__": SyncRefModelCallback.__init__,
    "SyncRefModelCallback.sync_target_model": SyncRefModelCallback.sync_target_model,
    "TrlParser.parse_args_and_config": TrlParser.parse_args_and_config,
    "TrlParser.set_defaults_with_config": TrlParser.set_defaults_with_config,
    "_set_pg_timeout": _set_pg_timeout,
    "add_fused_lm_head": add_fused_lm_head,
    "create_model_from_path": grpo_trainer.create_model_from_path,
    "print_prompt_completions_sample": grpo_trainer.print_prompt_completions_sample,
    "disable_gradient_checkpointing": disable_gradient_checkpointing,
    "is_async_callable": is_async_callable,
    "maybe_gather_lm_head_ctx": maybe_gather_lm_head_ctx,
    "use_adapter": use_adapter,
    "AttentionInterface.get_interface": AttentionInterface.get_interface,
    "load_balancing_loss_func": load_balancing_loss_func,
    **{
        f"scripts.{script.__name__.split('.')[-1]}.main": script.main for script in (sft, dpo, grpo, kto, reward, rloo)
    },
}
# Method of the parent: the class whose source must call it on itself
CALLED = {
    "_prepare_dataset": DPOTrainer,
    "_compute_loss": DPOTrainer,
    "_set_signature_columns_if_needed": Trainer,
    "create_model_card": DPOTrainer,
    "_calculate_rewards": GRPOTrainer,
    "_generate_and_score_completions": GRPOTrainer,
    "_get_per_token_logps_and_entropies": GRPOTrainer,
    "_iter_named_params": VLLMGeneration,
    "_load_optimizer_and_scheduler": Trainer,
    "create_optimizer": Trainer,
    "get_decay_parameter_names": Trainer,
    "get_optimizer_cls_and_kwargs": Trainer,
    "save_model": Trainer,
    "_get_output_dir": Trainer,
    "_push_from_checkpoint": Trainer,
    "_run_epoch": Trainer,
    "_save_checkpoint": Trainer,
    "_save_optimizer_and_scheduler": Trainer,
    "_save_rng_state": Trainer,
    "_save_scaler": Trainer,
    "_save": Trainer,
    "_clip_grad_norm": Trainer,
    "_init_training_state": Trainer,
    "_load_from_checkpoint": Trainer,
    "_load_best_model": Trainer,
    "sync_target_model": SyncRefModelCallback,
    "set_defaults_with_config": TrlParser,
}


def signature(function) -> list[str]:
    """Names and kinds of the parameters, and whether they have a default."""
    parameters = inspect.signature(function).parameters.values()
    return [f"{p.name}:{p.kind.name}{'' if p.default is p.empty else '=...'}" for p in parameters]


def calls_on_self(owner: type) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    return {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name) and node.func.value.id == "self"
    }  # fmt: skip


@pytest.mark.parametrize("name", USED)
def test_signature_is_the_recorded_one(name):
    assert signature(USED[name]) == json.loads(RECORDED.read_text())[name]


@pytest.mark.parametrize("make_mask", [masking_utils.sdpa_mask, masking_utils.eager_mask], ids=lambda f: f.__name__)
def test_a_mask_is_made_from_these(make_mask):
    """By keyword, so that what stands beside them, another thing with every minor version, is no matter."""
    said = signature(make_mask)
    assert {"mask_function:POSITIONAL_OR_KEYWORD=...", "kwargs:VAR_KEYWORD"} <= set(said)
    assert make_mask is masking_utils.eager_mask or "allow_is_causal_skip:POSITIONAL_OR_KEYWORD=..." in said


@pytest.mark.parametrize("name", CALLED)
def test_parent_still_calls_it(name):
    assert name in calls_on_self(CALLED[name])


@pytest.mark.parametrize("script", [sft, dpo, grpo, kto, reward, rloo], ids=lambda script: script.__name__)
def test_scripts_take_their_trainer_from_the_package_when_they_run(script):
    """There they find it with checkpoints that are whole."""
    name = _TRAINERS[script.__name__.split(".")[-1]]
    assert f"    from trl import {name}," in inspect.getsource(script.main) and not hasattr(script, name)
    assert "    from datasets import load_dataset\n" in inspect.getsource(script.main)


def test_loss_reads_what_we_hand_it():
    """`_compute_loss` passes unknown inputs to the model, reads reference sums from the batch when told, and records
    the metrics that we overwrite."""
    source = inspect.getsource(DPOTrainer._compute_loss)
    for text in (
        "fused_lm_head=True", "self.precompute_ref_logps", '"ref_chosen_logps"', '"ref_rejected_logps"',
        "outputs.log_probs", "outputs.entropy", "outputs.mean_logits", "outputs.is_top1", "outputs.aux_loss",
        '["logps/chosen"].append', '["logps/rejected"].append', "_non_model_keys",
    ):  # fmt: skip
        assert text in source, text
    assert source.count("model(**model_kwargs, labels=labels, fused_lm_head=True)") == 1


def test_trainer_attributes_we_set_and_read():
    source = inspect.getsource(DPOTrainer)
    assert "self._signature_columns = [" in inspect.getsource(DPOTrainer._set_signature_columns_if_needed)
    for text in (
        "self.precompute_ref_logps = args.precompute_ref_log_probs", "self._metrics = {", "self.ref_model =",
        "self.loss_types = args.loss_type", "self.loss_weights = ", "zip(self.loss_types, self.loss_weights",
    ):  # fmt: skip
        assert text in source, text
    assert {"_tag_names", "_name", "_paper"} <= set(dir(DPOTrainer))
    for field in ("precompute_ref_log_probs", "padding_free", "use_weighting", "f_divergence_type", "loss_type"):
        assert field in DPOConfig.__dataclass_fields__


def test_attention_masks_are_made_of_a_function():
    """What `attention_masks_changed_by` replaces is looked up for each mask and given a function and this keyword."""
    for name in ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"):
        source = inspect.getsource(getattr(masking_utils, name))
        for text in (
            "ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]", "mask_function=mask_factory_function",
            "allow_is_causal_skip=allow_is_causal_skip",
        ):  # fmt: skip
            assert text in source, (name, text)
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._local_mapping == {}


def test_policy_loss_reads_what_we_hand_it():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    for text in ("advantages.dim() == 1", "self.beta != 0.0", 'inputs["num_items_in_batch"]', "old_per_token_logps"):
        assert text in source, text
    assert "_compute_loss(model, inputs)" in inspect.getsource(GRPOTrainer.compute_loss)
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for text in ('"advantages": advantages', 'output["ref_per_token_logps"]', 'output["old_per_token_logps"]'):
        assert text in source, text
    assert "num_generations < 2" in inspect.getsource(GRPOConfig.__post_init__)


def test_reference_is_the_second_model_that_is_loaded():
    """`reference_built_by` replaces that load, or the only one of a policy that is handed over as a model."""
    source = inspect.getsource(GRPOTrainer.__init__)
    policy, reference = "model = create_model_from_path(model, **", "self.ref_model = create_model_from_path("
    assert source.count("create_model_from_path(") == 2 and 0 < source.index(policy) < source.index(reference)
    # What is done to a model before the reference is built, and after
    assert source.index("add_fused_lm_head(") > source.index(reference) > source.index("super().__init__(")


def test_stop_tokens_and_logged_advantages_are_those_we_set():
    source = inspect.getsource(GRPOTrainer)
    for text in (
        "torch.isin(completion_ids, torch.tensor(self.eos_token_ids",
        "generation_kwargs.update(args.generation_kwargs)",
        'self._logs["advantages"].extend(all_process_advantages', '["frac_reward_zero_std"].append',
    ):  # fmt: skip
        assert text in source, text


def test_log_prints_completions_by_the_name_we_replace():
    source = inspect.getsource(GRPOTrainer.log)
    assert source.count("print_prompt_completions_sample(") == 1 and 'self._logs["rewards"],' in source


def test_rollouts_are_kept_and_counted_as_we_restore_them():
    source = inspect.getsource(GRPOTrainer)
    for text in (
        "self._step = 0", "self._buffered_inputs = None", "self._step += 1", "sampler_fn=self._get_train_sampler",
        "self._step % generate_every == 0 or self._buffered_inputs is None", "logs.update(metrics)", "self._logs = {",
        "self.args.gradient_accumulation_steps % generate_every != 0", "self.eos_token_ids",
        "self.num_generations_eval",
    ):  # fmt: skip
        assert text in source, text
    loop = inspect.getsource(Trainer)
    assert loop.count("self.control.should_training_stop") >= 3
    assert "self._load_optimizer_and_scheduler(resume_from_checkpoint)" in loop
    assert "randperm(self.num_samples, generator=self.generator)" in inspect.getsource(RepeatSampler.__iter__)


def test_reward_trainer_leaves_its_loss_to_the_logits_and_returns_the_outputs():
    """Where `EPRewardTrainer` adds the homeostasis objective, and why the stock trainer leaves it out."""
    source = inspect.getsource(RewardTrainer.compute_loss)
    for text in ("outputs.logits", "return (loss, outputs) if return_outputs else loss"):
        assert text in source, text
    assert "outputs.loss" not in source
    assert "self.create_model_card(" in inspect.getsource(RewardTrainer._save_checkpoint)
    assert {"compute_loss", "log"} <= calls_on_self(Trainer)
    source = inspect.getsource(RewardTrainer.__init__)
    for text in ('model.config, "num_labels"', "config.get_text_config().pad_token_id ="):
        assert text in source, text


def test_fused_head_reads_the_weight_of_the_output_embeddings_and_does_not_call_them():
    """Why an `EPHead` is refused there."""
    source = inspect.getsource(add_fused_lm_head)
    assert "lm_head = self.get_output_embeddings()" in source and "lm_head.weight" in source
    assert "lm_head(" not in source.replace("add_fused_lm_head(", "").replace("fused_lm_head(", "")


def test_transformers_initialises_and_composes_as_the_classifier_expects():
    from transformers import initialization

    assert list(inspect.signature(initialization.copy_).parameters) == ["tensor", "other"]
    composes = inspect.getsource(PreTrainedConfig)
    assert "sub_configs_defaults" in composes or "sub_configs: ClassVar" in composes
    source = inspect.getsource(PreTrainedModel)
    for text in ("_keep_in_fp32_modules_strict", "supports_gradient_checkpointing", "def _init_weights(self, module)"):
        assert text in source, text
    assert "accepts_loss_kwargs" in inspect.getsource(Trainer)


def test_saving_leaves_out_ignored_keys():
    source = inspect.getsource(PreTrainedModel.save_pretrained)
    assert "self._keys_to_ignore_on_save" in source


def test_attention_blocks_ask_the_interface_on_each_call():
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(LlamaAttention.forward)


def test_fused_output_has_the_fields_we_extend():
    from trl_ext._upstream import FusedCausalLMOutput

    fields = ["loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss"]
    assert list(FusedCausalLMOutput.__dataclass_fields__) == fields


def test_optimizers_are_looked_up_in_the_tables_we_add_to():
    from transformers import TrainingArguments
    from transformers import trainer as trainer_module
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
    from transformers.training_args import OptimizerNames

    source = inspect.getsource(Trainer.get_optimizer_cls_and_kwargs)
    assert "_OPTIMIZER_HANDLERS.get(args.optim)" in source and "unsupported optimizer" in source
    assert "OptimizerNames(self.optim)" in inspect.getsource(TrainingArguments.__post_init__)
    assert set(OptimizerNames) <= set(_OPTIMIZER_HANDLERS)
    assert {"args", "model", "optim_args"} <= set(OptimizerContext.__dataclass_fields__)
    for table in ("_member_names_", "_member_map_", "_value2member_map_"):
        assert len(getattr(OptimizerNames, table)) == len(list(OptimizerNames))
    assert "DEFAULT_CALLBACKS + " in inspect.getsource(Trainer.__init__)
    assert isinstance(trainer_module.DEFAULT_CALLBACKS, list)
    # `progress_shown_by` replaces both
    assert "PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK" in inspect.getsource(
        Trainer.__init__
    )
    # Called without an instance
    assert "self." not in inspect.getsource(Trainer.get_decay_parameter_names)


def test_optimizers_are_still_replaced_as_our_check_says():
    from accelerate import Accelerator
    from transformers.integrations import deepspeed

    assert "trainer.optimizer = None" in inspect.getsource(deepspeed.deepspeed_init)
    assert 'if "optimizer" in config' in inspect.getsource(deepspeed.deepspeed_optim_sched)
    source = inspect.getsource(Accelerator._prepare_deepspeed)
    assert "map_pytorch_optim_to_deepspeed(optimizer)" in source and "zero_force_ds_cpu_optimizer" in source
    source = inspect.getsource(Trainer.create_optimizer)
    assert "optimizer_cls()(opt_model, **optimizer_kwargs)" in source


def test_the_device_of_training_arguments_is_what_we_set(tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    args._setup_devices = numbered = torch.device("cpu:0")
    assert args.device == numbered
    with cpu_without_number(args):
        assert args.device == torch.device("cpu")
    assert args.device == numbered


def test_versions_are_those_claimed():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *extras["peft"], extras["deepspeed"][0]]):
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement


def test_a_trl_without_what_the_trainers_extend_is_named(monkeypatch):
    from trl_ext import _upstream

    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.9.0")
    with pytest.raises(ImportError, match=r"extend TRL 1.15 or newer, and trl==1.9.0 is installed.*run with it"):
        _ = _upstream.FusedCausalLMOutput
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.100.0")
    _upstream.require_trl()


if __name__ == "__main__":
    RECORDED.write_text(json.dumps({name: signature(used) for name, used in USED.items()}, indent=1) + "\n")
