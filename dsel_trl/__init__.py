"""Selects, orders and weighs the examples of a running TRL training."""

from .callback import SelectionCallback
from .core.cards import MethodCard, get_method_card
from .core.ledger import Ledger
from .core.method import Method
from .core.registry import create_method, get_method, list_methods, register
from .core.run import Run, Step
from .signals.batch import Batch, Signal
from .signals.pair_batch import PairBatch
from .signals.sequence_batch import SequenceBatch
from .trainer.mixin import SelectionMixin

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Ledger",
    "Method",
    "MethodCard",
    "PairBatch",
    "Run",
    "SelectionCallback",
    "SelectionMixin",
    "SequenceBatch",
    "Signal",
    "Step",
    "create_method",
    "get_method",
    "get_method_card",
    "list_methods",
    "register",
]
