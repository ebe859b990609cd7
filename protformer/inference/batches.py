"""Proteins from FASTA to batches of tensors under a budget of tokens, and back into the order of the input.

In: `SequenceRecord`s. Out: `InferenceBatch`es. Records are read in chunks of a bounded number of residues, sorted by
length within the chunk, and cut into batches of at most `max_tokens` tokens; a longer protein makes a batch of its
own. On CPUs a batch is one row of proteins, each a segment; elsewhere each protein has a row, filled with padding.
Padding and neighbours change nothing, so neither does the budget. Memory is bounded by the chunk and the longest
protein.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from protformer.alphabet import PAD
from protformer.config import MaskingConfig, ModelConfig
from protformer.corpus.evaluation_rows import evaluation_rows
from protformer.corpus.fasta import SequenceRecord
from protformer.errors import InputError
from protformer.evaluation.masked_lm import MaskedBatch

BATCHES_IN_CHUNK = 24
"""Enough to sort proteins by length; what is computed is given out, and can be kept, only when a chunk is done."""
LARGEST_BATCH = {"cpu": 2048}
"""Tokens, by type of device. On CPUs, activations of more leave the caches: with ESM-2 8M, 2,048 embed a quarter more
residues a second than 8,192."""
PACKED = ("cpu",)
"""Types of devices where proteins share a row: nothing is spent on padding, and a protein more is a small step more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceBatch:
    """Proteins of similar length, framed."""

    records: tuple[SequenceRecord, ...]
    order: tuple[int, ...]
    """Place of each record in its chunk."""
    tokens: Int[Tensor, "batch residue"]
    segments: Int[Tensor, "batch residue"]
    """From 1 in each row, one for each protein; 0 for padding."""
    first_residues: tuple[tuple[int, int], ...]
    """Row and column of the first residue of each record: behind what the model's frame begins with."""


def most_tokens(max_tokens: int, device: torch.device) -> int:
    """The most tokens in a batch on a device, where `max_tokens` are asked for."""
    return min(max_tokens, LARGEST_BATCH.get(device.type, max_tokens))


def chunked(records: Iterable[SequenceRecord], chunk_residues: int) -> Iterator[list[SequenceRecord]]:
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
    chunk: list[SequenceRecord], *, max_tokens: int, model: ModelConfig, device: torch.device
) -> Iterator[InferenceBatch]:
    """Batches of a chunk, longest proteins first, so that too little memory shows at once."""
    max_tokens = most_tokens(max_tokens, device)
    frame_tokens = sum(map(len, model.frame))
    places: list[int] = []
    num_tokens = width = 0
    for place in sorted(range(len(chunk)), key=lambda i: -len(chunk[i])):
        length = len(chunk[place]) + frame_tokens
        taken = length if device.type in PACKED else width
        if places and num_tokens + taken > max_tokens:
            yield frame_batch([chunk[i] for i in places], places, model, device)
            places, num_tokens = [], 0
        if not places:
            width = taken = length
        places.append(place)
        num_tokens += taken
    if places:
        yield frame_batch([chunk[i] for i in places], places, model, device)


def masked_batches(
    records: Iterable[SequenceRecord],
    *,
    model: ModelConfig,
    rate: float,
    training_masking: MaskingConfig | None,
    max_tokens: int,
    device: torch.device,
) -> Iterator[MaskedBatch]:
    """Each protein alone, masked for scoring (see `corpus.evaluation_rows`). Raises InputError if one is too long."""

    def residues() -> Iterator[UInt8[np.ndarray, " residue"]]:
        for record in records:
            require_positions(record.id, len(record) + sum(map(len, model.frame)), model)
            yield np.frombuffer(record.tokens, dtype=np.uint8)

    rows = evaluation_rows(
        residues(),
        direction=model.direction,
        leading=model.frame[0] if model.direction == "bidirectional" else b"",
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
    records: list[SequenceRecord], order: list[int], model: ModelConfig, device: torch.device
) -> InferenceBatch:
    """Frame each protein as the model was trained: `<cls>` and residues, residues and EOS, or all three."""
    before, behind = model.frame
    framed = [before + record.tokens + behind for record in records]
    for record, frame in zip(records, framed, strict=True):
        require_positions(record.id, len(frame), model)
    rows = [framed] if device.type in PACKED else [[frame] for frame in framed]
    tokens = np.full((len(rows), max(sum(map(len, row)) for row in rows)), PAD, dtype=np.int64)
    segments = np.zeros_like(tokens)
    first_residues = []
    for number, row in enumerate(rows):
        end = 0
        for segment, frame in enumerate(row, start=1):
            start, end = end, end + len(frame)
            tokens[number, start:end] = np.frombuffer(frame, dtype=np.uint8)
            segments[number, start:end] = segment
            first_residues.append((number, start + len(before)))
    return InferenceBatch(
        records=tuple(records),
        order=tuple(order),
        tokens=torch.from_numpy(tokens).to(device),
        segments=torch.from_numpy(segments).to(device),
        first_residues=tuple(first_residues),
    )


def longest_protein(model: ModelConfig) -> int | None:
    """Residues of the longest protein that learned positions hold; None where positions have no end."""
    return None if model.max_positions is None else model.max_positions - sum(map(len, model.frame))


def require_positions(name: str, num_tokens: int, model: ModelConfig) -> None:
    """Raise InputError if the model's learned positions do not reach so far."""
    limit = model.max_positions
    if limit is not None and num_tokens > limit:
        raise InputError(
            f"record {name!r} makes {num_tokens:,} tokens with the special ones, and this model has learned positions"
            f" for {limit:,}; `embed` takes it in pieces with --max-length {longest_protein(model)}"
            f" --on-long window"
        )
