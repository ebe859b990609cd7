"""Proteins from FASTA to padded batches of tensors under a budget of tokens, and back into the order of the input.

In: `SequenceRecord`s. Out: `InferenceBatch`es. Records are read in chunks of a bounded number of residues, sorted by
length within the chunk, and cut into batches of at most `max_tokens` tokens with padding counted; a longer protein
makes a batch of its own. Padding and neighbours change nothing, so neither does the budget. Memory is bounded by the
chunk and the longest protein.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from protformer.alphabet import CLS, EOS, PAD
from protformer.config import Direction, MaskingConfig
from protformer.corpus.evaluation_rows import evaluation_rows
from protformer.corpus.fasta import SequenceRecord
from protformer.evaluation.masked_lm import MaskedBatch

CHUNK_RESIDUES = 500_000


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceBatch:
    """Proteins of similar length, framed and padded."""

    records: tuple[SequenceRecord, ...]
    order: tuple[int, ...]
    """Place of each record in its chunk."""
    tokens: Int[Tensor, "batch residue"]
    segments: Int[Tensor, "batch residue"]
    """1 for a token of the protein, 0 for padding."""
    first_residue: int
    """Column of the first residue: 1 behind a `<cls>`, else 0."""


def chunked(records: Iterable[SequenceRecord], chunk_residues: int = CHUNK_RESIDUES) -> Iterator[list[SequenceRecord]]:
    """Consecutive records, in lists that close once they hold `chunk_residues` residues."""
    chunk: list[SequenceRecord] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record)
        if size >= chunk_residues:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def length_sorted_batches(
    chunk: list[SequenceRecord], *, max_tokens: int, direction: Direction, device: torch.device
) -> Iterator[InferenceBatch]:
    """Batches of a chunk, longest proteins first, so that too little memory shows at once."""
    order = sorted(range(len(chunk)), key=lambda i: -len(chunk[i]))
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // (len(chunk[order[start]]) + 1))
        yield frame_batch(
            [chunk[i] for i in order[start : start + rows]], order[start : start + rows], direction, device
        )
        start += rows


def masked_batches(
    records: Iterable[SequenceRecord],
    *,
    direction: Direction,
    rate: float,
    training_masking: MaskingConfig | None,
    max_tokens: int,
    device: torch.device,
) -> Iterator[MaskedBatch]:
    """Each protein alone, masked for scoring (see `corpus.evaluation_rows`)."""
    rows = evaluation_rows(
        (np.frombuffer(record.tokens, dtype=np.uint8) for record in records),
        direction=direction,
        rate=rate,
        training_masking=training_masking,
        max_tokens=max_tokens,
    )
    for row in rows:
        inputs, targets, segments = (
            torch.from_numpy(array.astype(np.int64)) for array in (row.inputs, row.targets, row.segments)
        )
        yield MaskedBatch(inputs=inputs, targets=targets, segments=segments).to(device)


def frame_batch(
    records: list[SequenceRecord], order: list[int], direction: Direction, device: torch.device
) -> InferenceBatch:
    """Frame each protein as in training: residues and EOS, or (unidirectional) `<cls>` and residues."""
    width = max(len(record) for record in records) + 1
    tokens = np.full((len(records), width), PAD, dtype=np.int64)
    segments = np.zeros((len(records), width), dtype=np.int64)
    first_residue = int(direction == "unidirectional")
    for row, record in enumerate(records):
        length = len(record)
        tokens[row, first_residue : first_residue + length] = np.frombuffer(record.tokens, dtype=np.uint8)
        tokens[row, 0 if first_residue else length] = CLS if first_residue else EOS
        segments[row, : length + 1] = 1
    return InferenceBatch(
        records=tuple(records),
        order=tuple(order),
        tokens=torch.from_numpy(tokens).to(device),
        segments=torch.from_numpy(segments).to(device),
        first_residue=first_residue,
    )
