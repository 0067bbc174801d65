"""`dsel` takes what TRL's own commands take, and the keys of a selection's settings."""

import json
import logging

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForSequenceClassification

from dsel_trl.cli import main
from tests import tiny

TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


@pytest.fixture(autouse=True)
def clean_run(tmp_path, monkeypatch):
    """Each test in its own folder; the program's log handler is not kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    logging.getLogger("dsel_trl").handlers.clear()
    logging.getLogger("dsel_trl").propagate = True


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory):
    """The tiny model with a chat template, and as a reward model."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    LlamaForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(folder / "reward")
    for name in ("", "reward"):
        tokenizer.save_pretrained(folder / name)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        if (model / name).is_file():
            (folder / name).write_bytes((model / name).read_bytes())
    return folder


def said(role, text):
    return [{"role": role, "content": text}]


ASKED, GOOD, BAD = said("user", "w1 w2"), said("assistant", "w3 w4"), said("assistant", "w5 w6 w7")
FORMS = {
    "sft": {
        "text": {"text": "w1 w2 w3"},
        "prompt and completion": {"prompt": "w1 w2", "completion": " w3"},
        "conversational prompt and completion": {"prompt": ASKED, "completion": GOOD},
        "messages": {"messages": ASKED + GOOD},
        "conversations": {"conversations": [{"from": "user", "value": "w1"}, {"from": "assistant", "value": "w2"}]},
        "tokens": {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]},
        "tools": {"messages": ASKED + GOOD, "tools": json.dumps([{"type": "function", "function": {"name": "f"}}])},
        "a text label": {"prompt": "w1 w2", "completion": " w3", "label": "unsafe"},
    },
    "dpo": {
        "explicit prompt": {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"},
        "implicit prompt": {"chosen": "w1 w2 w3", "rejected": "w1 w2 w4"},
        "conversational": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        "conversational, implicit prompt": {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        "a text label": {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4", "label": "unsafe"},
    },
    "kto": {
        "judged": {"prompt": "w1 w2", "completion": " w3", "label": True},
        "conversational": {"prompt": ASKED, "completion": GOOD, "label": False},
        "pairs": {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"},
        "pairs, implicit prompt": {"chosen": "w1 w2 w3", "rejected": "w1 w2 w4"},
    },
    "reward": {
        "explicit prompt": {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"},
        "implicit prompt": {"chosen": "w1 w2 w3", "rejected": "w1 w2 w4"},
        "conversational": {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        "tokens": {"chosen_ids": [3, 4], "rejected_ids": [3, 5, 6]},
        "tokens, old names": {"chosen_input_ids": [3, 4], "rejected_input_ids": [3, 5, 6]},
    },
}


def command(kind, data, chat_model, tmp_path, **changes):
    words = {
        "dataset_name": data,
        "model_name_or_path": chat_model / "reward" if kind == "reward" else chat_model,
        "output_dir": tmp_path / "out",
        "selection": "[{name: uniform}]",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        **changes,
    }
    return [kind, *(word for key, value in words.items() for word in (f"--{key}", str(value)))]


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind, forms in FORMS.items() for form in forms])
def test_every_form_that_trl_takes(chat_model, tmp_path, kind, form):
    Dataset.from_list([FORMS[kind][form]] * 4).to_parquet(tmp_path / "rows.parquet")
    assert main(command(kind, tmp_path / "rows.parquet", chat_model, tmp_path)) == 0
    summary = json.loads((tmp_path / "out" / "selection" / "summary.json").read_text())
    assert summary["examples_trained"] == 4


def test_settings_of_a_selection(chat_model, tmp_path, capsys):
    rows = tiny.preferences(8).add_column("source", ["web", "code"] * 4)
    rows = rows.map(lambda row, i: {"rejected": row["chosen"]} if i < 2 else {}, with_indices=True)
    rows.to_parquet(tmp_path / "rows.parquet")
    settings = {"log_by": "source", "identical": "drop"}
    assert main(command("dpo", tmp_path / "rows.parquet", chat_model, tmp_path, max_steps=-1, **settings)) == 0
    summary = json.loads((tmp_path / "out" / "selection" / "summary.json").read_text())
    assert summary["examples_identical"] == 2
    assert summary["log_by"]["source"]["web"]["examples"] == 4
    for wrong, message in (({"identical": "dorp"}, "'dorp'"), ({"log_by": "sourse"}, "'sourse'")):
        assert main(command("dpo", tmp_path / "rows.parquet", chat_model, tmp_path, output_dir="new", **wrong)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    without = {"output_dir": "new", "selection": "[]", "log_by": "source"}
    assert main(command("dpo", tmp_path / "rows.parquet", chat_model, tmp_path, **without)) == 2
    assert "add a block `selection:`" in capsys.readouterr().err
