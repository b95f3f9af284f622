"""How a binary layer behaves besides its quantizer and centre: estimators, gradient rule, input quantizer.

A plain value that survives JSON: `LayerOptions(**json.loads(json.dumps(asdict(options))))` equals `options`.
"""

from dataclasses import dataclass

from dabnn.choices import unknown_choice
from dabnn.errors import InvalidInputError

ESTIMATORS = ("clipped", "polynomial", "ede", "identity")
ESTIMATOR_CENTERS = ("zero", "threshold")
GRADIENTS = ("straight_through", "means", "reference")
INPUT_QUANTIZERS = ("sign", "rsign", "two_valued")


@dataclass(frozen=True)
class LayerOptions:
    """The options of `dabnn.layers.BinaryConv2d`; the defaults are the form that measured best.

    Attributes:
        ste: straight-through estimator of the weights: clipped, polynomial, ede or identity (`dabnn.gradients`).
        ste_width: half width of its window, in units of the (centred) weight.
        ste_center: middle of that window: zero, or threshold, which is (alpha + beta) / 2 of each filter.
        gradient: straight_through (alpha and beta are constants), means (they are differentiable functions of the
            weight) or reference (the factor of the reference code); formulas in `dabnn.layers`.
        input_quantizer: sign, rsign (a learned shift a channel before the sign) or two_valued (two values a sample);
            formulas in `dabnn.activations`. Without effect where the input is real.
        input_ste: straight-through estimator of the input's sign.
        input_ste_width: half width of its window, in units of the input.
    """

    ste: str = "clipped"
    ste_width: float = 1.0
    ste_center: str = "zero"
    gradient: str = "straight_through"
    input_quantizer: str = "sign"
    input_ste: str = "clipped"
    input_ste_width: float = 1.0

    def __post_init__(self) -> None:
        """Refuse names that are not known and windows without a width."""
        choices = {
            "ste": ESTIMATORS,
            "ste_center": ESTIMATOR_CENTERS,
            "gradient": GRADIENTS,
            "input_quantizer": INPUT_QUANTIZERS,
            "input_ste": ESTIMATORS,
        }
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise unknown_choice(f"binarize.{field}", getattr(self, field), known)
        for field in ("ste_width", "input_ste_width"):
            width = getattr(self, field)
            if not width > 0:
                raise InvalidInputError(
                    f"binarize.{field}: {width} lets no gradient pass. Use a positive number; 1 is usual."
                )
