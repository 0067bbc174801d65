"""What the tests of the spine train: a tiny model, tiny datasets, trainers on them, and a witness of each run."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate.utils.imports
import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from dsel_trl import Method, SelectionCallback

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
# Every `train()` collects garbage; what the libraries brought along is never any, and looking through it takes longer
# than a tiny run.
gc.freeze()
# Asked several times a step, each time read from the files of the installed package.
accelerate.utils.imports._is_package_available = cache(accelerate.utils.imports._is_package_available)

WORDS = [f"w{i}" for i in range(297)]
COMMON = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "max_length": 64,
}


def build_model(folder: str | os.PathLike, seed: int = 0) -> Path:
    """Saves a two-layer Llama (float32) and a word-level tokenizer."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return Path(folder)


def _text(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, size=int(rng.integers(low, high))))


@cache
def preferences(size: int = 40, seed: int = 0) -> Dataset:
    """Preference pairs; their numeric columns are continuous, so that no ranking hangs on a tie."""
    rng = np.random.default_rng([seed, 1])
    return Dataset.from_list(
        [
            {
                "prompt": _text(rng, 2, 8),
                "chosen": " " + _text(rng, 2, 12),
                "rejected": " " + _text(rng, 2, 12),
                "score_chosen": float(rng.normal(1.0)),
                "score_rejected": float(rng.normal(0.0)),
                "weight": float(rng.uniform(0.2, 2.0)),
                "difficulty": float(rng.uniform()),
                "one": 1.0,
            }
            for _ in range(size)
        ]
    )


@cache
def completions(size: int = 40, seed: int = 0) -> Dataset:
    """Prompt-completion examples for SFT."""
    rng = np.random.default_rng([seed, 2])
    return Dataset.from_list(
        [
            {
                "prompt": _text(rng, 2, 8),
                "completion": " " + _text(rng, 2, 16),
                "weight": float(rng.uniform(0.2, 2.0)),
                "difficulty": float(rng.uniform()),
                "one": 1.0,
            }
            for _ in range(size)
        ]
    )


@cache
def texts(size: int = 40, seed: int = 0) -> Dataset:
    """Plain texts for SFT."""
    rng = np.random.default_rng([seed, 3])
    return Dataset.from_list(
        [{"text": _text(rng, 3, 20), "weight": float(rng.uniform(0.2, 2.0))} for _ in range(size)]
    )


@cache
def judged(size: int = 40, seed: int = 0) -> Dataset:
    """Completions that are desirable or not, for KTO."""
    labels = np.random.default_rng([seed, 4]).random(size) < 0.5
    return completions(size, seed).add_column("label", labels)


DATASETS = {"dpo": preferences, "sft": completions, "lm": texts, "kto": judged}
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "sft": (SFTTrainer, SFTConfig),
    "lm": (SFTTrainer, SFTConfig),
    "kto": (KTOTrainer, KTOConfig),
}

PREPARED_BY = ("max_length", "truncation_mode", "packing", "packing_strategy", "padding_free", "completion_only_loss")
# KTO's KL term, if the loss has one, is prepared for batches of the size that is trained.
KTO_PREPARED_BY = ("loss_type", "per_device_train_batch_size")
_PREPARED: dict[Any, Any] = {}


def prepared_once(cls: type) -> Any:
    """TRL's own preparation of a dataset, done once for each dataset and what of the arguments it depends on."""
    prepare = cls._prepare_dataset

    def prepared(self: Any, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
        if not isinstance(dataset, Dataset):
            return prepare(self, dataset, processing_class, args, *rest)
        names = (*PREPARED_BY, *(KTO_PREPARED_BY if cls is KTOTrainer else ()))
        key = (cls, dataset._fingerprint, *(getattr(args, name, None) for name in names), *rest)
        if key not in _PREPARED:
            _PREPARED[key] = prepare(self, dataset, processing_class, args, *rest)
        return _PREPARED[key]

    return patch.object(cls, "_prepare_dataset", prepared)


_LOADED: dict[Any, Any] = {}


def loaded_once(cls: type) -> Any:
    """A trainer's own way to load a model, gone once for each folder and its content: later ones are copies."""
    trainers = sys.modules[cls.__module__]
    load = trainers.create_model_from_path

    def loaded(folder: str, *rest: Any, **how: Any) -> Any:
        files = sorted((path.name, path.stat().st_mtime_ns) for path in Path(folder).glob("*.*"))
        key = (folder, *map(repr, (files, rest, sorted(how.items()))))
        if key not in _LOADED:
            _LOADED[key] = load(folder, *rest, **how)
        return deepcopy(_LOADED[key])

    return patch.object(trainers, "create_model_from_path", loaded)


def make_trainer(
    kind: str,
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    dataset: Any = None,
    lora: bool = False,
    lora_dropout: float = 0.0,
    eval_dataset: Any = None,
    callbacks: Any = None,
    **config: Any,
) -> DPOTrainer | SFTTrainer | KTOTrainer:
    """A stock trainer on the tiny model: `kind` is `"dpo"`, `"sft"` (prompt-completion), `"lm"` (text) or `"kto"`."""
    peft_config = (
        LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=lora_dropout,
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )
        if lora
        else None
    )
    cls, arguments = TRAINERS[kind]
    args = arguments(str(output_dir), **{**COMMON, **config})
    # Adapters start at random; TRL seeds them from 1.15 on.
    transformers.set_seed(args.seed)
    with prepared_once(cls), loaded_once(cls):
        return cls(
            str(model),
            args=args,
            train_dataset=DATASETS[kind]() if dataset is None else dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
        )


def stir(trainer: Any, seed: int = 1, scale: float = 0.03) -> None:
    """Moves the trainable weights away from the reference, so that no margin is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of all parameters; of sharded ones, which all processes must ask for, the whole."""
    values = {name: value.detach() for name, value in trainer.model.named_parameters()}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in values.items()}


def losses_of(trainer: Any) -> list[dict[str, float]]:
    """The logged rows without what a clock decides and without the selection's own values."""
    timed = ("runtime", "per_second", "selection/")
    return [
        {key: value for key, value in row.items() if not any(word in key for word in timed)}
        for row in trainer.state.log_history
    ]


@dataclass
class Witness(Method):
    """Writes down what was trained in each optimizer step; changes nothing."""

    steps: list = field(default_factory=list, init=False)

    name = "witness"
    trainers = ("dpo", "sft", "kto")
    packed_rows = True

    def observe(self, run: Any, step: Any) -> None:
        self.steps.append(step)

    @property
    def ids(self) -> list[list[int]]:
        """Ids of each step."""
        return [step.ids.tolist() for step in self.steps]


@dataclass
class Trace:
    """All of a run that must be the same after an interruption."""

    ids: list[list[int]]
    values: list[dict[str, np.ndarray]]
    ledger: dict[str, np.ndarray]
    ledger_values: dict[str, Any]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, trainer: Any, witness: Witness) -> "Trace":
        arrays, values = trainer.selection.ledger.state_dict()
        return cls(
            witness.ids,
            [step.values for step in witness.steps],
            {name: array.copy() for name, array in arrays.items()},
            values,
            weights_of(trainer),
        )

    def assert_ends_as(self, other: "Trace") -> None:
        """This run's steps are the last ones of `other`, and it ended in the same state, bit for bit."""
        count = len(self.ids)
        assert count > 0
        assert self.ids == other.ids[-count:]
        for mine, theirs in zip(self.values, other.values[-count:], strict=True):
            assert_same_arrays(mine, theirs)
        assert self.ledger_values == other.ledger_values
        assert_same_arrays(self.ledger, other.ledger)
        assert_same_weights(self.weights, other.weights)


def assert_same_arrays(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.tobytes() == theirs[name].tobytes(), f"{name}: {array} != {theirs[name]}"


def assert_same_weights(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, different


def attach(trainer: Any, method: Any, **parameters: Any) -> Witness:
    """Adds the selection and a witness to a trainer."""
    from dsel_trl import create_method

    witness = Witness()
    method = create_method(method, **parameters) if isinstance(method, str) else method
    trainer.add_callback(SelectionCallback(trainer, [method, witness]))
    return witness
