"""EDGE: what a model does with and without a written guideline, and data made of where the guideline lacks something.

The definition follows the abstract of hf.co/papers/2502.12494; no code is public.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from ...functional.preference.reward_augmented import add_goal
from ...functional.ranking import bottom_k, keep_count
from ...functional.text.edge import edge_scores, guideline_effect
from ..columns import plain_column
from ..responses import Prompt, as_response, plain_prompt, templated
from ..rows import UnreadableError
from ..tokens import IGNORED, start_tokens
from .reward_augmented import knows_system_role

Tokens = tuple[list[int], list[int]]


def contexts_of(dataset: Any) -> list[list[Prompt]]:
    """
    What stands before each action of every example: the prompt, or all messages before each of the assistant's.

    Raises:
        `UnreadableError`: if the dataset has neither prompts nor messages.
    """
    if "prompt" in dataset.column_names:
        return [[plain_prompt(prompt)] for prompt in plain_column(dataset, "prompt")]
    if "messages" in dataset.column_names:
        conversations: list[Any] = [plain_prompt(messages) for messages in plain_column(dataset, "messages")]
        return [
            [messages[:place] for place, message in enumerate(messages) if message["role"] == "assistant" and place]
            for messages in conversations
        ]
    raise UnreadableError(
        f"a model acts on a prompt or in a conversation, but the columns are {sorted(dataset.column_names)}."
    )


class Guide:
    """
    Puts guidelines into prompts, where the model expects them: a system message if its chat template knows one, else
    the first user message; a plain prompt begins with it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._system_role: bool | None = None

    def guided(self, prompt: Prompt, guideline: str) -> Prompt:
        """The prompt with the guideline."""
        if self._system_role is None and not isinstance(prompt, str):
            self._system_role = knows_system_role(self.tokenizer)
        return add_goal(prompt, guideline, bool(self._system_role))

    def tokens(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt as the model is asked it; never none, so that an action has something before it."""
        ids = self.tokenizer(templated(self.tokenizer, prompt), add_special_tokens=False)["input_ids"]
        return ids or start_tokens(self.tokenizer)

    def insertion(self, prompt: Prompt, guideline: str) -> tuple[int, int, list[int]]:
        """How the guideline changes the tokens of a prompt: where, how many tokens it replaces, and those it puts."""
        plain, guided = self.tokens(prompt), self.tokens(self.guided(prompt, guideline))
        first = _equal(plain, guided)
        last = min(_equal(plain[::-1], guided[::-1]), min(len(plain), len(guided)) - first)
        return first, len(plain) - first - last, guided[first : len(guided) - last]


def _equal(one: list[int], other: list[int]) -> int:
    """Number of equal tokens from the beginning on."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def unfolded_effectiveness(
    contexts: Sequence[Sequence[Prompt]],
    guidelines: Sequence[str],
    generate: Callable[..., list[list[str]]],
    mean_losses: Callable[[Sequence[Tokens], str], np.ndarray],
    tokenizer: Any,
    *,
    form: str = "ratio",
    aggregate: str = "mean_turn",
    max_new_tokens: int = 64,
    longest: int | None = None,
) -> np.ndarray:
    """
    Guideline effectiveness of examples by what the model itself does: no golden answer is read.

    In each context the model, guided, writes its action (greedily); the same tokens are then scored with and without
    the guideline. Where an example has several actions, what lies between them is the dataset's: there is no
    environment to answer.

    Args:
        contexts (`Sequence[Sequence[Prompt]]`):
            From [`contexts_of`].
        guidelines (`Sequence[str]`):
            One of each example.
        generate (`Callable`):
            As [`~dsel_trl.trainer.generation.generate`] without its first argument.
        mean_losses (`Callable`):
            Mean token loss of (token ids, labels), with the text of a progress bar: `(n,)`.
        tokenizer:
            The model's.
        form, aggregate (`str`):
            Of [`~dsel_trl.functional.text.edge.guideline_effect`] and
            [`~dsel_trl.functional.text.edge.edge_scores`].
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Cap on the tokens of an action.
        longest (`int`, *optional*):
            Tokens that the model holds.

    Returns:
        `np.ndarray` of float64, shape `(N,)`: NaN for an example without an action.

    Raises:
        `ValueError`: if a prompt with its guideline leaves no room for an action.
    """
    guide = Guide(tokenizer)
    owner = np.repeat(np.arange(len(contexts)), [len(turns) for turns in contexts])
    prompts = [prompt for turns in contexts for prompt in turns]
    helped = [guide.guided(prompt, guidelines[i]) for prompt, i in zip(prompts, owner.tolist(), strict=True)]
    plain_ids, helped_ids = ([guide.tokens(prompt) for prompt in each] for each in (prompts, helped))
    needed = max(map(len, helped_ids), default=0) + max_new_tokens
    if longest is not None and needed > longest:
        raise ValueError(
            f"The guideline, the longest prompt and max_new_tokens={max_new_tokens} take {needed} tokens, but the "
            f"model holds {longest}: shorten the guideline, or lower max_new_tokens."
        )
    written = generate(
        helped, max_new_tokens=max_new_tokens, temperature=0.0, seed=0, description="Unfolding under the guideline"
    )
    actions = [tokenizer(text, add_special_tokens=False)["input_ids"] for (text,) in written]

    def losses(before: list[list[int]], what: str) -> np.ndarray:
        rows = [(ids + own, [IGNORED] * len(ids) + own) for ids, own in zip(before, actions, strict=True)]
        return np.where([bool(own) for own in actions], mean_losses(rows, what), np.nan)

    without, guided = losses(plain_ids, "Without the guideline"), losses(helped_ids, "With the guideline")
    effect = guideline_effect(without, guided, form)
    return edge_scores(effect, owner, len(contexts), aggregate=aggregate, num_tokens=[len(own) for own in actions])


def build(
    dataset: Dataset,
    measure: Callable[[Sequence[Sequence[Prompt]], str], np.ndarray],
    *,
    guideline: str,
    annotate: Callable[[str, list[Prompt]], Sequence[str]],
    update: Callable[[str, list[Prompt]], str] | None = None,
    keep: float = 0.25,
    rounds: int = 1,
) -> Dataset:
    """
    Prompts on which the guideline helps least, with responses that are written under a guideline that knows them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` or `messages`; what they answer is not read.
        measure (`Callable`):
            Effectiveness of a guideline on contexts, `(N,)`: see [`unfolded_effectiveness`].
        guideline (`str`):
            The first guideline.
        annotate (`Callable`):
            `annotate(guideline, prompts)` gives a response to each prompt: from a strong model, or a person.
        update (`Callable`, *optional*):
            `update(guideline, prompts)` gives a guideline that says what these prompts need. By default it stays.
        keep (`float`, *optional*, defaults to `0.25`):
            Share of the examples to keep, those of the lowest effectiveness.
        rounds (`int`, *optional*, defaults to `1`):
            How often to measure and update; the choice is that of the last round.

    Returns:
        [`~datasets.Dataset`]: `prompt` (without the guideline), `completion`, `edge_effectiveness`, `guideline` (the
        one that the response was written under) and `row` (in the dataset).

    Raises:
        `ValueError`: if no example can be measured, or a function gives something else than texts.
    """
    if rounds < 1 or not 0 < keep <= 1:
        raise ValueError(f"rounds={rounds}, keep={keep}: at least one round, and a share in (0, 1].")
    contexts = contexts_of(dataset)
    for _ in range(rounds):
        scores = measure(contexts, guideline)
        known = int(np.isfinite(scores).sum())
        if not known:
            raise ValueError("The model did nothing on any prompt: no effectiveness is known.")
        chosen = np.sort(bottom_k(scores, keep_count(keep, known)))
        # Of a conversation its last action is what is written anew.
        prompts = [contexts[i][-1] for i in chosen]
        if update is not None:
            guideline = _text(update(guideline, prompts), "update")
    responses = [_text(text, "annotate") for text in annotate(guideline, prompts)]
    if len(responses) != len(prompts):
        raise ValueError(f"annotate gave {len(responses)} responses to {len(prompts)} prompts.")
    return Dataset.from_dict(
        {
            "prompt": prompts,
            "completion": [as_response(text, prompt) for text, prompt in zip(responses, prompts, strict=True)],
            "edge_effectiveness": scores[chosen],
            "guideline": [guideline] * len(prompts),
            "row": chosen,
        }
    )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} gave {type(value).__name__}, not a text.")
    return value
