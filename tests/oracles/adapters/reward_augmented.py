"""Reads the reward-augmented oracle: rows as the released code builds them, and with its swap corrected."""

from dsel_trl.functional.preference.reward_augmented import augmentable, goal_rows


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    examples = inputs["examples"]
    kept = augmentable(
        [example["avg_fine_score_chosen"] for example in examples],
        [example["avg_fine_score_rejected"] for example in examples],
        keep_equal=True,
    )

    def rows(side, **options):
        return [
            goal_rows(
                {name: example[name] for name in ("chosen", "rejected")},
                example["overall_score_chosen"],
                example["overall_score_rejected"],
                inputs["goal_template"],
                existing_system="insert",
                **options,
            )[side]
            for example in (examples[index] for index in kept)
        ]

    got = {
        "kept_indices": kept,
        "system_role": {"pos": rows(0), "neg": rows(1)},
        "no_system_role": {
            "pos": rows(0, system_role=False),
            "neg_as_shipped": rows(1, system_role=False, as_shipped=True),
            "neg_paper_correct": rows(1, system_role=False),
        },
        "n_rows": 2 * len(kept),
    }
    for name, value in expected.items():
        yield name, got[name], value
