"""Image models: what the collator tokenizes trains as in stock TRL, and only what needs its tokens is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.Image import Transpose
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from dsel_trl import SelectionCallback
from dsel_trl.trainer.rows import content_id
from tests import images, tiny, weighted

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "sft": (SFTTrainer, SFTConfig),
    "messages": (SFTTrainer, SFTConfig),
    "kto": (KTOTrainer, KTOConfig),
}


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return images.build_model(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def make(image_model, tmp_path):
    """`make(kind, method, **parameters)`: a trainer on images, with a selection if a method is given."""

    def trainer(kind, method=None, *, dataset=None, config=None, **parameters):
        cls, args = TRAINERS[kind]
        config = {**tiny.COMMON, "max_length": None, "max_steps": 3, **(config or {})}
        made = cls(
            str(image_model),
            args=args(str(tmp_path / "out"), **config),
            train_dataset=images.pictures(kind) if dataset is None else dataset,
        )
        if method is not None:
            made.add_callback(SelectionCallback(made, method, **parameters))
        return made

    return trainer


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(("column", "parts"), [("images", False), ("image", False), ("images", True)])
def test_neutral_is_stock_bit_for_bit(make, kind, column, parts):
    dataset = images.pictures(kind, 12, column, parts)
    stock = make(kind, dataset=dataset)
    stock.train()
    mine = make(kind, "uniform", dataset=dataset, config={"save_strategy": "steps", "save_steps": 2})
    mine.train()
    assert tiny.losses_of(mine) == tiny.losses_of(stock)
    tiny.assert_same_weights(tiny.weights_of(mine), tiny.weights_of(stock))
    assert (Path(mine.args.output_dir) / "checkpoint-2" / "selection").is_dir()


class FirstGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = torch.cat([gradient.flatten() for gradient in weighted.gradients(model).values()]).double()


@pytest.mark.parametrize("kind", ["dpo", "sft", "messages"])
def test_weights_are_exact(make, kind):
    """With weight 0 for the other example of its batch, the gradient is that of one example alone."""
    config = {"max_steps": 1, "train_sampling_strategy": "sequential", "max_grad_norm": 1e9}
    method = weighted.FixedWeights(np.array([0.0, 2.0] * 6, dtype=np.float32))
    together = make(kind, method, config=config)
    alone = make(kind, dataset=images.pictures(kind).select([1]), config={**config, "per_device_train_batch_size": 1})
    gradients = []
    for trainer in (together, alone):
        keep = FirstGradient()
        trainer.add_callback(keep)
        trainer.train()
        gradients.append(keep.gradient)
    # SFT's loss is a mean over the tokens of the batch, those of weight 0 included: the direction is the same.
    torch.testing.assert_close(
        gradients[0] / gradients[0].norm(), gradients[1] / gradients[1].norm(), atol=1e-6, rtol=0
    )
    if kind == "dpo":
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def half_weighted(kind, swapped):
    """Every second example has weight 0; with `swapped` it has other words (as many) and its picture upside down."""

    def row(example, i):
        example["weight"] = float(i % 2)
        if swapped and not i % 2:
            example["images"] = [image.transpose(Transpose.ROTATE_180) for image in example["images"]]
            for name in {"chosen", "rejected", "completion", "messages"} & example.keys():
                for message in example[name]:
                    message["content"] = " ".join(reversed(message["content"].split()))
        return example

    return images.pictures(kind).map(row, with_indices=True, load_from_cache_file=False)


@pytest.mark.parametrize("kind", TRAINERS)
def test_rows_of_weight_zero_do_not_matter(make, kind):
    # KTO's KL term is estimated on all completions of a batch, whatever they weigh: this loss has none.
    config = {"loss_type": "apo_zero_unpaired"} if kind == "kto" else {}
    config |= {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.05}
    first, second, other = (
        make(kind, method, dataset=half_weighted(kind, swapped), config=config)
        for method, swapped in (("weight_column", False), ("weight_column", True), ("uniform", True))
    )
    for trainer in (first, second, other):
        trainer.train()
    weights = tiny.weights_of(first)
    for name, value in tiny.weights_of(second).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6, msg=name)
    assert any((value - weights[name]).abs().max() > 1e-4 for name, value in tiny.weights_of(other).items())


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("random", {"keep": 0.5}),
        ("curriculum", {"by": "column", "column": "difficulty", "action": "keep_top"}),
        ("curriculum", {"by": "loss", "action": "curriculum", "refresh": 1}),
        ("infobatch", {}),
    ],
)
def test_methods_that_read_no_tokens_train(make, kind, method, parameters):
    trainer = make(kind, method, config={"max_steps": -1}, **parameters)
    trainer.train()
    summary = json.loads((Path(trainer.args.output_dir) / "selection" / "summary.json").read_text())
    assert summary["tokens_skipped"] is None
    assert summary["examples_trained"] > 0
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert not [key for row in logged for key in row if key == "selection/tokens_skipped"]


def test_passes_over_images(make):
    trainer = make("dpo", "alignment_potential", keep=0.5)
    trainer.train()
    assert np.isfinite(trainer.selection.ledger["alignment_potential_implicit"]).all()


def test_a_checkpoint_knows_its_data(make, tmp_path):
    """(What stock transformers restores of this model's weights is its own affair: the examples are compared.)"""
    saving = {"max_steps": 6, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    whole = make("dpo", config=saving)
    witness = tiny.attach(whole, "random", keep=0.7)
    whole.train()
    resumed = make("dpo", config=saving)
    again = tiny.attach(resumed, "random", keep=0.7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.ids == witness.ids[2:]
    changed = make("dpo", config=saving, dataset=images.pictures("dpo", 12, parts=True))
    tiny.attach(changed, "random", keep=0.7)
    with pytest.raises(ValueError, match="dataset"):
        changed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.parametrize("kind", TRAINERS)
def test_ids_of_a_stream_of_images_follow_their_content(make, kind):
    """They are the same in every run: nothing of where an object lies is in them."""
    runs = []
    for _ in range(2):
        trainer = make(kind, dataset=images.pictures(kind).to_iterable_dataset(), config={"max_steps": 6})
        witness = tiny.attach(trainer, "weight_column")
        trainer.train()
        runs.append(witness.ids)
    assert runs[0] == runs[1]
    assert len({example for step in runs[0] for example in step}) == 12


def test_an_image_is_known_by_its_pixels():
    image = images.pictures("dpo")[0]["images"][0]
    row = {"images": [image], "messages": [{"role": "user", "content": [{"type": "image", "image": image}]}]}
    same = {
        "images": [image.copy()],
        "messages": [{"role": "user", "content": [{"type": "image", "image": image.copy()}]}],
    }
    assert content_id(row) == content_id(same)
    other = image.copy()
    other.putpixel((3, 4), (1, 2, 3))
    assert content_id({**row, "images": [other]}) != content_id(row)
    for changed in (image.transpose(Transpose.ROTATE_90), image.convert("L"), image.quantize(4), image.quantize(5)):
        assert content_id({**row, "images": [changed]}) != content_id(row)
    assert content_id({"raw": image.tobytes()}) != content_id({"raw": other.tobytes()})


class Decoder:
    """Shows nothing of itself, as what decodes sounds and videos does."""

    def __init__(self, path=None):
        if path is not None:
            self._hf_encoded = {"path": path, "bytes": None}


def test_what_shows_nothing_of_itself_has_no_address_in_the_id():
    assert content_id({"sound": Decoder("a.wav")}) == content_id({"sound": Decoder("a.wav")})
    assert content_id({"sound": Decoder("a.wav")}) != content_id({"sound": Decoder("b.wav")})
    kept = [Decoder(), Decoder()]
    assert content_id({"own": kept[0], "text": "a"}) == content_id({"own": kept[1], "text": "a"})
    assert content_id({"own": kept[0], "text": "a"}) != content_id({"own": kept[1], "text": "b"})


@pytest.mark.parametrize(
    ("kind", "method", "parameters"),
    [
        ("dpo", "length_curriculum", {}),
        ("sft", "token_budget", {"tokens": 200}),
        ("sft", "dataset_decomposition", {}),
        ("dpo", "curriculum", {"by": "length"}),
        ("sft", "curriculum", {"by": "rarity"}),
    ],
)
def test_only_what_needs_tokens_is_refused_by_name(make, kind, method, parameters):
    trainer = make(kind, method, **parameters)
    with pytest.raises(ValueError, match=rf"'{method}' cannot be used here: .*(tokenized when they|has no)"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("method", ["zip", "dsir"])
def test_texts_beside_images_are_read(make, method, tmp_path):
    parameters = {"keep": 0.5}
    if method == "dsir":
        (tmp_path / "target.txt").write_text("w1 w2 w3\nw4 w5 w6\n")
        parameters["target"] = str(tmp_path / "target.txt")
    trainer = make("dpo", method, dataset=images.pictures("dpo", 12, parts=True), **parameters)
    trainer.train()
    assert trainer.selection.ledger.dropped.sum() == 6
