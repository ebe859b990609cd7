"""Embeddings of whole proteins, however long.

In: a model and `SequenceRecord`s. Out: `EmbeddingRecord`s in the order of the input. The mean is over residues only:
`<cls>`, EOS and padding do not count. Time and memory are linear in the length for linear attention; nothing is cut
unless asked for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from protformer.corpus.fasta import SequenceRecord
from protformer.device import in_threads, num_threads
from protformer.errors import ConfigError, InputError
from protformer.inference.batches import BATCHES_IN_CHUNK, InferenceBatch, chunked, length_sorted_batches, most_tokens
from protformer.inference.embedding_record import EmbeddingRecord, hash_of_sequence
from protformer.inference.session import InferenceSession
from protformer.model.encoder import Encoder

OnLong = Literal["error", "window", "truncate", "skip"]
Per = Literal["protein", "residue", "both"]


BATCHES_AT_ONCE = 4
"""On a CPU, at the most: each has a thread, or a share of more threads than that.

Two threads with a batch each embed 8 % (float32) to 16 % (bf16) more residues a second than two that share every
operation of one batch. More than two are not measured; each batch more holds memory of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthLimit:
    """What to do with proteins of more than `max_length` residues; None is no limit."""

    max_length: int | None = None
    on_long: OnLong = "error"


@dataclass(kw_only=True, slots=True)
class LengthReport:
    """How many proteins the limit touched."""

    truncated: int = 0
    skipped: int = 0
    windowed: int = 0

    def summary(self) -> str | None:
        """One line for the user, if there is anything to say."""
        counts = {"truncated": self.truncated, "skipped": self.skipped, "embedded in windows": self.windowed}
        told = [f"{count:,} {what}" for what, count in counts.items() if count]
        return f"proteins above --max-length: {', '.join(told)}" if told else None


def resolve_layer(layer: int, num_layers: int) -> int:
    """Blocks to run for `--layer`: 0 is the token embedding, num_layers or -1 the last layer."""
    if not -num_layers - 1 <= layer <= num_layers:
        raise ConfigError(
            f"--layer {layer}: this model has layers 0 (token embedding) to {num_layers},"
            f" or -1 (last) to {-num_layers - 1}"
        )
    return layer if layer >= 0 else num_layers + 1 + layer


def describe_embedding(session: InferenceSession, *, layer: int, limit: LengthLimit) -> dict[str, object]:
    """What embedding files say about how they were made; `layer` as it was asked for."""
    return session.provenance | {
        "layer": layer,
        "pooling": "mean over residues",
        "precision": str(session.dtype).removeprefix("torch."),
        "max_length": limit.max_length or 0,
        "on_long": limit.on_long,
    }


def embed(
    session: InferenceSession,
    records: Iterable[SequenceRecord],
    *,
    per: Per,
    layer: int,
    limit: LengthLimit,
    report: LengthReport,
    batch_tokens: int,
) -> Iterator[EmbeddingRecord]:
    """Embed each protein; `layer` counts blocks (see `resolve_layer`). InputError for a long one under `error`."""
    chunk_residues = BATCHES_IN_CHUNK * most_tokens(batch_tokens, session.device)
    for chunk in chunked(_within_limit(records, limit, report), chunk_residues):
        pieces, owner = _windows(chunk, limit)
        hidden = _states_of_pieces(session, pieces, layer, batch_tokens)
        for number, record in enumerate(chunk):
            own = [hidden.pop(i) for i in owner[number]]
            residues = own[0] if len(own) == 1 else _merge_windows(own, len(record), limit)
            yield _record(record, residues, per, truncated=_is_truncated(record, limit))


def _within_limit(
    records: Iterable[SequenceRecord], limit: LengthLimit, report: LengthReport
) -> Iterator[SequenceRecord]:
    for record in records:
        if limit.max_length is None or len(record) <= limit.max_length:
            yield record
        elif limit.on_long == "error":
            raise InputError(
                f"record {record.id!r} (line {record.line}) has {len(record):,} residues, above --max-length"
                f" {limit.max_length:,}; leave --max-length away to embed it whole, or choose"
                f" --on-long window, truncate or skip"
            )
        elif limit.on_long == "skip":
            report.skipped += 1
        elif limit.on_long == "truncate":
            report.truncated += 1
            yield record
        else:
            report.windowed += 1
            yield record


def _windows(chunk: list[SequenceRecord], limit: LengthLimit) -> tuple[list[SequenceRecord], list[list[int]]]:
    """What to run the model on, and for each record which of these are its own."""
    pieces: list[SequenceRecord] = []
    owner: list[list[int]] = []
    for record in chunk:
        starts = _window_starts(len(record), limit)
        owner.append(list(range(len(pieces), len(pieces) + len(starts))))
        for start in starts:
            end = len(record) if limit.max_length is None else start + limit.max_length
            tokens = record.tokens[start:end]
            pieces.append(SequenceRecord(id=record.id, header=record.header, tokens=tokens, line=record.line))
    return pieces, owner


def _window_starts(length: int, limit: LengthLimit) -> list[int]:
    """Windows overlap by half; the last one ends with the protein. Lengths 10 and limit 4: 0 2 4 6."""
    if limit.max_length is None or length <= limit.max_length or limit.on_long == "truncate":
        return [0]
    stride = max(1, limit.max_length // 2)
    last = length - limit.max_length
    return [*range(0, last, stride), last]


def _states_of_pieces(
    session: InferenceSession, pieces: list[SequenceRecord], layer: int, batch_tokens: int
) -> dict[int, Float[Tensor, "_ channel"]]:
    """Hidden states of each piece, by its place. Proteins that exceed a batch go one by one, for what they hold."""
    model, device = session.model, session.device
    most = most_tokens(batch_tokens, device)
    batches = list(length_sorted_batches(pieces, max_tokens=batch_tokens, model=model.config, device=device))
    long = [batch for batch in batches if batch.tokens.numel() > most]
    others = batches[len(long) :]  # the longest are first

    def work_off(pending: Iterator[InferenceBatch]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        try:
            with session.autocast():
                for batch in pending:
                    found |= _hidden_states(model.encoder, batch, layer)
        except BaseException:
            list(pending)  # nothing is left for the other threads
            raise
        return found

    hidden = work_off(iter(long))
    workers = max(1, min(num_threads(device), BATCHES_AT_ONCE, len(others)))
    pending = iter(others)  # of one list, whose iterator gives no batch to two threads
    for found in in_threads([partial(work_off, pending)] * workers, level="batches"):
        hidden |= found
    return hidden


@torch.inference_mode()
def _hidden_states(encoder: Encoder, batch: InferenceBatch, layer: int) -> dict[int, Float[Tensor, "_ channel"]]:
    hidden = encoder(batch.tokens, batch.segments, num_layers=layer).hidden.float().cpu()
    places = zip(batch.order, batch.records, batch.first_residues, strict=True)
    return {place: hidden[row, first : first + len(record)].clone() for place, record, (row, first) in places}


def _merge_windows(
    windows: list[Float[Tensor, "_ channel"]], length: int, limit: LengthLimit
) -> Float[Tensor, "residue channel"]:
    """The mean over the windows that hold a residue."""
    total = windows[0].new_zeros(length, windows[0].shape[1])
    count = windows[0].new_zeros(length, 1)
    for start, window in zip(_window_starts(length, limit), windows, strict=True):
        total[start : start + len(window)] += window
        count[start : start + len(window)] += 1
    return total / count


def _is_truncated(record: SequenceRecord, limit: LengthLimit) -> bool:
    return limit.on_long == "truncate" and limit.max_length is not None and len(record) > limit.max_length


def _record(
    record: SequenceRecord, residues: Float[Tensor, "residue channel"], per: Per, *, truncated: bool
) -> EmbeddingRecord:
    return EmbeddingRecord(
        id=record.id,
        header=record.header,
        length=len(record),
        truncated=truncated,
        residue=residues.numpy() if per in ("residue", "both") else None,
        protein=residues.mean(dim=0).numpy() if per in ("protein", "both") else None,
        sequence_hash=hash_of_sequence(record.tokens),
    )
