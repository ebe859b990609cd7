"""From packed rows to what a model sees and what it has to say.

In: a `PackedRow` and a generator that belongs to that row alone. Out: a `MaskedRow`. Three tasks:

- `mask_row`: masked language modelling for training (Devlin et al. 2019, section 3.1), of single residues or of spans
  (Joshi et al. 2020, section 3.1, without their cap of 10 on the length).
- `mask_row_for_evaluation`: every selected position shows MASK. Under 80/10/10 a model that copies visible residues
  already reaches 18 % accuracy, which says nothing about what it learned.
- `shift_row`: next-residue prediction; inputs are the targets moved one to the right, behind a `<cls>` for each protein
  or window (the released protein_lm code puts its BOS there).

Special tokens are never selected, and neither is padding.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import CLS, FIRST_RESIDUE, LAST_RESIDUE, MASK
from protformer.config import MaskingConfig
from protformer.corpus.packing import PackedRow

IGNORE = -100
"""Target of a position that is not asked for; torch's cross_entropy skips this number by default."""

SHARES = {"bert": (0.8, 0.1), "protein_lm": (0.1, 0.8)}
"""Of the selected positions: the shares that show MASK and a random residue; the rest is unchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedRow:
    """One row as the model sees it, with what it is asked for."""

    inputs: NDArray[np.uint8]
    """(residue,) tokens shown."""
    targets: NDArray[np.int16]
    """(residue,) token to predict, or IGNORE."""
    segments: NDArray[np.int32]
    """(residue,) 0 for padding, else the number of the protein (isolate) or 1 (attend)."""


def mask_row(row: PackedRow, masking: MaskingConfig, generator: np.random.Generator) -> MaskedRow:
    """Select each residue with probability `masking.rate`; show MASK, a random residue or the residue itself.

    Neighbouring residues of one span share that fate. Random residues are drawn uniformly from the 25 residue letters,
    one by one, as the released protein_lm code does.
    """
    if masking.span_mean_length == 1.0:
        selected = _select(row, masking.rate, generator)
        fate = generator.random(row.tokens.shape, dtype=np.float32)
    else:
        selected = _is_residue(row) & in_spans(len(row.tokens), masking.rate, masking.span_mean_length, generator)
        fate = _fate_of_spans(selected, row.segments, generator)
    random_residues = generator.integers(FIRST_RESIDUE, LAST_RESIDUE + 1, row.tokens.shape, dtype=np.uint8)
    share_mask, share_random = SHARES[masking.scheme]
    inputs = row.tokens.copy()
    inputs[selected & (fate < share_mask)] = MASK
    replaced = selected & (fate >= share_mask) & (fate < share_mask + share_random)
    inputs[replaced] = random_residues[replaced]
    return MaskedRow(inputs=inputs, targets=_targets(row, selected), segments=row.segments)


def in_spans(length: int, rate: float, mean_length: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """(length,) whether each position lies in a span: each does with probability `rate`, spans have geometric lengths.

    Spans and the gaps between them alternate, both geometric, which makes a Markov chain of two states; it starts in
    its stationary distribution, so that all positions are equal. Gaps have the mean that gives the rate.
    """
    mean_gap = mean_length * (1.0 - rate) / rate
    starts_inside = generator.random() < rate
    num_runs = 2 + int(2 * length / (mean_length + mean_gap))
    ends = np.zeros(1, dtype=np.int64)
    while ends[-1] < length:
        runs = np.empty((num_runs, 2), dtype=np.int64)
        runs[:, 0] = generator.geometric(1.0 / (mean_length if starts_inside else mean_gap), num_runs)
        runs[:, 1] = generator.geometric(1.0 / (mean_gap if starts_inside else mean_length), num_runs)
        ends = np.append(ends, ends[-1] + np.cumsum(runs))
    # Runs alternate, so a position's side is the parity of the runs that ended at or before it.
    ended = np.cumsum(np.bincount(ends[1:][ends[1:] < length], minlength=length))
    inside: NDArray[np.bool_] = (ended % 2 == 0) == starts_inside
    return inside


def mask_row_for_evaluation(row: PackedRow, rate: float, generator: np.random.Generator) -> MaskedRow:
    """Select as in training, and show MASK at every selected position."""
    selected = _select(row, rate, generator)
    return MaskedRow(
        inputs=np.where(selected, np.uint8(MASK), row.tokens),
        targets=_targets(row, selected),
        segments=row.segments,
    )


def shift_row(row: PackedRow) -> MaskedRow:
    """Ask every position for its own token, shown those before it in its segment.

    Tokens A B <eos> C D <eos> in segments 1 1 1 2 2 2 become inputs <cls> A B <cls> C D with targets A B <eos> C D
    <eos>.
    """
    inputs = np.empty_like(row.tokens)
    inputs[0], inputs[1:] = CLS, row.tokens[:-1]
    inputs[1:][row.segments[1:] != row.segments[:-1]] = CLS
    inputs[row.segments == 0] = row.tokens[row.segments == 0]
    return MaskedRow(inputs=inputs, targets=_targets(row, row.segments > 0), segments=row.segments)


def _select(row: PackedRow, rate: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    return _is_residue(row) & (generator.random(row.tokens.shape, dtype=np.float32) < rate)


def _is_residue(row: PackedRow) -> NDArray[np.bool_]:
    return (row.tokens >= FIRST_RESIDUE) & (row.tokens <= LAST_RESIDUE) & (row.segments > 0)


def _fate_of_spans(
    selected: NDArray[np.bool_], segments: NDArray[np.int32], generator: np.random.Generator
) -> NDArray[np.float32]:
    """A random number for each run of selected positions, on all of them; a run ends where its protein does."""
    begins = selected.copy()
    begins[1:] &= ~selected[:-1] | (segments[1:] != segments[:-1])
    span = np.cumsum(begins)
    return generator.random(int(span[-1]) + 1, dtype=np.float32)[span]


def _targets(row: PackedRow, selected: NDArray[np.bool_]) -> NDArray[np.int16]:
    return np.where(selected, row.tokens.astype(np.int16), np.int16(IGNORE))
