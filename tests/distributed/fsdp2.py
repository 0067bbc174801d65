"""
FSDP2 between CPU processes, for tests.

Torch shards over gloo as it does over NCCL, but accelerate makes a sharding run of accelerators only: several CPU
processes are DDP to it, whatever the settings say. `shard` lets it follow the settings on CPUs too.
"""

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

# What `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` puts into the environment, in float32.
SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def shard() -> None:
    """Makes every trainer that this process builds from now on shard its models over the processes (FSDP2)."""
    os.environ.update(SETTINGS)
    own = AcceleratorState.__init__

    def sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            # Where accelerate itself puts it at the end: later states are made of this one.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharding


def assert_sharded(trainer: Any) -> None:
    """Raises unless each process holds a part of every parameter of the policy and of its reference."""
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            whole = [name for name, value in model.named_parameters() if not isinstance(value, DTensor)]
            assert not whole, f"not sharded: {whole}"
