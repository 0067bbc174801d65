"""What the tests of `dsel ablate` share: a recipe on tiny pairs, and cells that run in this process."""

import pytest
import yaml

from dsel_trl.commands import ablation_workers
from dsel_trl.commands.ablation_cells import work
from tests import tiny


@pytest.fixture
def base(tmp_path, model, monkeypatch):
    """Writes a recipe of an ablation on 24 tiny pairs, of which every third label is known to be flipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tiny.preferences(24)
    rows = rows.remove_columns([name for name in ("score_chosen", "score_rejected") if name in rows.column_names])
    rows = rows.add_column("truth_flipped", [i % 3 == 0 for i in range(24)])
    # Only flipped pairs have a negative margin: keeping the upper two thirds drops exactly those.
    rows = rows.add_column("score_chosen", [float(i % 3) for i in range(24)]).add_column("score_rejected", [0.5] * 24)
    rows.to_parquet(tmp_path / "pairs.parquet")

    def write(ablate, **changes):
        values = {
            "dataset_name": str(tmp_path / "pairs.parquet"),
            "eval_dataset_name": str(tmp_path / "pairs.parquet"),
            "model_name_or_path": str(model),
            "output_dir": str(tmp_path / "out"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "ablate": ablate,
            **changes,
        }
        path = tmp_path / "base.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def in_process(monkeypatch):
    """Cells run here, one after the other, instead of in processes; returns the names of their folders as they run."""
    ran = []

    def run(self, spec):
        ran.append(spec.parent.name)
        work(spec)

    monkeypatch.setattr(ablation_workers.Worker, "run", run)
    return ran
