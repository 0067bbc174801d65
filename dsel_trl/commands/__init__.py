"""The commands of `dsel`, one file each, and what is said of them."""

TRAININGS = {
    "dpo": "preference training with selection (TRL's DPOTrainer)",
    "sft": "supervised fine-tuning with selection (TRL's SFTTrainer)",
    "kto": "training on responses that are desirable or not, with selection (TRL's KTOTrainer)",
    "reward": "training of a reward model with selection (TRL's RewardTrainer)",
}
COMMANDS = {
    **TRAININGS,
    "build": "write a dataset: reward-augmented pairs, or continuations of a stronger model's responses",
    "methods": "list the methods, or print the card of one",
}
