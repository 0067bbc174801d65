"""Prefixes and samples of texts whose characters are several tokens."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsel_trl.data.build.continuations import Synthesis, prefix_of
from dsel_trl.trainer.generation import generate

TEXTS = ("Déjà vu à Noël, garçon.", "你好，世界。", "Cafe\u0301 👍🏽 and 👩‍👧 today")
# What must not begin the rest of a text that was cut: marks, skin colours, joiners, and what they join.
PARTS = ("\u0301", "🏽", "\u200d", "👧")


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    found = Tokenizer(models.BPE(vocabulary, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("text", TEXTS)
def test_a_prefix_ends_between_characters(tokenizer, text):
    whole = len(tokenizer(text)["input_ids"])
    assert whole == len(text.encode())
    ends = set()
    for count in range(whole + 1):
        prefix = prefix_of(text, tokenizer, Synthesis(prefix_tokens=count))
        assert text.startswith(prefix)
        assert len(prefix.encode()) <= count
        assert not text[len(prefix) :].startswith(PARTS)
        ends.add(len(prefix))
    # Everywhere else it can end.
    assert ends == {i for i in range(len(text) + 1) if not text[i:].startswith(PARTS)}


@pytest.mark.parametrize("text", TEXTS)
def test_a_sample_ends_with_a_whole_character(tokenizer, text, monkeypatch):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    written = tokenizer(text)["input_ids"]

    def write(input_ids, max_new_tokens, **how):
        return torch.cat([input_ids, torch.tensor([written[:max_new_tokens]] * len(input_ids))], dim=1)

    monkeypatch.setattr(model, "generate", write)
    holder = SimpleNamespace(model=model, model_wrapped=model, accelerator=Accelerator(cpu=True), _tokenizer=tokenizer)
    for cap in range(1, len(written) + 1):
        ((sample,),) = generate(holder, ["x"], max_new_tokens=cap)
        assert sample == text.encode()[:cap].decode(errors="ignore")
        assert generate(holder, ["x"], max_new_tokens=cap, whole=True) == [[""]]
