"""The commands of `dsel`, one file each, and what is said of them."""

from ..trainer.kinds import KINDS

TRAININGS = {name: kind.what for name, kind in KINDS.items()}
COMMANDS = {
    **TRAININGS,
    "audit": "find preference labels that are probably wrong, and pairs that teach nothing",
    "build": "write a dataset: reward-augmented pairs, or continuations of a stronger model's responses",
    "shards": "how many whole shards of each length bucket make up a training on decomposed documents",
    "methods": "list the methods, or print the card of one",
}
