"""What texts repeat and share, and the statistics of tokens."""

import numpy as np
import pytest
import torch

from dsel_trl.functional.audit.pair_texts import groups_of, relevance, repeats
from dsel_trl.functional.audit.token_statistics import NAMES, response_statistics, token_values
from dsel_trl.functional.preference.soft_labels import soft_label_gate_weight, soft_label_loss


def test_repeats_and_contradictions():
    prompts = ["p", "p", "p ", "p", "q"]
    chosen = ["a", "a", "a\n", "b", "c"]
    rejected = ["b", "b", "b", "a", "c"]
    found = repeats(prompts, chosen, rejected)
    assert found.identical.tolist() == [False, False, False, False, True]
    assert found.duplicate.tolist() == [-1, 0, 0, -1, -1]
    assert found.contradicts.tolist() == [3, 3, 3, 0, -1]
    assert groups_of(prompts).tolist() == [0, 0, 0, 0, 1]


def test_rare_words_of_the_prompt_speak_for_a_response():
    prompts = ["tell me of the zebra", "tell me of the tides"]
    zebra, tides = "the zebra runs", "the tides come"
    own, shared = relevance(prompts, [zebra, zebra], [tides, tides])
    assert (own[0, :4] > 0).all()
    assert (own[1, :4] < 0).all()
    back, same = relevance(prompts, [tides, tides], [zebra, zebra])
    assert back == pytest.approx(-own)
    assert same == pytest.approx(shared)
    assert shared[0, 0] == pytest.approx(1 / 5)


def test_statistics_of_a_response():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(7)
    values = token_values(logits, tokens)
    logps = logits.log_softmax(-1)
    assert values[0] == pytest.approx(logps[range(7), range(7)])
    assert values[1] == pytest.approx(torch.distributions.Categorical(logits=logits).entropy(), abs=1e-5)
    assert values[2].tolist() == (logits.argmax(-1) == tokens).float().tolist()
    found = dict(zip(NAMES, response_statistics(values, values[0] - 1).tolist(), strict=True))
    assert found["gain_sum"] == pytest.approx(7, abs=1e-4)
    assert found["length"] == 7
    assert found["quantile_0"] == pytest.approx(float(values[0].min()))
    assert torch.isfinite(response_statistics(values[:, :1], values[0, :1])).all()
    assert torch.isnan(response_statistics(values[:, :0], values[0, :0])).all()


def test_factors_give_the_gradient_of_soft_labels():
    margin = torch.tensor([-2.0, 0.0, 1.5, 4.0], requires_grad=True)
    wrong = torch.tensor([0.0, 0.3, 1.0, 0.6])
    (expected,) = torch.autograd.grad(soft_label_loss(margin, wrong).sum(), margin)
    factor = soft_label_gate_weight(margin, wrong)
    assert (factor * -torch.sigmoid(-margin.detach())).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert float(factor[0]) == 1.0
    assert float(factor[2]) == pytest.approx(-np.exp(1.5), rel=1e-5)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        soft_label_loss(margin, wrong + 1)
