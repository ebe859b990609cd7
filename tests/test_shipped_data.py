"""The two FASTA files in `data/` are what `data/README.md` says, and fit to train on and to validate with."""

import gzip
import hashlib
import re
from pathlib import Path

import pytest

from protformer.alphabet import RESIDUES

DATA = Path(__file__).parent.parent / "data"
SAMPLE, VALIDATION = "trembl_sample.fasta.gz", "trembl_validation.fasta.gz"
BOTH = pytest.mark.parametrize("name", [SAMPLE, VALIDATION])
MAX_BYTES = 1_500_000


@BOTH
def test_the_readme_lists_the_checksum_of_the_file(name: str) -> None:
    digest = hashlib.sha256((DATA / name).read_bytes()).hexdigest()
    assert f"{digest}  {name}" in readme()


@BOTH
def test_the_readme_states_the_number_of_proteins_residues_and_bytes(name: str) -> None:
    sequences = [sequence for _, sequence in records(name)]
    column = {SAMPLE: 0, VALIDATION: 1}[name]
    assert readme_row("proteins")[column] == len(sequences)
    assert readme_row("residues")[column] == sum(map(len, sequences))
    assert readme_row("bytes")[column] == (DATA / name).stat().st_size


@BOTH
def test_the_file_stays_small_enough_for_the_repository(name: str) -> None:
    assert (DATA / name).stat().st_size < MAX_BYTES


def test_there_are_enough_proteins_to_train_on_and_to_validate_with() -> None:
    assert 2000 <= len(records(SAMPLE)) <= 3000
    assert 300 <= len(records(VALIDATION)) <= 400


def test_validation_proteins_are_between_30_and_2000_residues_long() -> None:
    assert all(30 <= len(sequence) <= 2000 for _, sequence in records(VALIDATION))


@BOTH
def test_every_record_comes_from_trembl(name: str) -> None:
    assert all(re.match(r"tr\|\w+\|\w+ ", header) for header, _ in records(name))


@BOTH
def test_every_letter_is_a_residue(name: str) -> None:
    assert {letter for _, sequence in records(name) for letter in sequence} <= set(RESIDUES)


def test_no_identifier_and_no_sequence_occurs_twice_within_or_between_the_files() -> None:
    headers, sequences = zip(*records(SAMPLE), *records(VALIDATION), strict=True)
    assert len({header.split()[0] for header in headers}) == len(headers)
    assert len(set(sequences)) == len(sequences)


def test_no_validation_protein_is_part_of_a_sample_protein() -> None:
    sample = "\n".join(sequence for _, sequence in records(SAMPLE))
    assert not [header for header, sequence in records(VALIDATION) if sequence in sample]


def records(name: str) -> list[tuple[str, str]]:
    """Header and sequence of each record, read without protformer's own FASTA reader."""
    with gzip.open(DATA / name, "rt", encoding="ascii") as file:
        parts = [record.split("\n", maxsplit=1) for record in file.read().removeprefix(">").split("\n>")]
    return [(header, lines.replace("\n", "")) for header, lines in parts]


def readme() -> str:
    """The text of `data/README.md`."""
    return (DATA / "README.md").read_text(encoding="utf-8")


def readme_row(label: str) -> list[int]:
    """The two numbers, sample and validation, of the README's row that starts with `label`."""
    cells = re.search(rf"^\| {label} \| ([\d,]+) \| ([\d,]+) \|$", readme(), flags=re.MULTILINE)
    assert cells is not None, f"data/README.md has no row {label!r}"
    return [int(cell.replace(",", "")) for cell in cells.groups()]
