"""Reads the Curry-DPO oracle."""

from dsel_trl.functional.preference.curry_dpo import (
    by_falling_gap,
    curriculum_pairs,
    curriculum_stages,
    rank_responses,
)


def evaluate(oracle):
    prompts, expected = oracle["inputs"]["prompts"], oracle["expected"]
    pairs = [curriculum_pairs(prompt["scores"]) for prompt in prompts]
    stages = max(len(prompt["scores"]) for prompt in prompts) - 1
    together = [(position, pair) for position, found in enumerate(pairs) for pair in found]

    def named(items):
        return [{"id": prompts[position]["id"], **pair._asdict()} for position, pair in items]

    listed = {item["id"] for item in expected.get("per_prompt", [])}
    got = {
        "per_prompt": [
            {
                "id": prompt["id"],
                "rank_order": rank_responses(prompt["scores"]),
                "pairs_easy_to_hard": [pair._asdict() for pair in found],
            }
            for prompt, found in zip(prompts, pairs, strict=True)
            # A prompt without pairs is dropped: it may be left out of the list, or be listed as empty.
            if found or prompt["id"] in listed
        ],
        "stages_easy_to_hard": [named(stage) for stage in curriculum_stages(pairs, stages)],
        "global_order": named(together[i] for i in by_falling_gap([pair.gap for _, pair in together])),
    }
    for name, value in expected.items():
        yield name, got[name], value
