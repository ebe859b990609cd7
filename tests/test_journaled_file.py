"""A killed writer: whatever the moment, the file goes back to its last commit and is resumed from there."""

import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protformer.inference import journaled_file
from protformer.inference.embedding_writers import EmbeddingRecord
from protformer.inference.hdf5_embeddings import INDEX_GROUP, Hdf5EmbeddingWriter, escape_id, unescape_id
from protformer.inference.journaled_file import JournaledFile, journal_path, roll_back

IDS = ["z", "sp|P1/x", ".", "100%", "m"]
RECORDS = [
    EmbeddingRecord(
        id=name,
        header=name,
        length=length,
        truncated=False,
        residue=np.random.default_rng(length).standard_normal((length, 4)).astype(np.float32),
        protein=np.full(4, length, dtype=np.float32),
    )
    for length, name in enumerate(IDS, start=1)
]


def test_a_file_is_whole_after_a_kill_before_any_single_write(tmp_path, monkeypatch):
    """Both files are copied before each write, as a kill would leave them, and put back to their last commit."""
    path, partial = tmp_path / "x.h5", tmp_path / "x.h5.partial"
    journal = tmp_path / "x.h5.partial.journal"
    states, write_all = [], journaled_file._write_all

    def record_state(file, data):
        states.append((partial.read_bytes(), journal.read_bytes(), num_committed))
        write_all(file, data)

    num_committed = 0  # before the record that is being written
    monkeypatch.setattr(journaled_file, "_write_all", record_state)
    with Hdf5EmbeddingWriter(
        path, per="both", dtype="float32", description={}, resume=False, commit_seconds=0.0
    ) as writer:
        for one in RECORDS:
            writer.write(one)
            num_committed += 1
    monkeypatch.undo()
    assert len(states) > 100
    for content, undo, at_least in states:
        partial.write_bytes(content)
        journal.write_bytes(undo)
        journaled_file.roll_back(partial)
        if not partial.stat().st_size:
            assert at_least == 0
            continue
        with h5py.File(partial) as file:
            done = file[INDEX_GROUP]["id"].asstr()[:].tolist()
            assert len(done) >= at_least
            assert [unescape_id(name) for name in file["residue"]] == done == IDS[: len(done)]
            for one in RECORDS[: len(done)]:
                np.testing.assert_array_equal(file["residue"][escape_id(one.id)][:], one.residue)


@given(
    st.binary(max_size=20),
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 30), st.binary(min_size=1, max_size=20)),
            st.tuples(st.just("truncate"), st.integers(0, 40), st.just(b"")),
        ),
        max_size=8,
    ),
    st.integers(0, 40),
)
def test_rolling_back_undoes_all_writes_since_the_commit_even_when_it_was_cut_off_before(committed, changes, cut):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        file = JournaledFile(path, create=True)
        file.write(committed)
        file.commit()
        for kind, offset, data in changes:
            if kind == "truncate":
                file.truncate(offset)
            else:
                file.seek(offset)
                file.write(data)
        file.close(keep_journal=True)
        journal = journal_path(path).read_bytes()
        # A roll-back that was itself killed has done some of its writes already.
        with path.open("r+b") as interrupted:
            for offset, old in journaled_file._entries(journal)[::-1][:cut]:
                interrupted.seek(offset)
                interrupted.write(old)
        roll_back(path)
        assert path.read_bytes() == committed
        assert not journal_path(path).exists()


WRITE_UNTIL_KILLED = """
import sys
from pathlib import Path
import numpy as np
from protformer.inference.embedding_record import EmbeddingRecord
from protformer.inference.hdf5_embeddings import Hdf5EmbeddingWriter

writer = Hdf5EmbeddingWriter(
    Path(sys.argv[1]), per="residue", dtype="float32", description={}, resume=True, commit_seconds=0.005
)
print("ready", flush=True)
for number in range(len(writer.done_ids()), 10**6):
    length = 1 + number % 50
    values = np.full((length, 16), number, dtype=np.float32)
    writer.write(EmbeddingRecord(id=f"p{number}", header="", length=length, truncated=False, residue=values))
"""


def test_a_file_whose_writer_is_killed_again_and_again_keeps_every_protein_it_counts_as_done(tmp_path):
    path = tmp_path / "x.h5"
    delays = random.Random(0)
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", WRITE_UNTIL_KILLED, path], stdout=subprocess.PIPE)
        with child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(delays.uniform(0.0, 0.3))
            child.kill()
    with Hdf5EmbeddingWriter(path, per="residue", dtype="float32", description={}, resume=True) as writer:
        num_done = len(writer.done_ids())
    assert num_done > 0
    with h5py.File(path) as file:
        assert file[INDEX_GROUP]["id"].asstr()[:].tolist() == [f"p{number}" for number in range(num_done)]
        assert len(file) == num_done + 1
        for number in range(num_done):
            expected = np.full((1 + number % 50, 16), number, dtype=np.float32)
            np.testing.assert_array_equal(file[f"p{number}"], expected)
