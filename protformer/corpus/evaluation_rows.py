"""Proteins to padded rows for scoring a language model: each protein alone, whole, with a mask that is its own.

In: proteins as token arrays. Out: `MaskedRow`s whose arrays are (batch, residue). A protein's mask depends on its
residues only: not on its neighbours, the batch, or the order of the file. So the same file gives the same figure in
`train` and in `evaluate`, whatever the memory budget.
"""

import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import EOS, PAD
from protformer.config import Direction, MaskingConfig
from protformer.corpus.masking import IGNORE, MaskedRow, mask_row, mask_row_for_evaluation, shift_row
from protformer.corpus.packing import PackedRow

CHUNK_RESIDUES = 1_000_000

EVALUATION_RATE = 0.15
"""Share of residues asked for, whatever rate a model was trained with, so that figures of different models compare."""


def evaluation_rows(
    proteins: Iterable[NDArray[np.uint8]],
    *,
    direction: Direction,
    rate: float,
    training_masking: MaskingConfig | None = None,
    max_tokens: int,
    leading: bytes = b"",
) -> Iterator[MaskedRow]:
    """Batches of at most `max_tokens` tokens with padding counted; a longer protein is a batch of its own.

    Proteins are sorted by length within chunks of the input, so that little is padded. Selected positions all show
    MASK, unless `training_masking` asks for the scheme used in training. A unidirectional model is asked for every
    residue (not for EOS, which the unigram baseline does not have). `leading` tokens stand before each protein, and do
    not change which of its residues are asked for.
    """
    for chunk in _chunks(proteins):
        batch: list[MaskedRow] = []
        for protein in sorted(chunk, key=len, reverse=True):
            row = _prepare(protein, direction, rate, training_masking)
            row = _lead(leading, row) if leading else row
            if batch and len(batch[0].inputs) * (len(batch) + 1) > max_tokens:
                yield _pad(batch)
                batch = []
            batch.append(row)
        yield _pad(batch)


def _chunks(proteins: Iterable[NDArray[np.uint8]]) -> Iterator[list[NDArray[np.uint8]]]:
    chunk: list[NDArray[np.uint8]] = []
    size = 0
    for protein in proteins:
        chunk.append(protein)
        size += len(protein)
        if size >= CHUNK_RESIDUES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _prepare(
    protein: NDArray[np.uint8], direction: Direction, rate: float, training_masking: MaskingConfig | None
) -> MaskedRow:
    tokens = np.append(protein, np.uint8(EOS))
    row = PackedRow(tokens=tokens, segments=np.ones(len(tokens), dtype=np.int32))
    if direction == "unidirectional":
        shifted = shift_row(row)
        shifted.targets[-1] = IGNORE
        return shifted
    generator = np.random.default_rng((zlib.crc32(protein.tobytes()), len(protein)))
    if training_masking is not None:
        return mask_row(row, training_masking, generator)
    return mask_row_for_evaluation(row, rate, generator)


def _lead(leading: bytes, row: MaskedRow) -> MaskedRow:
    before = np.frombuffer(leading, dtype=np.uint8)
    return MaskedRow(
        inputs=np.concatenate([before, row.inputs]),
        targets=np.concatenate([np.full(len(before), IGNORE, dtype=np.int16), row.targets]),
        segments=np.concatenate([np.ones(len(before), dtype=np.int32), row.segments]),
    )


def _pad(rows: list[MaskedRow]) -> MaskedRow:
    shape = (len(rows), max(len(row.inputs) for row in rows))
    inputs = np.full(shape, PAD, dtype=np.uint8)
    targets = np.full(shape, IGNORE, dtype=np.int16)
    segments = np.zeros(shape, dtype=np.int32)
    for i, row in enumerate(rows):
        length = len(row.inputs)
        inputs[i, :length], targets[i, :length], segments[i, :length] = row.inputs, row.targets, row.segments
    return MaskedRow(inputs=inputs, targets=targets, segments=segments)
