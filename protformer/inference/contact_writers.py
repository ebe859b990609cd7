"""Contact maps to files: npz for programs, CASP RR for evaluation servers, csv for people, png to look at.

In: a `ContactMap`. Out: one file a map and format, named by the escaped ids of its chains, written under a
temporary name and renamed. Cost: rr and csv list every pair, so a protein of 5,000 residues makes 12.5
million lines.
"""

import csv
import dataclasses
import hashlib
import json
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from protformer import __version__
from protformer.errors import InputError, OutputError
from protformer.evaluation.figures import plot_contact_map
from protformer.inference.contact_scores import RANKS, ContactMap
from protformer.inference.written_map import read_written_map

ContactFormat = Literal["npz", "rr", "csv"]

_MAX_STEM_BYTES = 200
_RR_LINE_RESIDUES = 50
_CONTACT_ANGSTROM = 8


def write_contacts(
    contact_map: ContactMap,
    folder: Path,
    formats: Sequence[ContactFormat],
    plot: bool = False,
    *,
    replace: bool = False,
) -> list[Path]:
    """Write one map in each format, and as a figure if `plot`; the paths written.

    npz: `contacts` (residue, residue) float32, `sequence`, `chain_lengths`, `chain_ids`, `provenance` (JSON: what made
    the map, and the files written with it); for two chains also `inter_chain` (residue_a, residue_b). rr: CASP RR, all
    pairs by descending score. csv: all pairs by position. Raises OutputError where a file exists already (unless
    `replace`), or the disk is full.
    """
    paths = contact_paths(contact_map.chain_ids, folder, formats, plot)
    if not replace:
        refuse_existing(paths)
    names = [path.suffix.removeprefix(".") for path in paths]
    contact_map = dataclasses.replace(contact_map, provenance={**contact_map.provenance, "files": names})
    for path in sorted(paths, key=lambda path: path.suffix == ".npz"):  # the last, as it vouches for the others
        partial = path.with_name(path.name + ".partial")
        try:
            _WRITERS[path.name.rpartition(".")[2]](contact_map, partial)
            os.replace(partial, path)
        except OSError as error:
            raise OutputError(f"{path}: cannot write the file: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
    return paths


def contact_paths(
    chain_ids: Sequence[str], folder: Path, formats: Sequence[ContactFormat], plot: bool = False
) -> list[Path]:
    """Where `write_contacts` puts the map of these chains."""
    stem = file_stem(chain_ids)
    return [folder / f"{stem}.{name}" for name in (*formats, *(("png",) if plot else ()))]


def refuse_existing(paths: Sequence[Path]) -> None:
    """Raise OutputError where a file exists already, so that a run can ask before it computes the map."""
    for path in paths:
        if path.exists():
            resume = "go on with --resume, " if any(path.suffix == ".npz" for path in paths) else ""
            raise OutputError(f"{path}: exists already; {resume}choose another --out, or delete it")


def is_written(paths: Sequence[Path], chains: Sequence[str], provenance: Mapping[str, object]) -> bool:
    """Whether all files of a map are there, and were written with its .npz.

    Raises OutputError if the .npz among them is of other chains, or made otherwise, or no map.
    """
    written_with: tuple[str, ...] = ()
    for path in paths:
        if path.suffix == ".npz" and path.exists():
            written_with = _files_of_same(path, chains, provenance)
    return all(path.exists() and path.suffix.removeprefix(".") in written_with for path in paths)


def _files_of_same(path: Path, chains: Sequence[str], provenance: Mapping[str, object]) -> tuple[str, ...]:
    """The kinds of files that were written with a .npz. Raises OutputError if that is not the map that is asked for."""
    try:
        found = read_written_map(path)
    except InputError as error:
        raise OutputError(f"{error}; choose another --out, or delete it") from error
    if found.chains != tuple(chains):
        raise OutputError(f"{path}: is of another sequence of that id; choose another --out, or delete it")
    for name, value in provenance.items():
        if name != "model" and found.provenance.get(name) != value:  # the name of a folder, which may change
            raise OutputError(
                f"{path}: was made by model {found.provenance.get('model')} with {name}"
                f" {found.provenance.get(name)}, not {value}; resume with the same, choose another --out, or delete it"
            )
    return found.files


def file_stem(chain_ids: Sequence[str]) -> str:
    """The name for the files of a map: the escaped ids of its chains, joined by `__`.

    Reversible (split at `__`, then percent-decode), but for a name above 200 bytes, which is cut and told
    apart by the start of the SHA-256 of the whole; the ids are inside the files as well.
    """
    stem = "__".join(escape_for_file_name(chain_id) for chain_id in chain_ids)
    if len(stem) <= _MAX_STEM_BYTES:
        return stem
    digest = hashlib.sha256(stem.encode()).hexdigest()[:16]
    return f"{stem[: _MAX_STEM_BYTES - len(digest) - 1]}-{digest}"


def escape_for_file_name(protein_id: str) -> str:
    """The id with all but `A-Z a-z 0-9 . _ -` percent-encoded (UTF-8), and a leading dot.

    Underscores at either end, or before another one, are encoded too: `__` separates the ids of a pair.
    """
    return re.sub(r"[^A-Za-z0-9._-]|^[._]|_(?=_|\Z)", _percent_encode, protein_id)


def _percent_encode(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())


def _write_npz(contact_map: ContactMap, path: Path) -> None:
    arrays: dict[str, Any] = {
        "contacts": contact_map.contacts,
        "sequence": np.array(contact_map.sequence),
        "chain_lengths": np.array(contact_map.chain_lengths, dtype=np.int64),
        "chain_ids": np.array(contact_map.chain_ids),
        "provenance": np.array(json.dumps(dict(contact_map.provenance))),
    }
    if len(contact_map.chain_lengths) == 2:
        border = contact_map.chain_lengths[0]
        arrays["inter_chain"] = contact_map.contacts[:border, border:]
    # Through an open file, since NumPy would add `.npz` to a path. Without `allow_pickle`, which NumPy before 2.1
    # does not know and would store as one more array.
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _write_rr(contact_map: ContactMap, path: Path) -> None:
    """CASP RR: `i j 0 8 p`; of several chains, a letter before the residue number tells which."""
    names = _residue_names(contact_map)
    rows, columns = np.triu_indices(len(names), k=1)
    scores = contact_map.contacts[rows, columns]
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write(f"PFRMAT RR\nTARGET {_target(contact_map)}\nAUTHOR protformer\n")
        file.write(f"METHOD protformer {__version__}; scores {contact_map.provenance.get('scores', RANKS)}\nMODEL 1\n")
        for chain in _chain_sequences(contact_map):
            file.writelines(f"{chain[at : at + _RR_LINE_RESIDUES]}\n" for at in range(0, len(chain), _RR_LINE_RESIDUES))
        for pair in np.argsort(-scores, kind="stable"):
            i, j = names[rows[pair]], names[columns[pair]]
            file.write(f"{i} {j} 0 {_CONTACT_ANGSTROM} {scores[pair]:.6f}\n")
        file.write("END\n")


def _target(contact_map: ContactMap) -> str:
    """The ids as they are, or escaped if CASP's format, which is ASCII, cannot hold them."""
    target = "__".join(contact_map.chain_ids)
    return target if target.isascii() else file_stem(contact_map.chain_ids)


def _write_csv(contact_map: ContactMap, path: Path) -> None:
    residues = [
        (number, amino_acid, chain_id)
        for chain_id, chain in zip(contact_map.chain_ids, _chain_sequences(contact_map), strict=True)
        for number, amino_acid in enumerate(chain, start=1)
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["i", "aa_i", "chain_i", "j", "aa_j", "chain_j", "p"])
        for i, first in enumerate(residues):
            scores = contact_map.contacts[i, i + 1 :].tolist()
            table.writerows(
                (*first, *second, f"{score:.6f}") for second, score in zip(residues[i + 1 :], scores, strict=True)
            )


def _write_png(contact_map: ContactMap, path: Path) -> None:
    plot_contact_map(
        contact_map.contacts,
        chain_lengths=contact_map.chain_lengths,
        chain_ids=contact_map.chain_ids,
        title=contact_map.id,
        path=path,
    )


_WRITERS: dict[str, Callable[[ContactMap, Path], None]] = {
    "npz": _write_npz,
    "rr": _write_rr,
    "csv": _write_csv,
    "png": _write_png,
}


def _chain_sequences(contact_map: ContactMap) -> Iterator[str]:
    start = 0
    for length in contact_map.chain_lengths:
        yield contact_map.sequence[start : start + length]
        start += length


def _residue_names(contact_map: ContactMap) -> list[str]:
    """Residue numbers as CASP RR writes them: `10` in a single chain, `A10`, `B25` in several."""
    if len(contact_map.chain_lengths) == 1:
        return [str(number) for number in range(1, len(contact_map.sequence) + 1)]
    return [
        f"{letter}{number}"
        for letter, length in zip(string.ascii_uppercase, contact_map.chain_lengths, strict=False)
        for number in range(1, length + 1)
    ]
