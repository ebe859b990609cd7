"""What a split says about itself: `split.json` in the folder that holds its token stores.

In: a `SplitManifest`, or its JSON. Out: the other one. It is written last, so a folder that has it is whole.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from protformer.corpus.compression import describe_source, readable
from protformer.errors import InputError

SPLIT_FILE = "split.json"
SIDES_FILE = "sides.tsv"
"""Beside it: id, side (or `dropped`) and the reason for that of each protein, with a header."""

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitManifest:
    """How proteins were divided, and into what."""

    format_version: int
    protformer_version: str
    sources: list[str]
    """The FASTA files, as they were given."""
    method: str
    """clusters, mmseqs or hash."""
    seed: int
    validation_fraction: float
    test_fraction: float
    clusters: dict[str, str | int | float] | None
    """The table or how it was made, the number of clusters and the size of the largest."""
    families: dict[str, str | int | list[str]] | None
    """The table, its column, the families held out, and how it matched."""
    search: dict[str, str | int | float] | None
    """Identity, E-value and sensitivity of the search for relatives across the split; None if there was none."""
    tool: str | None
    """Program and version, for what another program did."""
    commands: list[str]
    """What was run, in order, in a folder of its own; proteins go by their number."""
    proteins: dict[str, int]
    residues: dict[str, int]
    """In each token store."""
    dropped: dict[str, int]
    """Proteins that are in none, by reason."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def summary(self, folder: str) -> list[str]:
        """Lines for the user."""
        lines = [
            f"{folder}/{name}: {self.proteins[name]:,} proteins, {self.residues[name]:,} residues"
            for name in self.proteins
        ]
        if any(self.dropped.values()):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items() if count)
            lines.append(f"in none of them: {reasons}")
        return lines


def read_split_manifest(folder: Path) -> SplitManifest:
    """The manifest in this folder. Raises InputError."""
    file = folder / SPLIT_FILE
    with readable(file):
        text = file.read_bytes()
    try:
        tree = json.loads(text)
        version = tree["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(
                f"{describe_source(file)}: format version {version!r}, this program reads {FORMAT_VERSION}"
            )
        return SplitManifest(**tree)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{describe_source(file)}: not the manifest of a split; prepare it again") from error
