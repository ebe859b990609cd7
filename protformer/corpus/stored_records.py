"""Proteins from FASTA or from a token store, for commands that take either.

In: a FASTA source, or the folder of a token store. Out: `SequenceRecord`s in order. A store keeps ids, not headers, so
that the header of a record from one is its id, and its line is its number in the store, from 1.
"""

from collections.abc import Iterator
from pathlib import Path

from protformer.corpus.compression import Consumed, Source, is_stdin
from protformer.corpus.duplicates import OnDuplicate
from protformer.corpus.fasta import FastaReport, SequenceRecord, read_fasta
from protformer.corpus.token_store import TokenStore


def read_proteins(
    source: Source, *, on_duplicate: OnDuplicate, report: FastaReport, consumed: Consumed | None = None
) -> Iterator[SequenceRecord]:
    """The proteins of a token store as they are, or of a FASTA source as `read_fasta` gives them."""
    if is_stdin(source) or not Path(source).is_dir():
        return read_fasta(source, on_duplicate=on_duplicate, report=report, consumed=consumed)
    return _read_store(TokenStore.open(Path(source)), report)


def _read_store(store: TokenStore, report: FastaReport) -> Iterator[SequenceRecord]:
    for i in range(len(store)):
        name = store.id(i)
        record = SequenceRecord(id=name, header=name, tokens=store.protein(i).tobytes(), line=i + 1)
        report.records += 1
        report.residues += len(record)
        yield record
