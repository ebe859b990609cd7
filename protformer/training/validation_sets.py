"""The sets of proteins that a run validates on, by name.

In: each --val-fasta, `PATH` or `NAME=PATH`. Out: paths by name, and on a resume a refusal of others than the run began
with. The first set is the one of the contract's columns in `metrics.csv`; all are in `validation.csv`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from protformer.corpus.token_store import TokenStore
from protformer.errors import InputError
from protformer.training.run_folder import StorePaths


def validation_sets(given: Sequence[str]) -> dict[str, str]:
    """FASTA files and stores by the name given, or by the file's name up to its first dot. Raises InputError."""
    sets: dict[str, str] = {}
    for text in given:
        named = re.fullmatch(r"([\w-]+)=(.+)", text)
        if named and not Path(text).exists():
            name, path = named.groups()
        else:
            name, path = Path(text).name.split(".")[0] or text, text
        if name in sets:
            raise InputError(f"--val-fasta: two sets have the name {name}; name one of them, as in other={path}")
        sets[name] = path
    return sets


def check_validation_unchanged(paths: StorePaths, sets: dict[str, str]) -> None:
    """Refuse to resume with other sets than the run began with; without the option, those are taken again."""
    began = dict(zip(paths.validation_names, paths.validation, strict=True))
    for name, given in sets.items():
        if name not in began:
            names = ", ".join(began) or "none"
            raise InputError(f"--resume: --val-fasta {given}: the run began without a set {name} (it has {names})")
        if Path(given).is_dir():
            if Path(given).resolve() != began[name].resolve():
                raise InputError(f"--resume: the run began with {began[name]}, not with {given}")
        elif difference := TokenStore.open(began[name]).difference_from([given]):
            raise InputError(f"--resume: --val-fasta: {difference}")
