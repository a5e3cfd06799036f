"""`trl-ext plan`: sizes counted on the meta device, the table of memory by hand, and the command."""

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from trl_ext import EPHead, cli
from trl_ext.plan.architecture import measure
from trl_ext.plan.command import GIB, fits
from trl_ext.plan.memory import ENGINES, Part, Work, need
from trl_ext.plan.of_recipe import plan_of
from trl_ext.scripts.recipe.stand_ins import light_parser


CONFIG = LlamaConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    vocab_size=100, tie_word_embeddings=False,
)  # fmt: skip


def test_sizes_are_those_of_the_model():
    sizes = measure(CONFIG, torch.float32, batch=2, length=8)
    model = LlamaForCausalLM(CONFIG)
    count = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert (sizes.parameters, sizes.trained, sizes.layer, sizes.outside) == (count, count, layer, count - 3 * layer)
    assert (sizes.num_layers, sizes.hidden_size, sizes.vocab_size, sizes.cache_width) == (3, 32, 100, 2 * 2 * 8)
    # The same, of the real model: what autograd keeps, without weights
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.model(torch.ones((2, 8), dtype=torch.long))[0]
    found = sum(storage.nbytes() for storage in kept.values())
    assert states is not None and sizes.activations(2, 8, checkpointed=False) == pytest.approx(found, rel=0.1)
    inputs = 2 * 8 * 32 * 4
    assert sizes.activations(2, 8, checkpointed=True) == sizes.kept_outside + 3 * inputs + 3 * sizes.kept_by_layer


def test_adapters_are_counted_and_a_wide_model_is_not_built():
    from peft import LoraConfig

    # Qwen3-4B: its parameters and those of its adapters, of rank 32 on all seven matrices, by hand
    config = Qwen3Config(
        hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=9728, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    sizes = measure(config, torch.bfloat16, 4, 2048, LoraConfig(r=32, target_modules=names, task_type="CAUSAL_LM"))
    shapes = [(2560, 4096), (2560, 1024), (2560, 1024), (4096, 2560), (2560, 9728), (2560, 9728), (9728, 2560)]
    adapters = 36 * 32 * sum(a + b for a, b in shapes)
    base = 151936 * 2560 + 36 * (sum(a * b for a, b in shapes) + 2 * 2560 + 2 * 128) + 2560
    assert (sizes.trained, sizes.parameters) == (adapters, adapters + base)
    assert 0.3 * GIB < sizes.kept_by_layer < 4 * GIB


def test_the_table_by_hand():
    policy = Part("policy", 1000, 1000, 4, outside=200, layer=100, gathers=2)
    reference = Part("reference", 1000, 0, 4, outside=200, layer=100)
    masks = Part("masks", 10, 10, 4, shardable=False)
    work = Work(activations=500, method=70, accumulation=3)
    found = {engine: need(engine, [policy, reference, masks], work, 4) for engine in ENGINES}
    rows = {name: (n.weights, n.gradients, n.optimizer, n.buffers, n.work) for name, n in found.items()}
    assert rows == {
        # Float32 weights; a bucket of gradients, and autocast's copies of what is trained
        "DDP": (8040, 4040, 8080, 4040 + 2020, 570),
        "ZeRO-1": (4020, 2020, 16 * 1000 // 4 + 16 * 10 // 4, 2020, 570),
        "ZeRO-2": (4020, 500 + 5, 4040, 2020, 570),
        # What is small is not divided; ZeRO-3 keeps gathered weights, of the reference too
        "ZeRO-3": (500 + 500 + 20, 505, 4040, 2020 + 4000, 570),
        "FSDP2": (1000 + 1000 + 40, 1010, 2020, 2 * 400 * 2, 570),
    }
    assert found["DDP"].total == sum(rows["DDP"])
    # Three quarters of what goes round the ring: all-reduce of gradients; gathers in each of three micro-steps
    assert found["DDP"].sent == 2 * 4000 * 3 // 4 + 2 * 40 * 3 // 4
    assert found["ZeRO-3"].sent == 3 * (4000 + 2000) * 3 // 4 + 3 * 2000 * 3 // 4 + 3 * 20 * 3 // 4
    assert need("DDP", [policy], work, 1).sent == 0 and need("DDP", [policy], work, 1).buffers == 2000
    # A generation's cache counts where it is more than gradients and activations together
    assert need("DDP", [policy], Work(500, generation=9000), 1).work == 9000 - 4000
    with pytest.raises(ValueError, match="`engine` must be one of DDP"):
        need("ZeRO-4", [policy], work, 4)


def test_a_critic_apart_is_a_backbone_with_activations_of_its_own(tmp_path):
    def plan(critic):
        parser = light_parser(cli.TRAINING_COMMANDS["constrained-ppo"])
        parser.check([
            "--model_name_or_path", "x", "--dataset_name", "x", "--reward_funcs", "a.b", "--method", "ppo", "--critic",
            critic, "--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false",
        ])  # fmt: skip
        return plan_of(parser.parsed, "constrained_ppo", lambda name: CONFIG, 64)

    shared, apart = plan("shared"), plan("separate")
    (critic,) = [part for part in apart.parts if part.name == "critic"]
    assert critic.parameters == critic.trained == LlamaForCausalLM(CONFIG).model.num_parameters()
    assert critic.outside == CONFIG.vocab_size * CONFIG.hidden_size + CONFIG.hidden_size  # embeddings and last norm
    assert not [part for part in shared.parts if part.name == "critic"]
    sizes = measure(CONFIG, torch.float32, shared.batch, shared.length)
    backbone = sizes.activations(shared.batch, shared.length, checkpointed=False)
    assert apart.work.activations - shared.work.activations == pytest.approx(backbone, rel=0.2)


def test_the_command(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path / "model")
    recipe = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": "x", "bf16": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["plan", "--config", str(tmp_path / "recipe.yaml"), "--gpus", "2", "--memory", "8"]
    assert cli.main(arguments) == 2
    assert "`--command`" in capsys.readouterr().err
    assert cli.main([*arguments, "--command", "sparse-po", "--max_length", "64"]) == 0
    out = capsys.readouterr().out
    assert all(engine in out for engine in ENGINES) and "One GPU of this size does, with DDP" in out
    assert "reference" in out and "masks" in out and max(map(len, out.splitlines()[2:-2])) <= 80
    assert cli.main([*arguments, "--command", "constrained-ppo", "--reward_funcs", "a.b", "no/model"]) == 0
    out = capsys.readouterr().out
    assert "value heads" in out and "no/model is not counted" in out and "Prompts of 512 tokens" in out
    head = EPHead(32, [24, 16], 1, feedback="asymmetric")
    size = sum(parameter.numel() for parameter in head.parameters())
    layers = ["--head_hidden_features", "24", "16", "--head_feedback", "asymmetric"]
    assert cli.main([*arguments, "--command", "equilibrium-reward", *layers]) == 0
    assert f"head {size / 1000:.3g}K" in capsys.readouterr().out
    assert cli.main([*arguments, "--command", "sft", "--model_name_or_path", str(tmp_path / "none")]) == 2
    assert "a folder with its `config.json`" in capsys.readouterr().err
    assert fits(5.9 * GIB, 8) and not fits(6.2 * GIB, 8)
