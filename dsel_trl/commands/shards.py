"""`dsel shards`: how many whole shards of each length bucket make up a training on decomposed documents."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser

from ..functional.order.shard_plan import plan_shards


@dataclass
class ShardArguments:
    """What there is, and how much of it to train on; lists have one entry per bucket, from short to long."""

    total_tokens: int = field(metadata={"help": "Tokens to train on, over all cycles; may exceed what there is."})
    number_of_shards: list[int] = field(metadata={"help": "Shards of each bucket."})
    sequence_per_shard: list[int] = field(metadata={"help": "Sequences in a shard of each bucket."})
    sequence_sizes: list[int] = field(metadata={"help": "Tokens per sequence of each bucket."})
    batch_mult: list[float] = field(metadata={"help": "Batch size of each bucket, relative to the longest."})
    curriculum: list[float] = field(metadata={"help": "Odds of each bucket."})
    epochs: int = field(default=8, metadata={"help": "Cycles of the curriculum."})
    num_gpus: int = field(default=1, metadata={"help": "Processes that read shards."})
    num_workers: int = field(default=1, metadata={"help": "Loader workers per process."})
    global_batch: int = field(default=1, metadata={"help": "Sequences per step of the longest bucket."})


def shard_lines(asked: ShardArguments) -> list[str]:
    """The plan as arguments of the loader that the paper's authors published (hf.co/papers/2405.13226)."""
    plan = plan_shards(
        asked.total_tokens,
        asked.epochs,
        num_shards=asked.number_of_shards,
        sequences_per_shard=asked.sequence_per_shard,
        sequence_lengths=asked.sequence_sizes,
        batch_multipliers=asked.batch_mult,
        odds=asked.curriculum,
        num_processes=asked.num_gpus,
        num_workers=asked.num_workers,
        global_batch=asked.global_batch,
    )

    def words(values: Sequence[float]) -> str:
        return " ".join(str(int(value)) for value in values)

    lines = [
        "**** Use the following arguments:",
        f"--epochs {asked.epochs}",
        f"--train-num-samples {plan.tokens_per_cycle}",
        f"--dataset-batch-mult {words(asked.batch_mult)}",
        f"--source-num-seq-per-epoch {words(plan.sequences.tolist())}",
        f"--train-data-mix-weights {words(plan.weights.tolist())}",
    ]
    if plan.exact:
        return lines
    wanted, got = asked.total_tokens, plan.total_tokens
    return [f"Cannot match requested number of tokens of {wanted:,}. Go with {got:,} instead.", *lines]


def plan_text(words: Sequence[str]) -> str:
    """
    Runs `dsel shards --key value ...`.

    Raises:
        `ValueError`: for an unknown key, or sizes that do not fit.
    """
    kinds: tuple[Any, ...] = (ShardArguments,)
    parser = HfArgumentParser(kinds, prog="dsel shards", allow_abbrev=False)
    asked, unknown = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Unknown argument {unknown[0]!r} of `dsel shards`. See `dsel shards --help`.")
    return "\n".join(shard_lines(asked))
