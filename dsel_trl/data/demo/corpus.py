"""
The built-in demo corpus: small templated tasks whose right answers are known.

It exists so that a fresh installation can show, without network or GPU, what selection does to noisy preference data:
a share of the training labels is flipped, some rows are near-duplicates, and external scores tell good answers from
bad ones most of the time. What is true of a row stands in columns that start with `truth_`; no method may read them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, DatasetDict

# fmt: off
WORDS = (
    "apple", "bread", "cloud", "drum", "fence", "glove", "horse", "kite", "lamp", "moon", "needle", "ocean", "pencil",
    "queen", "river", "stone", "table", "violin", "window", "yarn", "zebra", "anchor", "basket", "candle", "door",
    "garden", "hammer", "jungle", "mirror", "orange", "rabbit", "wagon",
)
NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivy", "Jon", "Kim", "Leo", "Mia", "Ned", "Ola", "Pia",
)
PLACES = ("school", "market", "office", "library", "station", "harbour", "kitchen", "museum")
# fmt: on
LEVELS = (1, 2, 3, 4)
# A family whose prompts are nearly used up is an error, not an endless search.
MAX_DRAWS = 1000

Task = tuple[str, str, str]
"""Prompt, correct answer, corrupted answer."""


def _pick(rng: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    return [items[position] for position in rng.choice(len(items), size=count, replace=False)]


def _copy(rng: np.random.Generator, level: int) -> Task:
    words = _pick(rng, WORDS, level + 1)
    # The harder the pair, the fewer of its words are stuttered.
    stuttered = set(rng.choice(level + 1, size=max(1, 3 - level), replace=False).tolist())
    corrupted = [word for position, word in enumerate(words) for word in [word] * (1 + (position in stuttered))]
    return f"Repeat these words: {' '.join(words)}", " ".join(words), " ".join(corrupted)


def _sort(rng: np.random.Generator, level: int) -> Task:
    digits = rng.choice(9, size=level + 2, replace=False) + 1
    ordered = [str(digit) for digit in sorted(digits)]
    while [str(digit) for digit in digits] == ordered:
        digits = rng.permutation(digits)
    owner, asked = _pick(rng, NAMES, 1)[0], " ".join(str(digit) for digit in digits)
    return f"{owner} sorts {asked} upwards:", " ".join(ordered), asked


def _add(rng: np.random.Generator, level: int) -> Task:
    left, right = (int(value) for value in rng.integers(1, 3 + level, size=2))
    # Close misses are harder to tell from the right answer than wild ones.
    miss = 5 - level
    wrong = left + right + miss if rng.random() < 0.5 or left + right <= miss else left + right - miss
    owner, thing = _pick(rng, NAMES, 1)[0], _pick(rng, WORDS, 1)[0]
    return f"{owner} adds {left} {thing} to {right}.", f"This makes {left + right}.", f"This makes {wrong}."


def _number(rng: np.random.Generator, level: int) -> Task:
    seen, thing, owner = int(rng.integers(2, 6)), _pick(rng, WORDS, 1)[0], _pick(rng, NAMES, 1)[0]
    if rng.random() < 0.5:
        seen = 1
    # The longer the way from the number to the question, the harder.
    way = " and ".join(_pick(rng, PLACES, level))
    single, several = f"It is the {thing}.", f"They are {thing}s."
    right, wrong = (single, several) if seen == 1 else (several, single)
    return f"{owner} sees {seen} {thing} at the {way}. What?", right, wrong


def _format(rng: np.random.Generator, level: int) -> Task:
    plain = " ".join(_pick(rng, WORDS, level + 1))
    style = ("quotes", "brackets", "stars")[rng.integers(3)]
    return (
        f"Put in {style}: {plain}",
        {"quotes": '"{}"', "brackets": "({})", "stars": "*{}*"}[style].format(plain),
        plain,
    )


def _count(rng: np.random.Generator, level: int) -> Task:
    word, owner = _pick(rng, WORDS, 1)[0], _pick(rng, NAMES, 1)[0]
    times, miss = int(rng.integers(1, level + 2)), 5 - level
    wrong = times + miss if rng.random() < 0.5 or times <= miss else times - miss
    return f"{owner} says {times} times {word}.", " ".join([word] * times), " ".join([word] * wrong)


def _address(rng: np.random.Generator, level: int) -> Task:
    owner, things = _pick(rng, NAMES, 1)[0], _pick(rng, WORDS, level)
    formal = bool(rng.random() < 0.5)
    title = _pick(rng, ("doctor", "judge", "mayor") if formal else ("friend", "brother", "cousin"), 1)[0]
    letter, call = f"Dear {owner}, here it is.", f"Hey {owner}, here it is!"
    right, wrong = (letter, call) if formal else (call, letter)
    return f"Send the {title} {owner} the {' '.join(things)}.", right, wrong


def _refuse(rng: np.random.Generator, level: int) -> Task:
    owner, thing, place = _pick(rng, NAMES, 1)[0], _pick(rng, WORDS, 1)[0], _pick(rng, PLACES, 1)[0]
    harmful = bool(rng.random() < 0.5)
    verb = _pick(rng, ("steal", "break", "burn") if harmful else ("clean", "paint", "carry"), 1)[0]
    asides = _pick(rng, ("today", "quietly", "together", "slowly"), level - 1)
    prompt = " ".join([f"How do I {verb} the {thing} of {owner} at the {place}", *asides]) + "?"
    refusal, advice = f"Sorry {owner}, I cannot help.", f"Take the {thing} and {verb} it."
    return (prompt, refusal, advice) if harmful else (prompt, advice, refusal)


FAMILIES: dict[str, Callable[[np.random.Generator, int], Task]] = {
    "copy": _copy,
    "sort": _sort,
    "add": _add,
    "number": _number,
    "format": _format,
    "count": _count,
    "address": _address,
    "refuse": _refuse,
}


@dataclass(frozen=True)
class DemoTask:
    """One task of the corpus with what is true of it."""

    prompt: str
    good: str
    bad: str
    family: str
    level: int


def draw_tasks(count: int, rng: np.random.Generator, taken: set[str]) -> list[DemoTask]:
    """
    Draws `count` tasks with distinct prompts, families and levels in equal shares.

    Args:
        count (`int`):
            Number of tasks.
        rng (`numpy.random.Generator`):
            Source of all randomness.
        taken (`set[str]`):
            Prompts that must not be drawn; the drawn ones are added to it.

    Returns:
        `list[DemoTask]`: the tasks, in random order.
    """
    names = list(FAMILIES)
    tasks = []
    for number in range(count):
        family, level = names[number % len(names)], LEVELS[number // len(names) % len(LEVELS)]
        for _ in range(MAX_DRAWS):
            prompt, good, bad = FAMILIES[family](rng, level)
            if prompt not in taken:
                break
        else:
            raise ValueError(
                f"There are not {count} distinct prompts of family {family!r}, level {level}: ask for fewer."
            )
        taken.add(prompt)
        tasks.append(DemoTask(prompt, good, bad, family, level))
    return [tasks[position] for position in rng.permutation(count)]


def _judge(rng: np.random.Generator, levels: np.ndarray, good: bool) -> np.ndarray:
    """Scores of a judge who sees a smaller difference in harder pairs, on a scale of about 1 to 10."""
    quality = (1.2 - 0.15 * levels) * (1.0 if good else -1.0)
    return np.round(5.5 + 1.5 * (quality + rng.normal(0.0, 0.95, size=len(levels))), 2)


def _reworded(rng: np.random.Generator, task: DemoTask) -> DemoTask:
    prompt = [f"Please: {task.prompt}", f"{task.prompt} Thank you!", f"Hello. {task.prompt}"][rng.integers(3)]
    return DemoTask(prompt, task.good, task.bad, task.family, task.level)


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _preference_rows(tasks: list[DemoTask], duplicate_of: np.ndarray, flip_rate: float, rng: np.random.Generator):
    flipped = rng.random(len(tasks)) < flip_rate
    levels = np.array([task.level for task in tasks])
    good, bad = _judge(rng, levels, True), _judge(rng, levels, False)
    pairs = [(t.bad, t.good) if flip else (t.good, t.bad) for t, flip in zip(tasks, flipped, strict=True)]
    return Dataset.from_dict(
        {
            "prompt": [_message("user", task.prompt) for task in tasks],
            "chosen": [_message("assistant", chosen) for chosen, _ in pairs],
            "rejected": [_message("assistant", rejected) for _, rejected in pairs],
            "score_chosen": np.where(flipped, bad, good),
            "score_rejected": np.where(flipped, good, bad),
            "truth_flipped": flipped,
            "truth_difficulty": levels,
            "truth_family": [task.family for task in tasks],
            "truth_duplicate_of": duplicate_of,
        }
    )


def demo_preferences(
    seed: int = 0,
    train_size: int = 2048,
    test_size: int = 512,
    flip_rate: float = 0.3,
    duplicate_rate: float = 0.1,
) -> DatasetDict:
    """
    Builds the demo corpus as preference pairs, in TRL's conversational format.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the corpus. The same arguments always give the same rows.
        train_size (`int`, *optional*, defaults to `2048`):
            Number of training pairs, near-duplicates included.
        test_size (`int`, *optional*, defaults to `512`):
            Number of held-out pairs. Their labels are never flipped, and no prompt is also a training prompt.
        flip_rate (`float`, *optional*, defaults to `0.3`):
            Share of training pairs whose `chosen` and `rejected` are exchanged.
        duplicate_rate (`float`, *optional*, defaults to `0.1`):
            Share of training pairs that repeat another pair in slightly other words.

    Returns:
        [`~datasets.DatasetDict`]: splits `train` and `test` with the columns `prompt`, `chosen`, `rejected`,
        `score_chosen`, `score_rejected` (a noisy judge of the two texts) and the truth: `truth_flipped`,
        `truth_difficulty` (1 to 4), `truth_family`, `truth_duplicate_of` (row of the original, or -1).

    Example:

    ```python
    >>> from dsel_trl.data.demo.corpus import demo_preferences

    >>> demo_preferences(train_size=64, test_size=16)["test"].num_rows
    16
    ```
    """
    test_rng, train_rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    taken: set[str] = set()
    test_tasks = draw_tasks(test_size, test_rng, taken)
    duplicates = round(train_size * duplicate_rate)
    originals = draw_tasks(train_size - duplicates, train_rng, taken)
    sources = train_rng.choice(len(originals), size=duplicates, replace=False)
    tasks = originals + [_reworded(train_rng, originals[source]) for source in sources]
    order = train_rng.permutation(train_size)
    row_of = np.argsort(order)
    duplicate_of = np.full(train_size, -1)
    duplicate_of[row_of[len(originals) :]] = row_of[sources]
    return DatasetDict(
        train=_preference_rows([tasks[position] for position in order], duplicate_of, flip_rate, train_rng),
        test=_preference_rows(test_tasks, np.full(test_size, -1), 0.0, test_rng),
    )


def demo_completions(
    seed: int = 0, train_size: int = 2048, test_size: int = 512, flip_rate: float = 0.3
) -> DatasetDict:
    """
    Builds the demo corpus for supervised fine-tuning: the `chosen` answers of [`demo_preferences`].

    A flipped pair becomes a corrupted completion, and the judge's score of the completion is in the column `score`.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the corpus.
        train_size (`int`, *optional*, defaults to `2048`):
            Number of training examples.
        test_size (`int`, *optional*, defaults to `512`):
            Number of held-out examples, all of them correct.
        flip_rate (`float`, *optional*, defaults to `0.3`):
            Share of training examples with a corrupted completion.

    Returns:
        [`~datasets.DatasetDict`]: splits `train` and `test` with the columns `prompt`, `completion`, `score` and the
        truth columns of [`demo_preferences`].
    """
    pairs = demo_preferences(seed, train_size, test_size, flip_rate)
    return pairs.remove_columns(["rejected", "score_rejected"]).rename_columns(
        {"chosen": "completion", "score_chosen": "score"}
    )


def demo_judged(seed: int = 0, train_size: int = 2048, test_size: int = 512, flip_rate: float = 0.3) -> DatasetDict:
    """
    Builds the demo corpus for KTO: of each pair of [`demo_preferences`] one response and whether it is desirable.

    Every other pair gives its `chosen` response, labelled as desirable, the rest their `rejected` one. A flipped pair
    so becomes a wrong label, and the judge's score of the response is in the column `score`.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the corpus.
        train_size (`int`, *optional*, defaults to `2048`):
            Number of training examples.
        test_size (`int`, *optional*, defaults to `512`):
            Number of held-out examples, all of them labelled correctly.
        flip_rate (`float`, *optional*, defaults to `0.3`):
            Share of training examples with a wrong label.

    Returns:
        [`~datasets.DatasetDict`]: splits `train` and `test` with the columns `prompt`, `completion`, `label`, `score`
        and the truth columns of [`demo_preferences`].
    """
    judged = DatasetDict()
    for split, pairs in demo_preferences(seed, train_size, test_size, flip_rate).items():
        sides = [("chosen", "rejected")[row % 2] for row in range(len(pairs))]
        columns = {name: pairs[name] for name in ("chosen", "rejected", "score_chosen", "score_rejected")}
        judged[split] = (
            pairs.remove_columns(list(columns))
            .add_column("completion", [columns[side][row] for row, side in enumerate(sides)])
            .add_column("label", [side == "chosen" for side in sides])
            .add_column("score", [columns[f"score_{side}"][row] for row, side in enumerate(sides)])
        )
    return judged
