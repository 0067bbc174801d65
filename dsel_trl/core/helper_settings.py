"""What a helper run is made from: the arguments it shares with the run, and those of its own."""

from typing import Any

# What of the run's own arguments decides what a helper learns and what its losses are: all of it is shared.
LOSS = (
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "ld_alpha",
    "use_weighting",
    "desirable_weight",
    "undesirable_weight",
    "center_rewards_coefficient",
    "router_aux_loss_coef",
    "label_smoothing_factor",
    "average_tokens_across_devices",
)
ROWS = ("max_length", "truncation_mode")
PRECISION = ("bf16", "fp16", "tf32")
TRAINING = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
    "disable_dropout",
)
DECIDING = (*LOSS, *ROWS, *PRECISION, *TRAINING)
# Shared as well, but only how it is computed: the same numbers come out.
COMPUTING = (
    "use_cpu",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_offloading",
    "full_determinism",
    "ddp_backend",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "ddp_timeout",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "torch_empty_cache_steps",
)
SHARED = (*DECIDING, *COMPUTING)

# A helper run's own: how long it is, how fast it learns, and that it leaves nothing behind.
OWN = (
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "lr_scheduler_type",
    "warmup_steps",
    "seed",
    "report_to",
    "save_strategy",
    "logging_strategy",
    "disable_tqdm",
)

# Adapters start at zero and learn slower than the weights beneath: at a rate for these they would learn nothing.
LORA_LEARNING_RATE = 3e-4
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def helper_arguments(
    arguments: Any, *, learning_rate: float | None = None, epochs: float = 1.0, lora: bool = True, seed: int = 0
) -> dict[str, Any]:
    """
    The arguments of a helper run's configuration, all but where it writes.

    Args:
        arguments (`DPOConfig`, `SFTConfig`, ...):
            The run's own.
        learning_rate (`float`, *optional*):
            Defaults to `3e-4` with LoRA, and to the run's own without.
        epochs (`float`, *optional*, defaults to `1.0`):
            Length of the helper run.
        lora (`bool`, *optional*, defaults to `True`):
            Whether it trains an adapter.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the helper run.
    """
    if learning_rate is None:
        learning_rate = LORA_LEARNING_RATE if lora else arguments.learning_rate
    return {
        **{name: getattr(arguments, name) for name in SHARED if hasattr(arguments, name)},
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "seed": seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
