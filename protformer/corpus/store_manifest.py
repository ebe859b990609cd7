"""What a token store says about itself: its alphabet, its sizes, and the files it was made from.

In: source files, or the JSON of a manifest. Out: `SourceFile`s and a `StoreManifest`. A source is known again
by its size and by checksums of its first and last MiB: a change in the middle that keeps the size goes
unseen, which is the price of not reading 100 GB for a comparison.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from protformer.alphabet import FINGERPRINT, NUM_TOKENS, RESIDUES, TOKENS
from protformer.corpus.compression import Source, describe_source, is_stdin, readable
from protformer.corpus.fasta import FastaReport
from protformer.errors import InputError

FORMAT_VERSION = 1

_CHECKED_BYTES = 1 << 20
_NUCLEOTIDE_SHARE, _FEWEST_JUDGED_LETTERS = 0.95, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file that proteins came from."""

    path: str
    """As it was given."""
    num_bytes: int
    """As stored, compressed or not; 0 if the source was no regular file (standard input, a pipe)."""
    head_sha256: str
    """Of the first MiB; empty if the source was no regular file."""
    tail_sha256: str
    """Of the last MiB; empty if the source was no regular file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreManifest:
    """Facts about a token store, kept beside it as JSON."""

    format_version: int
    alphabet: str
    """`protformer.alphabet.FINGERPRINT` of the alphabet whose tokens these are."""
    sources: tuple[SourceFile, ...]
    num_proteins: int
    num_residues: int
    """Without the <eos> of each protein."""
    residue_counts: tuple[int, ...]
    """How often each of the 33 tokens occurs, <eos> included."""
    report: FastaReport
    """What reading all sources met, whether it came into this store or not."""

    def changes_summary(self) -> str | None:
        """One line on the letters and ids that were changed, or None."""
        return self.report.summary()

    def nucleotide_note(self) -> str | None:
        """One line if this looks like DNA or RNA."""
        counts = dict(zip(TOKENS, self.residue_counts, strict=True))
        return nucleotide_note({letter: counts[letter] for letter in RESIDUES})

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def nucleotide_note(residue_counts: Mapping[str, int]) -> str | None:
    """One line for the user if next to all letters are those of nucleotides; of proteins, they are a third."""
    total = sum(residue_counts.values())
    share = sum(residue_counts[letter] for letter in "ACGTUN") / max(1, total)
    if total < _FEWEST_JUDGED_LETTERS or share < _NUCLEOTIDE_SHARE:
        return None
    return f"warning: {share:.0%} of the letters are A, C, G, T, U or N: this looks like DNA or RNA, not like proteins"


def parse_manifest(text: str, where: Path) -> StoreManifest:
    """The manifest whose JSON this is; `where` is for messages. InputError for another format or alphabet."""
    name = describe_source(where)
    again = "prepare the store again from its FASTA"
    try:
        tree = json.loads(text)
        version, alphabet = tree["format_version"], tree["alphabet"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{name}: not the manifest of a token store; {again}") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{name}: format version {version!r}, this program reads {FORMAT_VERSION}; {again}")
    if alphabet != FINGERPRINT:
        raise InputError(f"{name}: made with another alphabet ({alphabet!r}, not {FINGERPRINT!r}); {again}")
    try:
        tree["sources"] = tuple(SourceFile(**source) for source in tree["sources"])
        tree["residue_counts"] = tuple(int(count) for count in tree["residue_counts"])
        tree["report"] = FastaReport(**tree["report"])
        manifest = StoreManifest(**tree)
        is_whole = manifest.num_proteins + manifest.num_residues == sum(manifest.residue_counts)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}: incomplete manifest; {again}") from error
    if not is_whole or len(manifest.residue_counts) != NUM_TOKENS:
        raise InputError(f"{name}: the counts in the manifest contradict each other; {again}")
    return manifest


def inspect_sources(sources: Sequence[Source]) -> tuple[SourceFile, ...]:
    """The sources as they are now. Raises InputError for one that cannot be read."""
    return tuple(_inspect(source) for source in sources)


def describe_difference(before: Sequence[SourceFile], sources: Sequence[Source]) -> str | None:
    """One line on how the sources differ from those before, in order; None if nothing tells them apart.

    A file may have moved. Standard input and pipes cannot be read again; they are compared by name.
    """
    if len(before) != len(sources):
        return f"the token store was made from {len(before)} FASTA files, not from {len(sources)}"
    for old, source in zip(before, sources, strict=True):
        if not old.head_sha256 and old.path == str(source):
            continue
        new = _inspect(source)
        if new.num_bytes != old.num_bytes:
            return (
                f"{describe_source(source)}: has {new.num_bytes:,} bytes, "
                f"the token store was made from {describe_source(old.path)} with {old.num_bytes:,}"
            )
        if (new.head_sha256, new.tail_sha256) != (old.head_sha256, old.tail_sha256):
            return f"{describe_source(source)}: its content is not what the token store was made from"
    return None


def _inspect(source: Source) -> SourceFile:
    path = Path(source)
    if is_stdin(source) or (path.exists() and not path.is_file() and not path.is_dir()):
        return SourceFile(path=str(source), num_bytes=0, head_sha256="", tail_sha256="")
    with readable(source), open(source, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(_CHECKED_BYTES)
        file.seek(max(0, size - _CHECKED_BYTES))
        tail = file.read(_CHECKED_BYTES)
    digests = [hashlib.sha256(part).hexdigest() for part in (head, tail)]
    return SourceFile(path=str(source), num_bytes=size, head_sha256=digests[0], tail_sha256=digests[1])
