"""Every grid of `recipes/ablations/` is read, its methods fit together, and two keys put other data in its place."""

from pathlib import Path

import pytest
from datasets import Dataset

from dsel_trl.commands.ablate import Ablation
from tests import tiny

FILES = sorted((Path(__file__).parents[1] / "recipes" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_grid_takes_other_data_and_another_model(path, tmp_path, model, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "test"):
        rows: Dataset = tiny.preferences(16)
        for name in ("score_chosen", "score_rejected"):
            rows = rows.remove_columns([name]) if name in rows.column_names else rows
            rows = rows.add_column(name, [float(i) for i in range(16)])
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    words = ["--dataset_name", str(tmp_path / "data"), "--model_name_or_path", str(model)]
    ablation = Ablation(["--config", str(path), *words, "--output_dir", str(tmp_path / "out")])
    assert len(ablation.grid.seeds) >= 3
    assert ablation.grid.variants()
    assert f"recipes/ablations/{path.name}" in path.read_text()
    assert ablation.config["model_name_or_path"] == str(model)
