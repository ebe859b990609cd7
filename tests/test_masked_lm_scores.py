"""Figures of merit equal their definitions, computed naively; baselines are what they claim to be."""

import math

import numpy as np
import pytest
import torch

from protformer.alphabet import FIRST_RESIDUE, LAST_RESIDUE, MASK, NUM_TOKENS
from protformer.config import ExactConfig, MaskingConfig, ModelConfig
from protformer.corpus.masking import SHARES, mask_row
from protformer.corpus.packing import PackedRow
from protformer.evaluation.masked_lm import IGNORE, MaskedBatch, evaluate_masked_lm
from protformer.model.masked_lm_head import ProteinLanguageModel


def make_model():
    torch.manual_seed(0)
    config = ModelConfig(num_layers=1, num_heads=2, hidden_size=16, feed_forward_size=16, attention=ExactConfig())
    model = ProteinLanguageModel(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval().requires_grad_(False)


def make_batch(seed, rows=3, length=40):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FIRST_RESIDUE, LAST_RESIDUE + 1, (rows, length), generator=generator)
    asked = torch.rand(rows, length, generator=generator) < 0.2
    segments = torch.ones_like(tokens)
    segments[0, 30:], asked[0, 30:] = 0, False
    return MaskedBatch(
        inputs=torch.where(asked, MASK, tokens), targets=torch.where(asked, tokens, IGNORE), segments=segments
    )


def frequencies():
    weights = torch.zeros(NUM_TOKENS, dtype=torch.float64)
    weights[FIRST_RESIDUE : LAST_RESIDUE + 1] = torch.arange(1, 26)
    return weights / weights.sum()


def test_scores_equal_a_naive_count_over_all_asked_positions():
    model, batches = make_model(), [make_batch(1), make_batch(2, rows=2)]
    scores = evaluate_masked_lm(model, batches, frequencies())
    nll, unigram, correct, unigram_correct, gains = [], [], [], [], []
    for batch in batches:
        probabilities = model(batch.inputs, batch.segments).softmax(-1)
        for row in range(len(batch.inputs)):
            gain = []
            for column in range(batch.inputs.shape[1]):
                target = int(batch.targets[row, column])
                if target == IGNORE:
                    continue
                p, q = float(probabilities[row, column, target]), float(frequencies()[target])
                nll.append(-math.log(p))
                unigram.append(-math.log(q))
                gain.append(math.log(p / q))
                correct.append(int(probabilities[row, column].argmax()) == target)
                unigram_correct.append(target == LAST_RESIDUE)
            gains.append(gain)
    n = len(nll)
    assert scores.num_masked == n
    assert scores.perplexity == pytest.approx(math.exp(sum(nll) / n), rel=1e-4)
    assert scores.loss == pytest.approx(sum(nll) / n, rel=1e-4)
    assert scores.accuracy == pytest.approx(sum(correct) / n)
    assert scores.baseline_perplexity == pytest.approx(math.exp(sum(unigram) / n))
    assert scores.baseline_accuracy == pytest.approx(sum(unigram_correct) / n)
    mean = sum(map(sum, gains)) / n
    assert scores.log_likelihood_gain == pytest.approx(mean, rel=1e-4)
    variance = sum((sum(g) - len(g) * mean) ** 2 for g in gains) * len(gains) / (len(gains) - 1)
    assert scores.log_likelihood_gain_standard_error == pytest.approx(math.sqrt(variance) / n, rel=1e-4)


def test_how_positions_are_batched_changes_nothing():
    model, batch = make_model(), make_batch(1)
    rows = [
        MaskedBatch(
            inputs=batch.inputs[i : i + 1], targets=batch.targets[i : i + 1], segments=batch.segments[i : i + 1]
        )
        for i in range(3)
    ]
    one, many = (evaluate_masked_lm(model, b, frequencies()) for b in ([batch], rows))
    assert one.perplexity == pytest.approx(many.perplexity, rel=1e-5)
    assert one.log_likelihood_gain_standard_error == pytest.approx(many.log_likelihood_gain_standard_error, rel=1e-3)


def test_one_protein_has_no_standard_error():
    batch = make_batch(1)
    one = MaskedBatch(inputs=batch.inputs[:1], targets=batch.targets[:1], segments=(batch.segments[:1] > 0).long())
    assert evaluate_masked_lm(make_model(), [one], frequencies()).log_likelihood_gain_standard_error is None


def test_without_an_asked_position_there_are_no_scores():
    batch = make_batch(1)
    nothing = MaskedBatch(inputs=batch.inputs, targets=torch.full_like(batch.targets, IGNORE), segments=batch.segments)
    assert evaluate_masked_lm(make_model(), [nothing], frequencies()) is None
    assert evaluate_masked_lm(make_model(), [], frequencies()) is None


@pytest.mark.parametrize(("scheme", "accuracy"), [("bert", 0.178), ("protein_lm", 0.198)])
def test_the_copying_baseline_is_the_best_guess_of_who_ignores_context(scheme, accuracy):
    """Under BERT's scheme copying alone gives about 18 % and a perplexity near 15: a fact about the masking, not a
    model.

    Real residue frequencies (those of the shipped sample, rounded) make the figures comparable. Of the selected
    positions a tenth shows the right residue, and the most frequent residue is right at a tenth of the others.
    """
    order = "LAGVSERTIDPKQNFYMHWC"
    percent = [9.6, 8.2, 6.9, 6.6, 7.5, 6.4, 5.6, 5.6, 5.7, 5.5, 4.9, 5.5, 3.9, 4.1, 3.9, 2.9, 2.3, 2.3, 1.2, 1.4]
    p = torch.zeros(NUM_TOKENS, dtype=torch.float64)
    for letter, share in zip(order, percent, strict=True):
        p[FIRST_RESIDUE + "LAGVSERTIDPKQNFYMHWCXBUZO".index(letter)] = share
    p /= p.sum()
    rng = np.random.default_rng(0)
    tokens = rng.choice(NUM_TOKENS, 200_000, p=p.numpy()).astype(np.uint8)
    row = PackedRow(tokens=tokens, segments=np.ones(len(tokens), dtype=np.int32))
    masked = mask_row(row, MaskingConfig(scheme=scheme), rng)
    batch = MaskedBatch(
        inputs=torch.from_numpy(masked.inputs.astype(np.int64)).view(400, 500),
        targets=torch.from_numpy(masked.targets.astype(np.int64)).view(400, 500),
        segments=torch.ones(400, 500, dtype=torch.int64),
    )
    share_mask, share_random = SHARES[scheme]
    copying = (1 - share_mask - share_random, share_random)
    scores = evaluate_masked_lm(make_model(), [batch], p.clamp(min=1e-12), copying=copying)
    # Naively: 25 possible random residues hide 20 real ones; the posterior of each shown residue, summed over.
    shown = p[:, None] * (copying[0] * torch.eye(NUM_TOKENS) + copying[1] / 25 * residue_columns())
    expected = share_mask * p.max() + shown.amax(dim=0).sum()
    assert scores.baseline_accuracy == pytest.approx(float(expected), abs=0.007)
    assert (
        scores.baseline_perplexity < evaluate_masked_lm(make_model(), [batch], p.clamp(min=1e-12)).baseline_perplexity
    )
    if scheme == "bert":
        assert scores.baseline_accuracy == pytest.approx(accuracy, abs=0.01)
        assert scores.baseline_perplexity == pytest.approx(15, abs=0.5)


def residue_columns():
    columns = torch.zeros(NUM_TOKENS)
    columns[FIRST_RESIDUE : LAST_RESIDUE + 1] = 1
    return columns
