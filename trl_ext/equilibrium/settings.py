"""Settings of an equilibrium-propagation head, explained and checked in this one place.

[`EPHead`] and [`EPConfig`] have them under these names, the recipes with the prefix `head_`, and the critic of
constrained PPO some of them with the prefix `critic_`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal

from ..core.checks import Range, check_value, shown
from .input_norm import InputNormName


FeedbackName = Literal["symmetric", "asymmetric"]
ActivationName = Literal["tanh", "dsilu", "sigmoid"]
EstimatorName = Literal["holomorphic", "symmetric", "one_sided", "tangent", "exact"]
CorrectionName = Literal["none", "asymep"]
OscillationName = Literal["raise", "warn"]
SpectralCap = float | str | None
AUTO = "auto"

_POSITIVE = Range(above=0, remedy="The default is a good start.")
RANGES: dict[str, Range] = {
    "feedback_angle": Range(at_least=0, at_most=180, remedy="It is in degrees."),
    "homeostasis_coef": Range(at_least=0, remedy="Set it to 0 to go without."),
    "max_steps": Range(at_least=1),
    "num_points": Range(at_least=1),
    "radius": _POSITIVE,
    "spectral_cap": Range(also=Any),
    "tolerance": _POSITIVE,
}


@dataclass(frozen=True)
class HeadSettings:
    """
    Settings of an [`EPHead`] besides its sizes of input and output.

    Args:
        hidden_features (`int` or `list[int]`, *optional*, defaults to `[256, 256]`):
            Widths of the relaxing layers, from the input to the output. An `int` is one layer, which has no
            recurrence.
        feedback (`str`, *optional*, defaults to `"symmetric"`):
            `"symmetric"`: a layer is fed back through the transposed forward weights, and the gradient is exact up to
            the size of the nudge. `"asymmetric"`: feedback has its own weights; the gradient is then biased, see
            `correction` and [`~EPHead.homeostasis_loss`].
        feedback_angle (`float`, *optional*, defaults to `0.0`):
            Angle in degrees between the initial feedback weights and the transposed forward weights, from 0 to 180.
            Only with asymmetric feedback.
        activation (`str`, *optional*, defaults to `"tanh"`):
            `"tanh"`, `"dsilu"` or the paper's `"sigmoid"`, `1 / (1 + exp(2 - 4u))`. All are complex-differentiable.
        estimator (`str`, *optional*, defaults to `"holomorphic"`):
            Of the gradient: `"holomorphic"`, `"symmetric"`, `"one_sided"`, `"tangent"` or `"exact"`; see
            [`Estimator`].
        num_points (`int`, *optional*, defaults to `2`):
            Points `N` of the holomorphic estimator, whose error is of the order `radius^N`.
        rotated (`bool`, *optional*, defaults to `True`):
            Whether the points start at the angle `pi / N`. With two points they are then purely imaginary, and the
            estimate is exact to float32.
        radius (`float`, *optional*, defaults to `1e-3`):
            Size of the nudge, which has unit norm in each row before it is scaled by `radius`.
        correction (`str`, *optional*, defaults to `"none"`):
            `"asymep"` removes the bias of asymmetric feedback
            ([Scurria et al., 2026](https://huggingface.co/papers/2602.03670)).
        tolerance (`float`, *optional*, defaults to `1e-4`):
            Relaxation ends when no activity changes by more in a sweep; for nudged states, no response by more of its
            largest entry.
        max_steps (`int`, *optional*, defaults to `100`):
            Most sweeps of a relaxation. Rows that need more are counted, and the first time warned of.
        spectral_cap (`float` or `str`, *optional*, defaults to `"auto"`):
            Bound on the singular values of each recurrent weight: the network runs with the projected weights, see
            [`cap_singular_values`]. `"auto"` is 0.98 times [`contraction_bound`], the largest below which every
            relaxation converges, from the number of layers and the activation: 0.98 for two layers of `tanh` or
            `sigmoid`, 0.69 for three, 0.57 for five. A number may be larger; `None` is no bound.
        input_norm (`str`, *optional*, defaults to `"none"`):
            `"center"` takes the running mean off each feature of the input, `"standardize"` divides it by the running
            standard deviation too; see [`update_statistics`].
        on_oscillation (`str`, *optional*, defaults to `"raise"`):
            What a row does that oscillates or diverges, as none can under `spectral_cap="auto"`: `"raise"` an error,
            or `"warn"` once. Its output is then that of its last state, and it has no part in the gradient.

    Raises:
        ValueError: If a setting is not one of those above.
    """

    hidden_features: int | tuple[int, ...] = field(
        default=(256, 256), metadata={"help": "Widths of the head's relaxing layers."}
    )
    feedback: FeedbackName = field(
        default="symmetric", metadata={"help": "Feedback weights: the forward ones transposed, or their own."}
    )
    feedback_angle: float = field(
        default=0.0, metadata={"help": "Degrees between feedback and transposed forward weights at the start."}
    )
    activation: ActivationName = field(default="tanh", metadata={"help": "Activation of the relaxing layers."})
    estimator: EstimatorName = field(default="holomorphic", metadata={"help": "Estimator of the gradient."})
    num_points: int = field(default=2, metadata={"help": "Points of the holomorphic estimator."})
    rotated: bool = field(default=True, metadata={"help": "Points half a step from the real axis."})
    radius: float = field(default=1e-3, metadata={"help": "Size of the nudge."})
    correction: CorrectionName = field(
        default="none", metadata={"help": "'asymep' removes the bias of asymmetric feedback."}
    )
    tolerance: float = field(default=1e-4, metadata={"help": "Residual of a fixed point."})
    max_steps: int = field(default=100, metadata={"help": "Sweeps at most."})
    spectral_cap: SpectralCap = field(
        default=AUTO,
        metadata={"help": "Bound on the spectral norm of every recurrent weight: a number, 'auto' or none."},
    )
    input_norm: InputNormName = field(
        default="none", metadata={"help": "Running statistics on the head's input: 'none', 'center', 'standardize'."}
    )
    on_oscillation: OscillationName = field(
        default="raise", metadata={"help": "Whether a row that oscillates raises an error or a warning."}
    )

    def __post_init__(self) -> None:
        check_head(self)


SETTINGS = tuple(item.name for item in fields(HeadSettings))


def head_settings(owner: Any, prefix: str = "") -> dict[str, Any]:
    """Those of [`HeadSettings`] that an object has as attributes, whose names begin with `prefix`."""
    return {name: getattr(owner, prefix + name) for name in SETTINGS if hasattr(owner, prefix + name)}


def check_head(owner: Any, prefix: str = "") -> None:
    """Refuses those of [`head_settings`] that no head can have; `owner` need not have all of them."""
    found = head_settings(owner, prefix)
    for item in fields(HeadSettings):
        if item.name not in found:
            continue
        within = RANGES.get(item.name, Range())
        if item.name == "activation" and found.get("estimator") == "holomorphic":
            within = Range(remedy="The holomorphic estimator needs a complex-differentiable one.")
        check_value(f"{prefix}{item.name}", found[item.name], item.type, within, item.default)
    if "hidden_features" in found:
        check_widths(f"{prefix}hidden_features", found["hidden_features"])
    if "spectral_cap" in found:
        check_spectral_cap(owner, f"{prefix}spectral_cap")
    check_feedback(found.get("feedback", "symmetric"), found.get("feedback_angle", 0.0), prefix)


def check_spectral_cap(owner: Any, name: str) -> None:
    """Refuses a field that is no bound on singular values."""
    if getattr(owner, name) != AUTO:
        remedy = "'auto' is the largest with which relaxation always converges, None no bound."
        check_value(name, getattr(owner, name), float | None, Range(above=0, remedy=remedy))


def read_spectral_cap(value: Any) -> Any:
    """The bound that a command line, where all is text, or a recipe gives; what is no number stays as it is."""
    if not isinstance(value, str) or value == AUTO:
        return value
    if value.lower() in ("none", "null"):
        return None
    try:
        return float(value)
    except ValueError:
        return value


def as_widths(widths: Any) -> list[int]:
    """One size or several, of any kind of whole number, as a list."""
    return [int(width) for width in ([widths] if isinstance(widths, Integral) else widths)]


def check_widths(name: str, widths: Any) -> None:
    """Refuses sizes, one or several, that are no positive integers."""
    values = list(widths) if isinstance(widths, Sequence) and not isinstance(widths, str) else [widths]
    if not values or any(not isinstance(value, Integral) or isinstance(value, bool) or value < 1 for value in values):
        raise ValueError(f"`{name}` must be positive integers, got {shown(values)}: a layer needs at least one unit.")


def check_feedback(feedback: str, feedback_angle: float, prefix: str = "") -> None:
    """Refuses feedback weights that cannot be built; `prefix` is what the user's names of the two begin with."""
    check_value(f"{prefix}feedback", feedback, FeedbackName)
    check_value(f"{prefix}feedback_angle", feedback_angle, float, RANGES["feedback_angle"])
    if feedback == "symmetric" and feedback_angle != 0:
        raise ValueError(
            f"`{prefix}feedback_angle` is {feedback_angle} but `{prefix}feedback` is 'symmetric', which has an angle "
            f"of 0 throughout. Set `{prefix}feedback='asymmetric'`."
        )


def check_homeostasis(homeostasis_coef: float, feedback: str, prefix: str = "") -> None:
    """Refuses a weight of the homeostasis objective that cannot be used; `prefix` as in [`check_feedback`]."""
    check_value(f"{prefix}homeostasis_coef", homeostasis_coef, float, RANGES["homeostasis_coef"])
    if homeostasis_coef > 0 and feedback == "symmetric":
        raise ValueError(
            f"`{prefix}homeostasis_coef={homeostasis_coef}` has nothing to do where `{prefix}feedback='symmetric'`. "
            f"Leave it at 0, or use `{prefix}feedback='asymmetric'`."
        )
