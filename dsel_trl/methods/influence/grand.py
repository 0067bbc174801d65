"""GraNd: the norm of an example's gradient, averaged over the visits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ...bases.influence import LAYERS
from ...bases.visits import OverVisits
from ...core.method import Run
from ...core.registry import register
from ...signals.batch import Batch, Signal
from ...signals.ghost import ExampleGradients, GradientRequest


@register("grand")
@dataclass
class Grand(OverVisits):
    """
    Chooses examples by the norm of their gradient, out of the ordinary backward pass.

    What: the norm of the gradient of each example's own loss by the parameters of `layers` (a pair's two sequences
    together), exact, without a second backward pass, averaged over the visits within the first share `window` of the
    training (hf.co/papers/2107.07075). `action` says what to do about it: the paper keeps the highest (keep_top); with
    flipped labels the very highest are noise, which a `band` leaves out.
    When: many epochs over clean labels. When not: alone, for instruction tuning: short answers have large gradients,
    and the loss says nearly as much for nothing. Norms at the very start (an untrained model) do not reproduce.
    Memory: the positions of a batch in pairs, or one layer's gradients, whichever is less work, in pieces of 512 MiB.
    Scores are live: the first epoch's choice is random. Measured (`benchmarks/influence.py`, SFT of 8 x 256 tokens, a
    Llama of 6 million parameters, one core): 1.26 times a stock step, 1.00 times its peak memory.
    """

    layers: str | Sequence[str] = field(default="linear", metadata={"help": LAYERS})

    signals = (Signal.INFLUENCE,)
    paper = "hf.co/papers/2107.07075"
    selector = "top_k, band, sample, curriculum"
    # A weight would be needed before the backward pass that says it.
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "keep_bottom", "band", "sample", "curriculum")

    def check(self, run: Run) -> None:
        super().check(run)
        run.gradients.layers(self.layers)

    def gradients(self, run: Run) -> GradientRequest | None:
        return GradientRequest(self.layers, norms=True) if run.progress < self.window else None

    def after_backward(self, run: Run, batch: Batch, gradients: ExampleGradients) -> dict[str, Tensor]:
        return {self.last: gradients.norms}
