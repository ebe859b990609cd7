"""Protein chains of known structure: sequence and where each residue's C-beta is.

In: a JSON-lines file (plain or compressed; one chain a line with `id`, `seq` and `cb`, angstrom, null for a residue
that is not resolved), one PDB or mmCIF file, or a folder of such (`.pdb`, `.ent`, `.cif`, `.mmcif`, also `.gz`). Out:
`ChainStructure`s in the order of lines, or of file names and of chains in a file. Of PDB and mmCIF files, the first
model's residues with coordinates make the sequence, so what is not resolved is not in it; glycine, and a residue
without C-beta, is where its C-alpha is. Of identical chains of one file the first is taken.
"""

import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from protformer.alphabet import INVALID, LETTER_TABLE
from protformer.corpus.compression import open_blocks
from protformer.corpus.records import SequenceRecord
from protformer.errors import InputError
from protformer.unreadable import reason

STRUCTURE_SUFFIXES = {".pdb": "pdb", ".ent": "pdb", ".cif": "mmcif", ".mmcif": "mmcif"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChainStructure:
    """One chain."""

    record: SequenceRecord
    c_beta: Float32[np.ndarray, "residue 3"]
    """Angstrom; NaN where not resolved."""


def read_chains(path: Path) -> Iterator[ChainStructure]:
    """All chains of a file or folder. Raises InputError for what is neither, and where no protein is found."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = 0
    for file in files:
        kind = _kind(file)
        if kind is None and (path.is_dir() or ".json" not in file.name):
            continue
        for chain in _read_json_lines(file) if kind is None else _read_structure(file, kind):
            found += 1
            yield chain
    if not found:
        raise InputError(
            f"{path}: no protein chain here (expected {', '.join(STRUCTURE_SUFFIXES)}, also .gz, or .jsonl)"
        )


def _kind(file: Path) -> str | None:
    return STRUCTURE_SUFFIXES.get(Path(file.name.removesuffix(".gz")).suffix.lower())


def _read_json_lines(file: Path) -> Iterator[ChainStructure]:
    rest = b""
    number = 0
    for block in open_blocks(file):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield _json_chain(line, file, number)
    if rest.strip():
        yield _json_chain(rest, file, number + 1)


def _json_chain(line: bytes, file: Path, number: int) -> ChainStructure:
    where = f"{file}: line {number}"
    try:
        tree: dict[str, Any] = json.loads(line)
        sequence, id_ = str(tree["seq"]), str(tree["id"])
        rows = [[np.nan] * 3 if row is None else row for row in tree["cb"]]
        c_beta = np.array(rows, dtype=np.float32).reshape(-1, 3)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{where}: not a chain with id, seq and cb ({reason(error)})") from error
    return _chain(id_, sequence, c_beta, where, number)


def _chain(id_: str, sequence: str, c_beta: Float32[np.ndarray, "residue 3"], where: str, line: int) -> ChainStructure:
    tokens = sequence.encode("ascii", "replace").translate(LETTER_TABLE)
    if not sequence or bytes([INVALID]) in tokens:
        raise InputError(f"{where}: {id_!r} has no sequence of residue letters")
    if len(c_beta) != len(tokens):
        raise InputError(f"{where}: {id_!r} has {len(tokens):,} residues and {len(c_beta):,} C-betas")
    return ChainStructure(record=SequenceRecord(id=id_, header=id_, tokens=tokens, line=line), c_beta=c_beta)


def _read_structure(file: Path, kind: str) -> Iterator[ChainStructure]:
    from Bio.PDB.MMCIFParser import MMCIFParser
    from Bio.PDB.PDBExceptions import PDBConstructionException
    from Bio.PDB.PDBParser import PDBParser

    text = b"".join(open_blocks(file)).decode("utf-8", "replace")
    stem = Path(file.name.removesuffix(".gz")).stem
    parser: Any = MMCIFParser(QUIET=True) if kind == "mmcif" else PDBParser(QUIET=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what files leave out; what matters here is looked at below
            models = list(parser.get_structure(stem, io.StringIO(text)))
    except (PDBConstructionException, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{file}: cannot be read as {kind} ({reason(error)})") from error
    seen: set[str] = set()
    for chain in models[0] if models else ():
        sequence, c_beta = _residues(chain)
        if sequence and sequence not in seen:
            seen.add(sequence)
            yield _chain(f"{stem}_{chain.id}", sequence, c_beta, str(file), 0)


def _residues(chain: Any) -> tuple[str, Float32[np.ndarray, "residue 3"]]:
    """Letters and C-betas of the amino acids of a chain, modified ones as what they were made of."""
    from Bio.Data.PDBData import protein_letters_3to1_extended

    letters: list[str] = []
    places: list[Any] = []
    for residue in chain:
        name = residue.get_resname().strip()
        if "CA" in residue and residue["CA"].element != "CA" and residue.id[0] != "W":
            letters.append(protein_letters_3to1_extended.get(name, "X"))
            places.append((residue["CB"] if "CB" in residue and name != "GLY" else residue["CA"]).coord)
    return "".join(letters), np.array(places, dtype=np.float32).reshape(-1, 3)
