"""What texts repeat and share, and the statistics of tokens."""

import numpy as np
import pytest
import torch

from dsel_trl.functional.audit.pair_texts import compared_elsewhere, groups_of, relevance, repeats
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
    own, alone = values[:, None], values[:1] - 1
    found = dict(zip(NAMES, response_statistics(own, alone, torch.tensor([7]))[0].tolist(), strict=True))
    assert found["gain_sum"] == pytest.approx(7, abs=1e-4)
    assert found["length"] == 7
    assert found["quantile_0"] == pytest.approx(float(values[0].min()))


def statistics_of_one(given, alone):
    """The statistics of one response, written down one after the other."""
    logps, entropy, top, rank = given
    gain, surprise, half = logps - alone, -logps - entropy, len(logps) // 2
    single = [
        logps.sum(),
        logps.mean(),
        len(logps),
        np.log(len(logps)),
        alone.sum(),
        alone.mean(),
        gain.sum(),
        gain.mean(),
        logps.std(),
        entropy.mean(),
        entropy.std(),
        surprise.mean(),
        surprise.std(),
        top.mean(),
        rank.mean(),
        gain.std(),
        logps[0],
        logps[-1],
        gain[:4].mean(),
        logps[:4].mean(),
        np.abs(np.diff(logps)).mean() if len(logps) > 1 else 0.0,
        logps[half:].mean() - logps[: max(half, 1)].mean(),
    ]
    levels = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
    tails = [np.quantile(surprise, (0.5, 0.9, 0.95)), np.quantile(rank, (0.5, 0.9, 0.95))]
    return np.concatenate([single, np.quantile(logps, levels), np.quantile(gain, levels), *tails])


def test_statistics_of_a_batch_are_those_of_each_response():
    rng = np.random.default_rng(0)
    sizes = [1, 2, 3, 5, 17, 64, 0]
    given, alone = np.full((4, 7, 64), np.nan), np.full((7, 64), np.nan)
    for i, size in enumerate(sizes):
        given[:, i, :size], alone[i, :size] = rng.normal(-2, 1, (4, size)), rng.normal(-3, 1, size)
    found = response_statistics(torch.tensor(given).float(), torch.tensor(alone).float(), torch.tensor(sizes)).numpy()
    for i, size in enumerate(sizes[:-1]):
        expected = statistics_of_one(given[:, i, :size], alone[i, :size])
        assert found[i] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.isnan(found[-1]).all()


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


def test_other_comparisons_of_the_same_responses_judge_a_pair_and_never_its_own_label():
    prompts = ["p"] * 4 + ["q"]
    chosen, rejected = ["a", "b", "c", "a", "x"], ["b", "c", "a", "b", "y"]
    # a > b twice, b > c, c > a: of a-b, a has lost to c and b has won against c.
    found = compared_elsewhere(prompts, chosen, rejected)
    assert found.tolist() == pytest.approx([-1.0, -2 / 3 - 1 / 2, -1 / 2 - 2 / 3, -1.0, 0.0])
    turned = compared_elsewhere(prompts, ["b", "b", "c", "b", "x"], ["a", "c", "a", "a", "y"])
    assert turned[[0, 3]].tolist() == [1.0, 1.0]
    assert compared_elsewhere(["p"], ["a"], ["a "]).tolist() == [0.0]
