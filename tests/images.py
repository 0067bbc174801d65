"""A tiny model that reads images, its processor and datasets with images, all made from configurations."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<image>", "user:", "assistant:"]
NUMBERS = ("weight", "difficulty", "score_chosen", "score_rejected")
SIDE, PATCH = 16, 8
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %} "
    "{% if message['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def build_model(folder: str | os.PathLike) -> Path:
    """Saves a two-layer Llava (float32) with its processor, which needs Pillow only."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=16,
        ),
        image_token_index=vocabulary["<image>"],
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _said(rng: np.random.Generator, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": " ".join(rng.choice(WORDS, size=int(rng.integers(2, 7))))}]


def _in_parts(messages: list[dict[str, Any]], image: bool) -> list[dict[str, Any]]:
    """The same messages with contents in parts, as many image datasets have them."""
    return [
        {
            "role": message["role"],
            "content": [
                *([{"type": "image", "text": None}] if image else []),
                {"type": "text", "text": message["content"]},
            ],
        }
        for message in messages
    ]


@cache
def pictures(kind: str, size: int = 12, column: str = "images", parts: bool = False) -> Dataset:
    """
    Examples with one image each: `kind` is `"dpo"`, `"sft"` (prompt and completion), `"messages"` or `"kto"`.

    `column` says whether a row has an `image` or a list of `images`, `parts` whether contents come in parts.
    """
    rng = np.random.default_rng([size, 5])
    rows: list[dict[str, Any]] = []
    for _ in range(size):
        image = Pillow.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
        asked, said, worse = _said(rng, "user"), _said(rng, "assistant"), _said(rng, "assistant")
        if parts:
            asked, said, worse = _in_parts(asked, True), _in_parts(said, False), _in_parts(worse, False)
        row: dict[str, Any] = {column: [image] if column == "images" else image}
        row |= {
            "dpo": {"prompt": asked, "chosen": said, "rejected": worse},
            "sft": {"prompt": asked, "completion": said},
            "messages": {"messages": asked + said},
            "kto": {"prompt": asked, "completion": said, "label": bool(rng.random() < 0.5)},
        }[kind]
        row |= {name: float(rng.uniform(0.2, 2.0)) for name in NUMBERS}
        rows.append(row)
    content = List({"type": Value("string"), "text": Value("string")}) if parts else Value("string")
    messages = List({"role": Value("string"), "content": content})
    features: dict[str, Any] = {column: List(Image()) if column == "images" else Image()}
    features |= dict.fromkeys(("prompt", "chosen", "rejected", "completion", "messages"), messages)
    features |= {"label": Value("bool"), **{name: Value("float64") for name in NUMBERS}}
    return Dataset.from_list(rows, features=Features({name: features[name] for name in rows[0]}))
