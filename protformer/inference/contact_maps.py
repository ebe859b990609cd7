"""Contact maps of many proteins or pairs, one after the other into a folder, so that a stopped run can go on.

In: a model, and the chains of each map. Out: files (see `contact_writers`), each whole or not there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from protformer.corpus.fasta import SequenceRecord
from protformer.device import is_out_of_memory, memory_refused_in_time
from protformer.errors import InputError, InterruptedRunError, OutputError
from protformer.inference.contact_writers import (
    ContactFormat,
    contact_paths,
    is_written,
    refuse_existing,
    write_contacts,
)
from protformer.inference.contacts import ContactMethod, describe_contacts, predict_contacts
from protformer.inference.session import InferenceSession


@dataclass(frozen=True, kw_only=True, slots=True)
class MapFiles:
    """Where maps go, and as what."""

    folder: Path
    formats: Sequence[ContactFormat]
    plot: bool
    resume: bool
    """Leave maps that are there already as they are, instead of refusing them."""


def write_maps(
    session: InferenceSession,
    tasks: Iterable[tuple[SequenceRecord, ...]],
    files: MapFiles,
    *,
    method: ContactMethod,
    batch_tokens: int,
    progress: Callable[[int], None],
) -> tuple[int, int]:
    """How many maps were written, and how many were there. Raises OutputError, or InterruptedRunError for Ctrl-C."""
    written = there = 0
    provenance = describe_contacts(session, method=method)
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"{files.folder}: is a file, or below one; choose another --out") from error
    try:
        for chains in tasks:
            if _is_due(chains, files, provenance):
                _write_map(session, chains, files, method, batch_tokens)
                written += 1
            else:
                there += 1
            progress(1)
    except KeyboardInterrupt as error:
        if not written + there:
            raise
        kept = f"{written + there:,} contact maps are in {files.folder}: --resume goes on from there"
        raise InterruptedRunError(f"interrupted; {kept}") from error
    return written, there


def _write_map(
    session: InferenceSession,
    chains: tuple[SequenceRecord, ...],
    files: MapFiles,
    method: ContactMethod,
    batch_tokens: int,
) -> None:
    """Raises InputError if there is too little memory, where the system would end the process."""
    try:
        with memory_refused_in_time(session.device):
            contact_map = predict_contacts(session, chains, method=method, batch_tokens=batch_tokens)
            write_contacts(contact_map, files.folder, files.formats, files.plot, replace=files.resume)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        name, length = "__".join(chain.id for chain in chains), sum(len(chain) for chain in chains)
        raise InputError(
            f"{name}: a map of {length:,} residues takes more memory than there is; it grows with the square"
        ) from error


def _is_due(chains: Sequence[SequenceRecord], files: MapFiles, provenance: Mapping[str, object]) -> bool:
    paths = contact_paths([chain.id for chain in chains], files.folder, files.formats, files.plot)
    if not files.resume:
        refuse_existing(paths)
        return True
    return not is_written(paths, [chain.sequence for chain in chains], provenance)
