"""The token stores of training runs: built beside the run or shared through a cache, and found again by content."""

from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from protformer.cli import run
from protformer.corpus.token_store import TOKENS_FILE, TokenStore
from protformer.errors import InputError
from protformer.training.run_stores import prepare_stores

FASTA = "".join(f">p{i}\n{'MKVLAEDG'[i % 8] * (1 + i % 50)}AC{'W' * (i // 50)}\n" for i in range(400))


class Listener:
    """Hears what a command would tell its user, and how many bytes it read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.num_bytes = 0

    @contextmanager
    def byte_progress(self, sources):
        def advance(amount: int) -> None:
            self.num_bytes += amount

        yield advance

    def tell(self, line) -> None:
        self.lines.append(line)


class OneOfEach(NamedTuple):
    """The stores of a run on one FASTA file."""

    train: Path
    validation: Path


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "proteins.fa"
    path.write_text(FASTA)
    return path


def prepare(tmp_path, fasta, validation=None, *, cache=True, fraction=0.2, name="run"):
    console = Listener()
    stores = prepare_stores(
        [[str(fasta)]],
        {} if validation is None else {"held_out": str(validation)},
        beside=tmp_path / name,
        cache=tmp_path / "cache" if cache else None,
        fraction=fraction,
        console=console,
    )
    return OneOfEach(*stores.train, *stores.validation), console


def test_without_a_cache_the_stores_lie_beside_the_run(tmp_path, fasta):
    stores, console = prepare(tmp_path, fasta, cache=False)
    assert (stores.train, stores.validation) == (tmp_path / "run" / "store", tmp_path / "run" / "validation")
    assert console.num_bytes == len(FASTA)


def test_a_second_run_finds_the_stores_of_the_first_whatever_the_file_is_called(tmp_path, fasta):
    first, _ = prepare(tmp_path, fasta)
    assert first.train.is_relative_to(tmp_path / "cache")
    moved = fasta.rename(tmp_path / "proteins.elsewhere.fa")
    second, console = prepare(tmp_path, moved, name="other")
    assert second == first
    assert console.num_bytes == 0
    assert console.lines == [f"using the token stores in {first.train.parent}"]
    assert not (tmp_path / "other").exists()


def test_a_changed_file_another_share_or_a_validation_file_gets_a_store_of_its_own(tmp_path, fasta):
    stores = [prepare(tmp_path, fasta)[0], prepare(tmp_path, fasta, fraction=0.3)[0]]
    (tmp_path / "val.fa").write_text(">v\nMKV\n")
    stores.append(prepare(tmp_path, fasta, tmp_path / "val.fa")[0])
    fasta.write_text(FASTA.replace("MMAC", "MMAD"))
    stores.append(prepare(tmp_path, fasta)[0])
    assert len({each.train for each in stores}) == 4
    assert [len(TokenStore.open(each.train)) < 400 for each in stores] == [True, True, False, True]
    assert len(TokenStore.open(stores[2].validation)) == 1


def test_a_damaged_store_in_the_cache_is_built_anew(tmp_path, fasta):
    first, _ = prepare(tmp_path, fasta)
    content = (first.train / TOKENS_FILE).read_bytes()
    (first.train / TOKENS_FILE).write_bytes(content[:-1])
    again, console = prepare(tmp_path, fasta)
    assert again == first
    assert console.num_bytes == len(FASTA)
    assert (first.train / TOKENS_FILE).read_bytes() == content


def test_a_mistake_leaves_no_store_in_the_cache(tmp_path, fasta):
    fasta.write_text(">a\nMK\n>b\nM1\n")
    with pytest.raises(InputError, match="record 'b', line 4"):
        prepare(tmp_path, fasta)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_what_cannot_be_read_twice_is_not_cached(tmp_path, monkeypatch, fasta):
    with fasta.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        stores, _ = prepare(tmp_path, "-")
    assert stores.train == tmp_path / "run" / "store"


def test_cached_stores_hold_what_those_beside_the_run_hold(tmp_path, fasta):
    cached, _ = prepare(tmp_path, fasta)
    beside, _ = prepare(tmp_path, fasta, cache=False)
    for one, other in ((cached.train, beside.train), (cached.validation, beside.validation)):
        assert np.array_equal(TokenStore.open(one).tokens, TokenStore.open(other).tokens)


@pytest.mark.slow
def test_two_runs_train_from_one_cached_store_and_resume(tmp_path, fasta):
    options = ["--fasta", str(fasta), "--cache-dir", str(tmp_path / "cache"), "--config", "tiny", "--quiet"]
    small = ["--set", "data.max_residues=64", "--set", "data.max_validation_residues=500"]
    for name in ("a", "b"):
        assert run(["train", *options, *small, "--out", str(tmp_path / name), "--max-steps", "2"]) == 0
        assert not (tmp_path / name / "store").exists()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert run(["train", *options, *small, "--out", str(tmp_path / "a"), "--max-steps", "3", "--resume"]) == 0
