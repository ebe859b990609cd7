"""Proteins from FASTA or from a token store, for commands that take either.

In: FASTA sources, or folders of token stores. Out: their records in order, one by one or many at a time. A store keeps
ids, not headers, so that the header of a record from one is its id, and its line is its number in the store, from 1.
Letters that reading the FASTA had changed stay changed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from protformer.corpus.compression import Consumed, Source, describe_source, is_stdin
from protformer.corpus.duplicates import OnDuplicate
from protformer.corpus.fasta import FastaReport, RecordBatch, SequenceRecord, parse, read_batches
from protformer.corpus.identifiers import stored_ids
from protformer.corpus.letters import count_codes
from protformer.corpus.records import Words
from protformer.corpus.token_store import TokenStore
from protformer.errors import InputError


def read_proteins(
    source: Source, *, on_duplicate: OnDuplicate, report: FastaReport, consumed: Consumed | None = None
) -> Iterator[SequenceRecord]:
    """The proteins of a token store, or of a FASTA source, as `read_fasta` gives them."""
    for batch in read_protein_batches([source], on_duplicate=on_duplicate, report=report, consumed=consumed):
        yield from batch.records()


def read_protein_batches(
    sources: Sequence[Source], *, on_duplicate: OnDuplicate, report: FastaReport, consumed: Consumed | None = None
) -> Iterator[RecordBatch]:
    """The proteins of token stores and FASTA sources, as `read_batches` gives them."""
    return read_batches(sources, on_duplicate=on_duplicate, report=report, consumed=consumed, parse_source=_parse)


def is_store(source: Source) -> bool:
    """Whether a source is a folder, and so must be a token store."""
    return not is_stdin(source) and Path(source).is_dir()


def _parse(source: Source, report: FastaReport, consumed: Consumed | None, block_bytes: int) -> Iterator[RecordBatch]:
    if not is_store(source):
        yield from parse(source, report, consumed, block_bytes)
        return
    store = TokenStore.open(Path(source))
    if len(store) == 0:
        raise InputError(f"{describe_source(source)}: no proteins in this token store")
    start = 0
    for names in stored_ids(store):
        offsets = store.offsets[start : start + len(names) + 1]
        tokens = store.tokens[int(offsets[0]) : int(offsets[-1])].tobytes()
        ids = Words.of([name.decode("utf-8") for name in names])
        start += len(names)
        yield RecordBatch(
            id_words=ids,
            header_words=ids,
            tokens=tokens,
            token_counts=count_codes(tokens),
            ends=offsets[1:] - offsets[0],
            lines=np.arange(start - len(names), start) + 1,
        )
        if consumed is not None:
            consumed(len(tokens))
