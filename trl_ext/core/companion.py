"""A companion: a module of ours that lives inside the policy without becoming part of it.

Token masks, value heads and a separate critic are trained together with a policy and belong to the method, not to the
model that is published. As a submodule that runs inside the policy's forward, a companion is synchronised by DDP and
owned by DeepSpeed and FSDP like any layer. [`CompanionMixin`] sees to the rest of its life:

    attached after `super().__init__()`   attach_companion: submodule, wider forward, refused where it would be lost
    trained in groups of its own          create_optimizer: last, so that the logged learning rate is the policy's
    stripped from every saved model       attach_companion: `_keys_to_ignore_on_save`, and `state_dict()`
    kept beside it                        save_model: one safetensors file, whole tensors in float32
    restored first                        _load_from_checkpoint, _load_best_model: refused before anything changes
"""

import functools
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, Trainer

from .._upstream import SyncRefModelCallback, gathered_state_dict, keep_from_vllm
from .converted_weights import restore_converted_weights
from .parameter_groups import move_to_own_groups
from .recorder import Forward, extend_forward


class Companion:
    """
    A module that is trained inside a policy and kept beside it.

    Args:
        name (`str`):
            Name of the submodule in the policy; no parameter of the policy may have it in its name.
        module (`torch.nn.Module`):
            The module.
        file (`str`):
            Name of its safetensors file beside a saved policy.
        description (`str`):
            What it is, in the plural or as a mass, for errors: `"learned masks"`.
        learning_rate (`float`, *optional*):
            Its learning rate. Defaults to the policy's.
    """

    def __init__(self, name: str, module: nn.Module, file: str, description: str, learning_rate: float | None = None):
        self.name, self.module, self.file = name, module, file
        self.description, self.learning_rate = description, learning_rate

    @property
    def kept(self) -> nn.Module:
        """The part of the module that is saved. Defaults to all of it."""
        return self.module

    def metadata(self) -> dict[str, str]:
        """What the file says beside the tensors. Defaults to nothing."""
        return {}

    def without_former_tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A file's tensors without those that only earlier versions had. Defaults to all."""
        return state

    def check_metadata(self, saved: dict[str, str], path: Path) -> None:
        """
        Refuses a file of another kind. Defaults to one whose metadata differ.

        Args:
            saved (`dict[str, str]`):
                What [`Companion.metadata`] was when the file was written.
            path (`Path`):
                The file.

        Raises:
            ValueError: If it cannot be restored into this companion.
        """
        for name, value in self.metadata().items():
            if saved.get(name) != value:
                raise ValueError(
                    f"The {self.description} in {path} were trained with `{name}={saved.get(name)}`, and this run has "
                    f"`{name}={value}`. Set it to the checkpoint's value, or start a new run."
                )

    def parameter_groups(
        self, named: Iterable[tuple[str, nn.Parameter]]
    ) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """
        Parameters with their weight decay.

        Args:
            named (`Iterable[tuple[str, nn.Parameter]]`):
                Trainable parameters, named from the module.

        Returns:
            `Sequence[tuple[Sequence[nn.Parameter], float]]`: by default one group without decay.
        """
        return [([parameter for _, parameter in named], 0.0)]

    def own_parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Its trainable parameters in a model, whatever wraps that, named from the module."""
        own = f"{self.name}."
        named = ((name.partition(own), p) for name, p in model.named_parameters() if p.requires_grad)
        return [(parts[2], parameter) for parts, parameter in named if parts[1]]

    def save(self, folder: str | Path, write: bool) -> None:
        """
        Writes the file; nothing where nothing is kept.

        Args:
            folder (`str` or `Path`):
                Folder of the policy; made where missing.
            write (`bool`):
                Whether this process writes. All processes must call this, since sharded tensors are gathered.
        """
        state = gathered_state_dict(self.kept)
        if state and write:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(state, Path(folder) / self.file, metadata=self.metadata() or None)

    def load(self, folder: str | Path) -> None:
        """
        Restores what [`Companion.save`] wrote, in place; nothing where nothing is kept.

        Args:
            folder (`str` or `Path`):
                Checkpoint, or folder of a saved policy.

        Raises:
            ValueError: If the file is missing, or of a module of another kind or shape.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.kept.state_dict().items()}
        if not expected:
            return
        path = Path(folder) / self.file
        if not path.is_file():
            raise ValueError(
                f"The checkpoint {folder} has no {self.file}, so its {self.description} cannot be restored. Resume "
                f"from a checkpoint of a run with {self.description}, or train from its weights without "
                "`resume_from_checkpoint`."
            )
        state, saved = read_companion(path)
        self.check_metadata(saved, path)
        state = self.without_former_tensors(state)
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if expected != found:
            both = expected.keys() | found.keys()
            differing = sorted(name for name in both if expected.get(name) != found.get(name))
            shapes = [f"{name}: {found.get(name)} against {expected.get(name)}" for name in differing[:3]]
            raise ValueError(
                f"{path} holds other {self.description} ({'; '.join(shapes)}). Resume with the settings and models "
                "of the saved run."
            )
        self.kept.load_state_dict(state)


def read_companion(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Reads the file of a companion.

    Args:
        path (`str` or `Path`):
            File that [`Companion.save`] wrote.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, str]]`: tensors by name, and the metadata.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def base_policy(model: Any) -> PreTrainedModel:
    """The transformers model itself, without an adapter's wrapper; not for a model that an engine wraps."""
    return model.get_base_model() if is_peft_model(model) else model


class CompanionMixin(Trainer):
    """
    Base of a trainer, before TRL's, whose policy has a companion. Call [`CompanionMixin.attach_companion`] after
    `super().__init__()`: earlier, PEFT would freeze it. Where it is not called, the trainer is its parent.

    Example:

    ```python
    from torch import nn
    from trl import SFTTrainer
    from trl_ext.core.companion import Companion, CompanionMixin
    from trl_ext.core.recorder import ForwardRecorder, last_hidden_states

    class LengthSFTTrainer(CompanionMixin, SFTTrainer):
        '''Also learns, from each state, how many tokens are still to come.'''

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            head = nn.Linear(self.model.config.hidden_size, 1)
            head = Companion("length_head", head, "length_head.safetensors", "length heads")
            self.attach_companion(head, self.forward)

        def forward(self, forward, *args, with_length=False, **kwargs):
            if not with_length:
                return forward(*args, **kwargs)
            with last_hidden_states(self.policy) as states:
                output = forward(*args, **kwargs)
            mask = kwargs["attention_mask"]
            to_come = mask.flip(1).cumsum(1).flip(1).float()
            lengths = self.policy.length_head(states[0].float()).squeeze(-1)
            output.loss = 0.01 * ((lengths - to_come) * mask).square().sum() / mask.sum()
            return output

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            recorder = ForwardRecorder(model, {"with_length": True})
            result = super().compute_loss(recorder, inputs, return_outputs, **kwargs)
            loss, *rest = result if return_outputs else (result,)
            loss = loss + recorder.outputs[0].loss
            return (loss, *rest) if return_outputs else loss
    ```
    """

    companion: Companion

    @property
    def has_companion(self) -> bool:
        """Whether a companion is attached."""
        return hasattr(self, "companion")

    @property
    def policy(self) -> PreTrainedModel:
        """The transformers model that holds the companion, without the wrappers of engines and adapters."""
        return base_policy(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def attach_companion(self, companion: Companion, forward: Forward) -> None:
        """
        Puts a companion into the policy.

        Args:
            companion ([`Companion`]):
                The companion.
            forward (`Callable`):
                Called as `forward(inner, *args, **kwargs)` in place of the policy's forward `inner`; runs the
                companion, so that an engine gathers and synchronises its weights.

        Raises:
            ValueError: If the DeepSpeed config has an optimizer of its own, which would ignore the learning rate.
        """
        self.companion = companion
        policy = self.policy
        policy.add_module(companion.name, companion.module.to(policy.device))
        extend_forward(policy, forward, compiled=self.args.torch_compile)
        names = {f"{companion.name}.{name}" for name in companion.module.state_dict()}
        policy._keys_to_ignore_on_save = set(policy._keys_to_ignore_on_save or ()) | names
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # their checkpoints are made of it
            leave_out_of_state_dict(policy, companion.name)
        trained = any(parameter.requires_grad for parameter in companion.module.parameters())
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config if self.is_deepspeed_enabled else {}
        if trained and "optimizer" in config:
            raise ValueError(
                f"The DeepSpeed config has an `optimizer` block, which would train the {companion.description} at the "
                "policy's learning rate and weight decay. Remove the block: the optimizer then comes from `optim`."
            )
        if getattr(self, "use_vllm", False):
            keep_from_vllm(self.vllm_generation, f"{companion.name}.")
        if getattr(self.args, "sync_ref_model", False):
            self.remove_callback(SyncRefModelCallback)
            self.add_callback(_SyncWithoutCompanion(companion, self.ref_model, self.accelerator))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        given = self.optimizer is not None  # the policy's learning rate is then that optimizer's
        optimizer = super().create_optimizer(model)
        if not self.has_companion:
            return optimizer
        named = self.companion.own_parameters(self.model if model is None else model)
        rate = self.companion.learning_rate
        move_to_own_groups(
            optimizer,
            self.companion.parameter_groups(named),
            self.args.learning_rate if rate is None and not given else rate,
            tag=self.companion.name,
            scheduler=self.lr_scheduler,
        )
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.has_companion:
            self.companion.save(self.args.output_dir if output_dir is None else output_dir, self.args.should_save)
        super().save_model(output_dir, _internal_call=_internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if hasattr(self, "companion") and is_peft_model(model):
            # PEFT knows nothing of `_keys_to_ignore_on_save` and takes by name what an adapter trains, such as biases
            state = model.state_dict() if state_dict is None else state_dict
            state_dict = {name: tensor for name, tensor in state.items() if f"{self.companion.name}." not in name}
        super()._save(output_dir, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # First: a checkpoint without it is refused before anything is overwritten. FSDP restores its own shards
        if self.has_companion and not self.is_fsdp_enabled:
            self.companion.load(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            restore_converted_weights(self.policy, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.has_companion and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self.companion.load(str(self.state.best_model_checkpoint))
            restore_converted_weights(self.policy, str(self.state.best_model_checkpoint))


def leave_out_of_state_dict(model: nn.Module, name: str) -> None:
    """
    Makes `model.state_dict()` that of the model without a submodule, and lets `load_state_dict` miss nothing then.

    Args:
        model (`torch.nn.Module`):
            Model.
        name (`str`):
            Name of the submodule.
    """

    def leave_out(_model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}{name}.")]:
            del state[key]

    def expect_nothing(_model: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if name not in key.split(".")]

    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_post_hook(expect_nothing)


class _SyncWithoutCompanion(SyncRefModelCallback):
    """TRL's synchronisation of the reference model, over the policy's parameters without the companion."""

    def __init__(self, companion: Companion, ref_model: Any, accelerator: Any):
        super().__init__(ref_model=ref_model, accelerator=accelerator)
        self.sync_target_model = functools.partial(_sync_without, f"{companion.name}.")


def _sync_without(part: str, model: nn.Module, target_model: nn.Module, alpha: float) -> None:
    policy = types.SimpleNamespace(
        parameters=lambda: [parameter for name, parameter in model.named_parameters() if part not in name]
    )
    SyncRefModelCallback.sync_target_model(policy, target_model, alpha)
