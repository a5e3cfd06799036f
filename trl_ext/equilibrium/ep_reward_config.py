from dataclasses import dataclass, field

from trl import RewardConfig

from .feedback import check_homeostasis


@dataclass
class EPRewardConfig(RewardConfig):
    r"""
    Configuration of [`EPRewardTrainer`]: [`~trl.RewardConfig`] with two fields more.

    Parameters:
        homeostasis_coef (`float`, *optional*):
            Weight of the Jacobian homeostasis objective, which brings asymmetric feedback weights towards the
            transposed forward ones. Defaults to the model's own, `config.homeostasis_coef`.
        head_learning_rate (`float`, *optional*):
            Learning rate of the head, whose weights are new and whose feedback, if asymmetric, has to be straightened,
            where `learning_rate` is one for fine-tuning the backbone. Defaults to `learning_rate`.
    """

    homeostasis_coef: float | None = field(
        default=None, metadata={"help": "Weight of the homeostasis objective. Defaults to the model's."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the head. Defaults to `learning_rate`."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_homeostasis_coef(self.homeostasis_coef)
        check_head_learning_rate(self.head_learning_rate)


def check_homeostasis_coef(value: float | None) -> None:
    """
    Refuses a weight that no feedback can use; `None` is the model's own.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if value is not None:
        check_homeostasis(value, "asymmetric")


def check_head_learning_rate(value: float | None) -> None:
    """
    Refuses a learning rate of the head that nothing can learn with; `None` is that of the backbone.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(
            f"`head_learning_rate` must be positive and finite, got {value}. Leave it out to use `learning_rate`."
        )
