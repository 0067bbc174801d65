"""The run of a trainer, as its methods see it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.costs import Costs
from ..core.data_passes import Passes
from ..core.ledger import Ledger
from ..core.run import Run
from ..data.rows import Rows
from ..signals.batch import Batch
from .forwards import refer, restart
from .generation import generate
from .gradients import ModelGradients
from .helper_run import train_helper
from .kinds import trainer_kind
from .rows import load_named, prepare_rows
from .schedule import restart_rate


def run_of(
    trainer: Any,
    rows: Rows | None,
    ledger: Ledger,
    costs: Costs,
    forward: Callable[..., Batch],
    **what: Any,
) -> Run:
    """
    The [`Run`] that the methods of a trainer get: its rows and models, and what it can do for them.

    Args:
        trainer:
            The trainer.
        rows ([`Rows`], *optional*):
            The training rows; `None` for a stream.
        ledger ([`Ledger`]), costs ([`Costs`]):
            Where the run writes what it knows and what it spends.
        forward (`Callable`):
            Measures collated rows: `forward(inputs, ids, **how)`.
        what:
            The other fields of [`Run`].
    """
    args, accelerator = trainer.args, trainer.accelerator

    run = Run(
        trainer=trainer_kind(trainer).name,
        ledger=ledger,
        training_rows=rows,
        arguments=args,
        output_dir=args.output_dir,
        processing_class=trainer.processing_class,
        model=trainer.model,
        reference=getattr(trainer, "ref_model", None),
        passes=Passes(
            rows=lambda: run.rows,
            forward=forward,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            total=lambda values: accelerator.reduce(values.to(accelerator.device), "sum"),
            costs=costs,
        ),
        prepare=partial(prepare_rows, trainer),
        load=partial(load_named, trainer),
        train_helper=partial(train_helper, trainer),
        generate=partial(generate, trainer, costs=costs),
        refer=partial(refer, trainer),
        restart=partial(restart, trainer),
        restart_rate=partial(restart_rate, trainer),
        gradients=ModelGradients(trainer, costs, forward),
        costs=costs,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epochs=args.num_train_epochs,
        world=accelerator.num_processes,
        sharded=trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        **what,
    )
    return run
