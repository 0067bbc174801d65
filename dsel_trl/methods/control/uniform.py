"""The neutral method."""

from dataclasses import dataclass

from ...core.method import Method
from ...core.registry import register


@register("uniform")
@dataclass
class Uniform(Method):
    """
    Changes nothing: every example, TRL's own order, weight 1.

    What: measures loss and implicit margin of every example while it trains and leaves the run as stock TRL, bit for
    bit. Use it to look at a dataset, or as the proof that attaching costs nothing.
    When not: it selects nothing.
    """

    packed_rows = True
    family = "none"
    trainers = ("dpo", "sft", "kto", "reward")
    criterion = "none"
    selector = "all"
