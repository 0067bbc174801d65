"""Gated steps in two processes, compared with the explicit sum over all their examples; run under torchrun."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.nn.functional import pad

from dsel_trl.report import run_files
from tests import tiny, weighted

STEP = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 2,
}
CASES = {
    "sigmoid": ("dpo", "none", {}),
    "sigmoid_mean1": ("dpo", "mean1", {}),
    "ipo_lora_mean1": ("dpo", "mean1", {"lora": True, "loss_type": ["ipo"]}),
    "apo_zero_accumulated": ("dpo", "mean1", {"loss_type": ["apo_zero"], "gradient_accumulation_steps": 2}),
    "hinge_checkpointing": ("dpo", "mean1", {"loss_type": ["hinge"], "gradient_checkpointing": True}),
    "nca_pair_precomputed": ("dpo", "mean1", {"loss_type": ["nca_pair"], "precompute_ref_log_probs": True}),
    "nll": ("sft", "none", {}),
    "nll_accumulated": ("sft", "mean1", {"gradient_accumulation_steps": 2}),
    "dft_lora_mean1": ("sft", "mean1", {"loss_type": "dft", "lora": True}),
    "nll_flat": ("lm", "mean1", {"padding_free": True, "max_length": None}),
    "kto": ("kto", "mean1", {}),
    "kto_lora_precomputed": ("kto", "none", {"lora": True, "precompute_ref_log_probs": True}),
}


def with_common_kl(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """KTO's batches of both ranks, each with the KL rows of both: the KL term is the mean over the ranks."""
    common = {}
    for name in [name for name in batches[0] if "KL_" in name]:
        width = max(batch[name].shape[-1] for batch in batches)
        rows = [batch[name] for batch in batches]
        rows = [pad(row, (0, width - row.shape[1])) if row.dim() == 2 else row for row in rows]
        common[name] = torch.cat(rows)
    return [{**batch, **common} for batch in batches]


def main(model: str, folder: str) -> None:
    run_files.draw_run = lambda *args: None
    errors = {}
    for name, (kind, normalize, config) in CASES.items():
        config = {**STEP, **config}
        # From disk: two processes share what TRL computes beforehand through the dataset's cache.
        dataset = Dataset.load_from_disk(f"{folder}/{kind}")
        trainer = tiny.make_trainer(kind, model, f"{folder}/{name}", dataset=dataset, **config)
        gated, method, _ = weighted.one_step(trainer, normalize=normalize)
        parts = [None, None]
        own = [(micro["ids"], micro["inputs"]) for micro in method.seen[: trainer.args.gradient_accumulation_steps]]
        dist.all_gather_object(parts, own)
        # Both ranks put the sum together: the trainer's loss gathers its metrics over the ranks.
        seen = [micro for part in parts for micro in part]
        assert len({tuple(ids.tolist()) for ids, _ in seen}) == len(seen)
        table = [torch.from_numpy(weighted.WEIGHTS)[ids] for ids, _ in seen]
        inputs = with_common_kl([inputs for _, inputs in seen])
        explicit = weighted.explicit_gradient(trainer, inputs, weighted.normalized(table, normalize))
        errors[name] = weighted.Outcome(gated, explicit, {}, torch.empty(0), None).error
    if dist.get_rank() == 0:
        (Path(folder) / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.destroy_process_group()
