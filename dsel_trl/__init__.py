"""Selects, orders and weighs the examples of a running TRL training."""

from .callback import SelectionCallback
from .ledger import Ledger
from .method import Method, create_method, get_method, get_method_card, list_methods, register
from .run import Run, Step
from .tap import Batch, PairBatch, SequenceBatch, Signal
from .trainer import SelectionMixin

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Ledger",
    "Method",
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
