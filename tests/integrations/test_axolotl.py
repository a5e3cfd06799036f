"""axolotl's plugin without axolotl: its hooks on configurations, and its trainers with stand-ins of axolotl's mixins.
`python -m tests.integrations.axolotl_run` runs it in axolotl itself."""

import dataclasses
import pickle
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
from transformers import Trainer
from transformers.training_args import OptimizerNames
from trl import DPOConfig, GRPOConfig

from tests.helpers.tiny import tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext import _upstream
from trl_ext.integrations import axolotl
from trl_ext.integrations.axolotl import TRLExtArgs, TRLExtPlugin, trainers
from trl_ext.integrations.axolotl.methods import METHODS
from trl_ext.optim import AdamP, unregister


# Hooks of axolotl 0.19.0 that the plugin has, with their arguments
HOOKS = {
    "register": ["cfg"], "on_config_validation_error": ["cfg"], "get_input_args": [], "get_trainer_cls": ["cfg"],
}  # fmt: skip
SPARSE_PO = {"rl": "dpo", "trl_ext": {"method": "sparse_po", "mask_type": "learned"}}


@pytest.fixture
def plugin():
    own = TRLExtPlugin()
    yield own
    own.on_config_validation_error({})
    assert "adamp" not in OptimizerNames._value2member_map_


def arguments_of(function):
    return list(function.__code__.co_varnames[1 : function.__code__.co_argcount])


def test_hooks_are_those_of_the_interface():
    own = {name: value for name, value in vars(TRLExtPlugin).items() if callable(value) and name[0] != "_"}
    assert {name: arguments_of(hook) for name, hook in own.items()} == HOOKS
    if find_spec("axolotl"):
        from axolotl.integrations.base import BasePlugin

        assert issubclass(TRLExtPlugin, BasePlugin)
        assert {name: arguments_of(getattr(BasePlugin, name)) for name in HOOKS} == HOOKS
    module, _, name = TRLExtPlugin().get_input_args().rpartition(".")
    assert module == axolotl.__name__ and getattr(axolotl, name) is TRLExtArgs
    assert TRLExtArgs(trl_ext={"method": "sparse_po"}).trl_ext == {"method": "sparse_po"}
    with pytest.raises(AttributeError, match="TRLExtPlugin"):
        _ = axolotl.TRLExtPlugins


def test_names_of_optimizers_are_valid_after_register_alone(plugin):
    with pytest.raises(ValueError, match="adamp"):
        DPOConfig("x", optim="adamp", report_to="none", use_cpu=True, bf16=False)
    plugin.register({"optimizer": "adamp", "optim_args": {"delta": 0.2, "nesterov": True}})
    args = DPOConfig("x", optim="adamp", optim_args="delta=0.2", report_to="none", use_cpu=True, bf16=False)
    _, options = Trainer.get_optimizer_cls_and_kwargs(args)
    assert options["optimizer_cls"] is AdamP and options["delta"] == 0.2
    assert plugin.get_trainer_cls({"optimizer": "adamp"}) is None


@pytest.mark.parametrize(("name", "method"), METHODS.items())
def test_the_trainer_of_a_method_is_chosen(plugin, name, method):
    cfg = {method.key: method.value, "trl_ext": {"method": name}}
    plugin.register(cfg)
    path = f"trl_ext.integrations.axolotl.trainers.Axolotl{method.trainer}"
    assert cfg.get("trainer_cls") == (path if method.key == "rl" else None)
    plugin.register(cfg)  # axolotl does it again in each of Ray's workers
    assert cfg.get("trainer_cls") == (path if method.key == "rl" else None)


REFUSED = {
    "no method": ({"trl_ext": {"mask_type": "learned"}}, "`trl_ext.method=None` must be one of sparse_po, "),
    "no mapping": ({"trl_ext": "sparse_po"}, "`trl_ext: sparse_po` must be a mapping"),
    "other branch": ({**SPARSE_PO, "rl": "kto"}, "`trl_ext.method='sparse_po'` needs `rl: dpo`, got 'kto'"),
    "no reward model": ({"trl_ext": {"method": "ep_reward"}}, "needs `reward_model: true`, got None"),
    "unknown field": (
        {"rl": "dpo", "trl_ext": {"method": "sparse_po", "mask_typ": "x"}}, "`trl_ext.mask_typ`.*mean `mask_type`"
    ),
    "two trainers": ({**SPARSE_PO, "trainer_cls": "mine.Trainer"}, "`trainer_cls: mine.Trainer` and `trl_ext.method`"),
    "axolotl's optimizer": ({**SPARSE_PO, "optimizer": "muon"}, "`optimizer: muon` is built by axolotl's own"),
    "wrong option": ({"optimizer": "adamp", "optim_args": {"delt": 1}}, "`optim_args: delt=1`.*did you mean `delta`"),
    "own groups": ({"optimizer": "adamp", "lr_groups": [{}]}, "`lr_groups` makes parameter groups.*`optimizer: ada"),
    "own groups of a method": ({**SPARSE_PO, "loraplus_lr_ratio": 16}, "`loraplus_lr_ratio`.*`trl_ext.method`"),
}  # fmt: skip


@pytest.mark.parametrize(("cfg", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_registered(plugin, cfg, message):
    cfg = dict(cfg)
    with pytest.raises(ValueError, match=message):
        plugin.register(cfg)
    assert "adamp" not in OptimizerNames._value2member_map_ and cfg.get("trainer_cls") in (None, "mine.Trainer")


def test_an_old_trl_is_named_in_one_sentence_and_the_optimizers_work(plugin, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.9.0")
    with pytest.raises(ImportError, match=r"extend TRL 1\.15 or newer, and trl==1\.9\.0 is installed"):
        plugin.register(dict(SPARSE_PO))
    plugin.register({"optimizer": "sgdp"})
    plugin.register({"reward_model": True, "trl_ext": {"method": "ep_reward"}})
    assert "sgdp" in OptimizerNames._value2member_map_


@pytest.fixture
def stand_ins(monkeypatch):
    """axolotl's mixins, with one field that its own trainers read, and its manager of plugins."""

    @dataclass
    class AxolotlTrainingMixins:
        cosine_min_lr_ratio: float | None = None

    class SchedulerMixin(Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.ratio_seen = self.args.cosine_min_lr_ratio
            return super().create_scheduler(num_training_steps, optimizer)

    manager = SimpleNamespace(cfg={})
    modules = {
        "axolotl.integrations.base": {"PluginManager": SimpleNamespace(get_instance=lambda: manager)},
        "axolotl.core.training_args": {"AxolotlTrainingMixins": AxolotlTrainingMixins},
        "axolotl.core.trainers.mixins": {
            "SchedulerMixin": SchedulerMixin, "DistributedParallelMixin": type("Distributed", (Trainer,), {}),
        },
    }  # fmt: skip
    for name, content in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, sys.modules.get(module.__name__, module))
        vars(sys.modules[name]).update(content)
    yield SimpleNamespace(manager=manager, mixins=AxolotlTrainingMixins)
    trainers._config_class.cache_clear()
    trainers._trainer_class.cache_clear()


COMMON = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "gradient_checkpointing": False}


def config_class(stand_ins, parent):
    return dataclass(type(f"Axolotl{parent.__name__}", (stand_ins.mixins, parent), {}))


def test_sparse_po_trains_from_what_axolotl_hands_it(stand_ins, plugin, tmp_path):
    cfg = {**SPARSE_PO, "optimizer": "adamp"}
    plugin.register(cfg)
    stand_ins.manager.cfg = cfg
    module, _, name = cfg["trainer_cls"].rpartition(".")
    trainer_cls = getattr(sys.modules[module], name)
    args = config_class(stand_ins, DPOConfig)(
        str(tmp_path), optim="adamp", beta=0.25, max_steps=1, per_device_train_batch_size=2, max_length=64,
        cosine_min_lr_ratio=0.5, **COMMON,
    )  # fmt: skip
    trainer = trainer_cls(
        tiny_model(),
        tiny_model(),
        args=args,
        train_dataset=tiny_pairs(4),
        processing_class=tiny_tokenizer(),
        callbacks=[],
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, AdamP) and trainer.ratio_seen == 0.5
    assert type(trainer.args).__name__ == "AxolotlSparsePOConfig" and trainer.args.mask_type == "learned"
    assert trainer.args.beta == 0.25 and trainer.args.max_steps == 1
    assert pickle.loads(pickle.dumps(trainer.args)).to_dict() == trainer.args.to_dict()  # training_args.bin
    assert "sparse_po" not in trainers.__dict__ and not hasattr(trainers, "AxolotlTrainer")


def test_configuration_of_constrained_ppo_from_axolotls(stand_ins, tmp_path):
    """TRL's own numbers of a rollout are not taken for given ones, and defaults of the method's own stay."""
    config = trainers.AxolotlConstrainedPPOConfig
    args = config_class(stand_ins, GRPOConfig)(
        str(tmp_path), per_device_train_batch_size=4, num_generations=2, temperature=0.5, **COMMON
    )
    settings = {"num_generations": 1, "constraints": [{"reward": 0, "threshold": 0.5}], "kl_coef": 0.1}
    own = trainers.arguments_of(args, config, settings)
    assert (
        own.num_generations == 1
        and own.temperature == 0.5
        and own.kl_coef == 0.1
        and own.gae_lambda == config.gae_lambda
    )
    assert own.disable_dropout == config.disable_dropout != args.disable_dropout
    assert own.generation_batch_size == 4 and own.steps_per_generation == 1
    own = trainers.arguments_of(args, config, settings, generation_batch_size=8)
    assert own.generation_batch_size == 8 and own.steps_per_generation == 2

    @dataclass
    class Longer(GRPOConfig):
        context_parallel_size: int | None = None

    given = dataclasses.asdict(args) | {"generation_batch_size": None, "cosine_min_lr_ratio": None}
    given = {field.name: given[field.name] for field in dataclasses.fields(GRPOConfig) if field.init}
    with pytest.raises(ValueError, match="`context_parallel_size=2`, set by axolotl, is no field of `Axo"):
        trainers.arguments_of(Longer(**given, context_parallel_size=2), config, settings)


def test_old_trl_is_the_one_of_the_other_entry_points():
    assert _upstream.OLDEST_TRL == "1.15"
    unregister()
