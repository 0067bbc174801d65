"""A reward for the demo corpus: it needs no model, and is as rough as a reward for a demonstration may be."""

from ..responses import Prompt


def overlap(prompts: list[Prompt], responses: list[str]) -> list[float]:
    """
    Share of a response's words that its prompt has too, minus how far its number of words is from that of the prompt.

    Example:

    ```python
    >>> overlap(["Repeat these words: lamp moon"], ["lamp moon"])
    [0.7]
    ```
    """
    rewards = []
    for prompt, response in zip(prompts, responses, strict=True):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        asked, said = text.lower().split(), response.lower().split()
        shared = sum(word in asked for word in said) / max(len(said), 1)
        rewards.append(round(shared - 0.1 * abs(len(asked) - len(said)), 6))
    return rewards
