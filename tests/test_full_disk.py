"""A full disk is a user's error in one line that costs no more than the last commit, whatever write it meets."""

import errno
from contextlib import suppress

import h5py
import numpy as np
import pytest
import torch
from full_disk import disk_full_at

from protformer.errors import OutputError
from protformer.inference import hdf5_embeddings, journaled_file
from protformer.inference.contact_scores import ContactMap
from protformer.inference.contact_writers import write_contacts
from protformer.inference.embedding_writers import EmbeddingRecord, open_embedding_writer
from protformer.inference.hdf5_embeddings import INDEX_GROUP, Hdf5EmbeddingWriter

RECORDS = [
    EmbeddingRecord(
        id=f"p{number}",
        header=f"p{number} words",
        length=20,
        truncated=False,
        residue=np.random.default_rng(number).random((20, 16), dtype=np.float32),
    )
    for number in range(40)
]
MAX_BYTES = 30_000
MAX_BYTES_WITH_INDEX = 84_000
"""Of an h5 file whose table of proteins has been written."""


def write(path, records, **options):
    with open_embedding_writer(
        path, per="residue", dtype="float32", description={}, save=torch.save, **({"resume": False} | options)
    ) as writer:
        done = writer.done_ids()
        for record in records:
            if record.id not in done:
                writer.write(record)


def write_h5(path, records, *, resume):
    """Each record is a commit of its own."""
    with Hdf5EmbeddingWriter(
        path, per="residue", dtype="float32", description={}, resume=resume, commit_seconds=0.0
    ) as writer:
        done = writer.done_ids()
        for record in records:
            if record.id not in done:
                writer.write(record)
    return done


def assert_whole(path, records):
    with h5py.File(path) as file:
        assert file[INDEX_GROUP]["id"].asstr()[:].tolist() == [record.id for record in records]
        assert len(file) == len(records) + 1
        for record in records:
            np.testing.assert_array_equal(file[record.id], record.residue)


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".pt"])
def test_a_format_that_cannot_resume_leaves_nothing(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with disk_full_at(MAX_BYTES), pytest.raises(OutputError) as told:
        write(path, RECORDS)
    assert str(told.value).startswith(f"{path}: cannot ")
    assert list(tmp_path.iterdir()) == []
    write(path, RECORDS)


def test_an_h5_file_is_resumed_once_there_is_room_again(tmp_path):
    path = tmp_path / "x.h5"
    write_h5(path, RECORDS[:2], resume=False)
    with disk_full_at(path.stat().st_size + MAX_BYTES), pytest.raises(OutputError, match="cannot write 'p"):
        write_h5(path, RECORDS, resume=True)
    assert not path.exists()
    assert 2 < len(write_h5(path, RECORDS, resume=True)) < len(RECORDS)
    assert_whole(path, RECORDS)


def test_a_full_disk_costs_an_h5_file_no_more_than_the_last_megabytes(tmp_path, monkeypatch):
    """However fast they came; and what is of no use any more is given back to the disk."""
    monkeypatch.setattr(hdf5_embeddings, "COMMIT_BYTES", 4000)
    path = tmp_path / "x.h5"
    message = r"cannot write 'p.*; \d+ proteins are kept in .*x.h5"
    with disk_full_at(MAX_BYTES_WITH_INDEX), pytest.raises(OutputError, match=message):
        write(path, RECORDS)
    assert (tmp_path / "x.h5.partial").stat().st_size < MAX_BYTES_WITH_INDEX - 1000
    with open_embedding_writer(
        path, per="residue", dtype="float32", description={}, save=torch.save, resume=True
    ) as writer:
        assert len(writer.done_ids()) > 5
    write(path, RECORDS, resume=True)
    assert_whole(path, RECORDS)


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path):
    with disk_full_at(6000), pytest.raises(OutputError, match="cannot "):
        write(tmp_path / "x.h5", RECORDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["npz", "rr", "csv", "png"])
def test_a_contact_file_that_does_not_fit_leaves_nothing(tmp_path, suffix):
    contacts = np.random.default_rng(0).random((60, 60), dtype=np.float32)
    chosen = ContactMap(id="a", contacts=contacts, sequence="M" * 60, chain_lengths=(60,), chain_ids=("a",))
    path = tmp_path / f"a.{suffix}"
    formats, plot = ([], True) if suffix == "png" else ([suffix], False)
    with disk_full_at(5000), pytest.raises(OutputError) as told:
        write_contacts(chosen, tmp_path, formats, plot)
    assert str(told.value).startswith(f"{path}: cannot write the file: ")
    assert list(tmp_path.iterdir()) == []
    assert write_contacts(chosen, tmp_path, formats, plot) == [path]


@pytest.mark.parametrize("times", [1, 10**6], ids=["once", "from_then_on"])
def test_any_single_write_to_an_h5_file_may_fail(tmp_path, monkeypatch, times):
    """The n-th write fails, for every n until the file is finished without."""
    write_all, records = journaled_file._write_all, RECORDS[:1]
    num_written = num_failed = 0

    def failing(file, data):
        nonlocal num_written
        num_written += 1
        if fail_at <= num_written < fail_at + times:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, data)

    monkeypatch.setattr(journaled_file, "_write_all", failing)
    for fail_at in range(1, 10**6):
        path = tmp_path / f"{fail_at}.h5"
        num_written = 0
        with suppress(OutputError):
            write_h5(path, records, resume=False)
        if num_written < fail_at:
            break
        assert not path.exists()
        num_failed += 1
        fail_at = 10**6
        write_h5(path, records, resume=True)
        assert_whole(path, records)
    assert_whole(path, records)
    assert num_failed > 10
