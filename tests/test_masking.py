"""Masking hits residues only, at the promised rates, and depends on nothing but its generator."""

import numpy as np
import pytest

from protformer.alphabet import CLS, EOS, FIRST_RESIDUE, LAST_RESIDUE, MASK, PAD
from protformer.config import MaskingConfig
from protformer.corpus.evaluation_rows import evaluation_rows
from protformer.corpus.masking import IGNORE, in_spans, mask_row, mask_row_for_evaluation, shift_row
from protformer.corpus.packing import PackedRow


def make_row(length=40_000, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(FIRST_RESIDUE, LAST_RESIDUE + 1, length).astype(np.uint8)
    tokens[99::100] = EOS
    segments = np.ones(length, dtype=np.int32)
    tokens[-200:], segments[-200:] = PAD, 0
    return PackedRow(tokens=tokens, segments=segments)


@pytest.mark.parametrize(("scheme", "shares"), [("bert", (0.8, 0.1, 0.1)), ("protein_lm", (0.1, 0.8, 0.1))])
def test_shares_of_mask_random_and_unchanged_are_those_of_the_scheme(scheme, shares):
    row = make_row()
    masked = mask_row(row, MaskingConfig(scheme=scheme), np.random.default_rng(1))
    asked = masked.targets != IGNORE
    num_residues = ((row.tokens >= FIRST_RESIDUE) & (row.tokens <= LAST_RESIDUE)).sum()
    # Four standard errors of a binomial share.
    assert abs(asked.sum() / num_residues - 0.15) < 4 * (0.15 * 0.85 / num_residues) ** 0.5
    shown, true = masked.inputs[asked], row.tokens[asked]
    is_mask, same = shown == MASK, shown == true
    # A random residue equals the true one once in 25.
    expected = (shares[0], shares[1] * 24 / 25, shares[2] + shares[1] / 25)
    for found, share in zip((is_mask.mean(), (~is_mask & ~same).mean(), same.mean()), expected, strict=True):
        assert abs(found - share) < 4 * (share * (1 - share) / asked.sum()) ** 0.5


def span_lengths(inside):
    """Lengths of the spans that begin and end within."""
    steps = np.diff(inside.astype(int))
    begins, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    ends = ends[ends > begins[0]]
    return ends - begins[: len(ends)]


@pytest.mark.parametrize(("rate", "mean_length"), [(0.15, 3.0), (0.15, 3.8), (0.3, 1.5), (0.5, 10.0)])
def test_spans_are_geometric_and_keep_the_rate(rate, mean_length):
    inside = np.stack([in_spans(2000, rate, mean_length, np.random.default_rng(seed)) for seed in range(300)])
    # Residues of a span go together, so the share's standard error is that of the spans, about sqrt(2 mean) larger.
    error = (rate * (1 - rate) / inside.size * 2 * mean_length) ** 0.5
    assert abs(inside.mean() - rate) < 5 * error
    at_ends = (rate * (1 - rate) / 300) ** 0.5
    for place in (0, 1, 999, 1999):
        assert abs(inside[:, place].mean() - rate) < 5 * at_ends
    lengths = np.concatenate([span_lengths(row) for row in inside])
    assert abs(lengths.mean() - mean_length) < 0.1 * mean_length
    assert abs((lengths == 1).mean() - 1 / mean_length) < 0.05


def test_a_span_has_one_fate_and_ends_with_its_protein():
    row = make_row(length=100_000)
    masked = mask_row(row, MaskingConfig(span_mean_length=6.0), np.random.default_rng(1))
    asked = masked.targets != IGNORE
    num_residues = ((row.tokens >= FIRST_RESIDUE) & (row.tokens <= LAST_RESIDUE)).sum()
    assert abs(asked.sum() / num_residues - 0.15) < 0.01
    shown = masked.inputs == MASK
    both = asked[1:] & asked[:-1]
    assert (shown[1:] == shown[:-1])[both].all()
    kept = asked & (masked.inputs == row.tokens)
    assert abs(shown[asked].mean() - 0.8) < 0.05
    assert abs(kept[asked].mean() - 0.1 - 0.1 / 25) < 0.04
    # Spans on both sides of an EOS decide for themselves: 80 % of 80 % and 20 % of 20 % agree by chance.
    eos = np.flatnonzero(row.tokens == EOS)
    eos = eos[(eos > 0) & (eos < len(row.tokens) - 1)]
    across = eos[asked[eos - 1] & asked[eos + 1]]
    assert 0.4 < (shown[across - 1] == shown[across + 1]).mean() < 0.95


def test_special_tokens_and_padding_are_never_selected_and_nothing_else_changes():
    row = make_row()
    for masked in (
        mask_row(row, MaskingConfig(rate=1.0), np.random.default_rng(1)),
        mask_row_for_evaluation(row, 1.0, np.random.default_rng(1)),
    ):
        special = (row.tokens == EOS) | (row.segments == 0)
        assert (masked.targets[special] == IGNORE).all()
        assert (masked.targets[~special] == row.tokens[~special]).all()
        assert (masked.inputs[special] == row.tokens[special]).all()


def test_unselected_positions_show_their_own_token():
    row = make_row()
    masked = mask_row(row, MaskingConfig(), np.random.default_rng(1))
    rest = masked.targets == IGNORE
    assert (masked.inputs[rest] == row.tokens[rest]).all()


def test_evaluation_shows_mask_at_every_selected_position():
    masked = mask_row_for_evaluation(make_row(), 0.15, np.random.default_rng(1))
    assert (masked.inputs[masked.targets != IGNORE] == MASK).all()


def test_the_same_generator_gives_the_same_mask():
    first, second, other = (mask_row(make_row(), MaskingConfig(), np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(first.inputs, second.inputs)
    assert not np.array_equal(first.inputs, other.inputs)


def test_shifted_rows_see_the_past_of_their_own_protein_only():
    a, b, c = FIRST_RESIDUE, FIRST_RESIDUE + 1, FIRST_RESIDUE + 2
    row = PackedRow(
        tokens=np.array([a, b, EOS, c, EOS, PAD], dtype=np.uint8), segments=np.array([1, 1, 1, 2, 2, 0], dtype=np.int32)
    )
    shifted = shift_row(row)
    assert shifted.inputs.tolist() == [CLS, a, b, CLS, c, PAD]
    assert shifted.targets.tolist() == [a, b, EOS, c, EOS, IGNORE]


def proteins():
    rng = np.random.default_rng(4)
    return [rng.integers(FIRST_RESIDUE, LAST_RESIDUE + 1, n).astype(np.uint8) for n in (30, 200, 5, 90, 400)]


def asked_by_protein(rows, direction="bidirectional"):
    return [
        (batch.inputs[i][batch.segments[i] > 0].tobytes(), batch.targets[i][batch.segments[i] > 0].tobytes())
        for batch in rows
        for i in range(len(batch.inputs))
    ]


def test_a_protein_has_the_same_evaluation_mask_in_any_company():
    def score(some, max_tokens):
        return asked_by_protein(evaluation_rows(some, direction="bidirectional", rate=0.15, max_tokens=max_tokens))

    together = score(proteins(), 100_000)
    assert score(proteins(), 1) == together
    assert score(proteins()[::-1], 600) == together
    assert [score([protein], 100)[0] for protein in sorted(proteins(), key=len, reverse=True)] == together


def test_evaluation_batches_stay_within_the_budget_unless_one_protein_exceeds_it():
    batches = list(evaluation_rows(proteins(), direction="bidirectional", rate=0.15, max_tokens=402))
    assert all(batch.inputs.size <= 402 for batch in batches)
    assert sum(len(batch.inputs) for batch in batches) == 5


def test_a_unidirectional_evaluation_asks_for_every_residue_and_not_for_eos():
    (batch,) = evaluation_rows(proteins()[:1], direction="unidirectional", rate=0.15, max_tokens=100)
    assert batch.targets[0].tolist() == [*proteins()[0].tolist(), IGNORE]
    assert batch.inputs[0].tolist() == [CLS, *proteins()[0].tolist()]
