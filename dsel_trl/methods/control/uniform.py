"""The neutral method."""

from dataclasses import dataclass, field

from ...core.method import Method
from ...core.registry import register


@register("uniform")
@dataclass
class Uniform(Method):
    """
    Changes nothing: every example, TRL's own order, weight 1.

    What: leaves the run as stock TRL, bit for bit, and reads nothing of it: the ledger knows which examples were
    trained, and when. With `measure` it also keeps the loss and implicit margin of every trained example, without an
    extra forward. Use it as the proof that attaching costs nothing, or to look at a dataset.
    When not: it selects nothing.
    """

    measure: bool = field(
        default=False, metadata={"help": "whether to keep loss and implicit margin of every trained example"}
    )

    packed_rows = True
    family = "none"
    trainers = ("dpo", "sft", "kto", "reward")
    criterion = "none"
    selector = "all"

    @property
    def reads_batches(self) -> bool:
        return self.measure
