"""
What families of methods share: a method of one's own starts here.

| base | for methods that |
|---|---|
| [`ByScore`] | keep, weigh, sample or order by a live or fixed score |
| [`Prescored`] | measure their scores before training |
| [`Embedded`] | look at one vector per example |
| [`EmbeddedTarget`] | compare the vectors with those of a target |
| [`Clustered`] | choose within clusters of embeddings |
| [`Batched`] | form batches of varying size |
| [`FollowsGradient`] | compare the examples' gradients with a target's |
| [`ExplicitMargin`] | know a score of both responses of a pair |
| [`SecondModel`] | compare the policy with another model |
| [`Targeted`] | follow a set of examples that the user names |
| [`LossForm`] | train another loss by weights on the trainer's |
"""

from .batch_forming import Batched
from .clustered import Clustered
from .embedded import Embedded, EmbeddedTarget
from .explicit_margin import ExplicitMargin
from .influence import FollowsGradient
from .offline import Prescored
from .reference_loss import SecondModel
from .replaced_loss import LossForm
from .scored import ByScore
from .target import Targeted

__all__ = [
    "Batched",
    "ByScore",
    "Clustered",
    "Embedded",
    "EmbeddedTarget",
    "ExplicitMargin",
    "FollowsGradient",
    "LossForm",
    "Prescored",
    "SecondModel",
    "Targeted",
]
