"""Columns of a dataset: read in one place, which gives no method the truth of a test."""

import ast
from pathlib import Path

import numpy as np
import pytest

import dsel_trl
from dsel_trl import SelectionCallback, create_method
from dsel_trl.data import columns
from tests import tiny

PACKAGE = Path(dsel_trl.__file__).parent
TRUE = {
    "truth_vectors": [[float(i), 1.0 + i % 3] for i in range(40)],
    "truth_number": [float(i % 5) for i in range(40)],
    "truth_name": [str(i % 2) for i in range(40)],
    "truth_texts": [["w1 w2", "w3"]] * 40,
}
READERS = {
    "semdedup": ("sft", {"embedding": "column:truth_vectors", "clusters": 2}),
    "d4": ("sft", {"embedding": "column:truth_vectors", "clusters": 2}),
    "deita-embedding": (
        "sft",
        {"embedding": "column:truth_vectors", "complexity_column": "weight", "quality_column": "weight"},
    ),
    "deita-complexity": ("sft", {"complexity_column": "truth_vectors", "quality_column": "weight"}),
    "deita-quality": ("sft", {"complexity_column": "weight", "quality_column": "truth_number"}),
    "ifd": ("sft", {"diverse": 0.05, "embedding": "column:truth_vectors"}),
    "jest": ("sft", {"loss_column": "weight", "diversity": 1.0, "embedding": "column:truth_vectors"}),
    "jest-losses": ("sft", {"loss_column": "truth_number"}),
    "rho1": ("sft", {"clean_column": "truth_number"}),
    "rho_loss": ("sft", {"source": "column", "column": "truth_number"}),
    "s2l-trajectories": ("sft", {"trajectory_column": "truth_vectors"}),
    "s2l-sources": ("sft", {"trajectory_column": "vectors", "source_column": "truth_name"}),
    "dsir": ("sft", {"target_column": "truth_number"}),
    "curriculum": ("sft", {"by": "column", "column": "truth_number"}),
    "weight_column": ("sft", {"column": "truth_number"}),
    "alignment_potential": ("dpo", {"all_scores_column": "truth_vectors"}),
    "bees": ("dpo", {"sources": ["column:truth_number"]}),
    "selective_dpo": ("dpo", {"source": "column", "column": "truth_number"}),
    "margin": ("dpo", {"source": "explicit", "score_chosen_column": "truth_number"}),
    "curry_dpo-responses": ("dpo", {"responses_column": "truth_texts", "scores_column": "vectors"}),
    "curry_dpo-scores": ("dpo", {"responses_column": "texts", "scores_column": "truth_vectors"}),
    "inco_dpo": ("dpo", {"reward": len, "response_column": "truth_name"}),
}


def rows(kind):
    data = tiny.DATASETS[kind]()
    for name, values in TRUE.items():
        data = data.add_column(name, values).add_column(name.removeprefix("truth_"), values)
    return data


@pytest.mark.parametrize("name", READERS)
def test_no_method_reads_the_truth(make_trainer, name):
    kind, parameters = READERS[name]
    trainer = make_trainer(kind, dataset=rows(kind), max_steps=1)
    with pytest.raises(ValueError, match=r"'truth_\w+' holds the answers"):  # noqa: PT012
        SelectionCallback(trainer, name.partition("-")[0], **parameters)
        trainer.train()


def test_a_function_of_rows_does_not_see_the_truth(make_trainer):
    seen = []

    def guideline(row):
        seen.append(row)
        return "w1"

    trainer = make_trainer("sft", dataset=rows("sft"), max_steps=1)
    SelectionCallback(trainer, create_method("edge", guideline=guideline))
    trainer.train()
    assert len(seen) > 40
    assert all(row["number"] is not None and not any(key.startswith("truth_") for key in row) for row in seen)


def test_a_missing_column_is_named(make_trainer):
    run = SelectionCallback(make_trainer("sft", dataset=rows("sft")), "uniform").run
    assert np.array(run.values("vectors")).shape == (40, 2)
    with pytest.raises(ValueError, match=r"'nothing'.*'vectors'"):
        run.values("nothing")
    with pytest.raises(ValueError, match="'truth_vectors' holds the answers"):
        run.values("truth_vectors")


@pytest.mark.parametrize("read", ["numeric_column", "list_lengths", "codes", "column_values"])
def test_every_reader_refuses_the_truth(read):
    data = rows("sft")
    with pytest.raises(ValueError, match="holds the answers"):
        getattr(columns, read)(data, "truth_number")


def test_codes_tell_values_apart():
    data = tiny.Dataset.from_dict({"origin": ["b", "a", None, "b", None]})
    found = columns.codes(data, "origin")
    assert found[0] == found[3] != found[1]
    assert found[2] == found[4]
    assert len(set(found.tolist())) == 3


@pytest.mark.parametrize(
    "path",
    [path for room in ("methods", "bases", "scorers", "core") for path in sorted((PACKAGE / room).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_method_reads_columns_by_itself(path):
    """`dataset[name]` and its relatives go round the one place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).split(".")[-1] == "dataset":
            assert isinstance(node.slice, ast.Constant), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith(
            ("dataset.select_columns", "dataset.with_format", "dataset.to_dict", "dataset.to_pandas", "dataset.iter")
        ):
            pytest.fail(f"{path.name}:{node.lineno}")
