"""The commands of `dsel`, one file each, and what is said of them."""

from ..trainer.kinds import KINDS

TRAININGS = {name: kind.what for name, kind in KINDS.items()}
COMMANDS = {
    **TRAININGS,
    "audit": "find preference labels that are probably wrong, and pairs that teach nothing",
    "value": "what examples or groups are worth to held-out ones (Data Shapley), and whether to select by it",
    "build": "write a dataset: reward-augmented pairs, or continuations of a stronger model's responses",
    "shards": "how many whole shards of each length bucket make up a training on decomposed documents",
    "ablate": "stock, random and several methods on the same data with several seeds, and a table of what came out",
    "score": "write a dataset with log-probabilities, margins, rewards and methods' scores beside its rows",
    "report": "one page of what runs have kept, dropped and weighted, when and why",
    "export": "write what a run kept, with weights and reasons, as a dataset",
    "recipe": "list the recipes that come with the package, or print one",
    "methods": "list the methods, or print the card of one",
}
