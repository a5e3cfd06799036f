from dataclasses import dataclass, field

from trl import RewardConfig

from .feedback import check_homeostasis


@dataclass
class EPRewardConfig(RewardConfig):
    r"""
    Configuration of [`EPRewardTrainer`]: [`~trl.RewardConfig`] with one field more.

    Parameters:
        homeostasis_coef (`float`, *optional*):
            Weight of the Jacobian homeostasis objective, which brings asymmetric feedback weights towards the
            transposed forward ones. Defaults to the model's own, `config.homeostasis_coef`.
    """

    homeostasis_coef: float | None = field(
        default=None, metadata={"help": "Weight of the homeostasis objective. Defaults to the model's."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_homeostasis_coef(self.homeostasis_coef)


def check_homeostasis_coef(value: float | None) -> None:
    """
    Refuses a weight that no feedback can use; `None` is the model's own.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if value is not None:
        check_homeostasis(value, "asymmetric")
