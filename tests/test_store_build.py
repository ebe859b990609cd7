"""Building token stores: the same bytes and messages however the work is divided, killed and taken up again."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from full_disk import disk_full_at
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FastaText, fasta_texts

from protformer.corpus import build_workers, store_build
from protformer.corpus.build_lock import exclusive_folder
from protformer.corpus.build_part import build_part
from protformer.corpus.byte_ranges import plan_ranges
from protformer.corpus.splits import HashSplit
from protformer.corpus.store_build import build_stores, building_folder
from protformer.corpus.token_store import TokenStore, build_token_store
from protformer.errors import InputError, InterruptedRunError, OutputError

RANGE_BYTES = 3000
"""Small enough for many parts."""


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def proteins(count: int, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWYXJ*-acdef", np.uint8)
    records = [
        b">p%d_%d some > words\n%s\nM\n" % (seed, i, rng.choice(letters, 20 + i % 97).tobytes()) for i in range(count)
    ]
    return b"".join(records)


def build(fasta, out: Path, **options) -> dict[str, bytes]:
    build_stores(fasta, [out], _range_bytes=RANGE_BYTES, **options)
    return content_of(out)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """About 40 parts: plain, gzip, CRLF behind a byte order mark, and a header longer than a part."""
    contents = {
        "plain.fa": proteins(700, seed=1),
        "packed.fa.gz": gzip.compress(proteins(90, seed=2), mtime=0),
        "crlf.fa": b"\xef\xbb\xbf\r\n" + proteins(300, seed=3).replace(b"\n", b"\r\n"),
        "long.fa": b">a " + b">x " * RANGE_BYTES + b"\nMKV\n>b\n" + b"MKV\n" * RANGE_BYTES + proteins(20, seed=4),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in contents]


@pytest.fixture
def whole(corpus, tmp_path) -> dict[str, bytes]:
    """The store as one process makes it in one go."""
    build_token_store(corpus, tmp_path / "whole")
    return content_of(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_the_store_is_the_same_whatever_the_number_of_workers(corpus, whole, tmp_path, workers):
    read: list[int] = []
    assert build(corpus, tmp_path / "store", workers=workers, progress=read.append) == whole
    assert sum(read) == sum(path.stat().st_size for path in corpus if path.suffix == ".gz") + sum(
        each.num_bytes for each in plan_ranges(corpus) if not each.is_whole
    )
    assert not building_folder(tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_among_files_is_read_by_this_process(corpus, whole, tmp_path, name):
    sources = [name if path == corpus[2] else str(path) for path in corpus]
    command = [sys.executable, "-m", "protformer", "prepare", "--workers", "2", "--out", str(tmp_path / "store")]
    command += [part for source in sources for part in ("--fasta", source)]
    with corpus[2].open("rb") as file:
        subprocess.run(command, stdin=file, check=True, timeout=300, capture_output=True)
    made = content_of(tmp_path / "store")
    assert {key: made[key] for key in made if key != "manifest.json"} == {
        key: whole[key] for key in whole if key != "manifest.json"
    }


@settings(max_examples=30)  # each of many small files that are forced to the disk
@given(texts=st.lists(fasta_texts(), min_size=1, max_size=3), range_bytes=st.integers(1, 80))
def test_ranges_of_any_size_give_the_same_store(tmp_path_factory, texts: list[FastaText], range_bytes: int):
    folder = tmp_path_factory.mktemp("ranges")
    paths = [folder / f"{i}.fa" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.content)
    build_token_store(paths, folder / "whole")
    build_stores(paths, [folder / "parts"], _range_bytes=range_bytes)
    assert content_of(folder / "parts") == content_of(folder / "whole")


@settings(max_examples=50)
@given(fasta=fasta_texts(), mutation=st.binary(max_size=3), place=st.integers(0, 500), range_bytes=st.integers(1, 80))
def test_ranges_of_any_size_give_the_same_message(
    tmp_path_factory, fasta: FastaText, mutation: bytes, place: int, range_bytes: int
):
    folder = tmp_path_factory.mktemp("ranges")
    (folder / "a.fa").write_bytes(fasta.content[:place] + mutation + fasta.content[place:])

    def outcome(out: Path, size: int) -> str | dict[str, bytes]:
        try:
            build_stores([folder / "a.fa"], [out], _range_bytes=size)
        except InputError as error:
            return str(error)
        return content_of(out)

    assert outcome(folder / "parts", range_bytes) == outcome(folder / "whole", 10**9)


@pytest.mark.parametrize("workers", [1, 3])
def test_of_several_faults_the_first_in_the_files_is_told_with_its_line(tmp_path, workers):
    late, early = tmp_path / "late.fa", tmp_path / "early.fa"
    late.write_bytes(proteins(500, seed=1) + b">bad\nMK\nM1\n" + proteins(500, seed=2) + b">worse\n")
    early.write_bytes(b"no FASTA")
    line = 1 + late.read_bytes()[: late.read_bytes().index(b"M1\n")].count(b"\n")
    with pytest.raises(InputError) as caught:
        build([late, early], tmp_path / "store", workers=workers)
    assert str(caught.value).startswith(f"{late}: record 'bad', line {line}, column 2: '1' is not allowed")
    assert entries(tmp_path) == ["early.fa", "late.fa"]


@pytest.mark.parametrize("workers", [1, 2])
def test_two_stores_are_divided_the_same_whatever_the_workers(corpus, whole, tmp_path, workers):
    outs = [tmp_path / "train", tmp_path / "validation"]
    train, held_out = build_stores(
        corpus, outs, divide=HashSplit(fraction=0.2), workers=workers, _range_bytes=RANGE_BYTES
    )
    build_stores(corpus, [tmp_path / "a", tmp_path / "b"], divide=HashSplit(fraction=0.2))
    assert content_of(outs[0]) == content_of(tmp_path / "a")
    assert content_of(outs[1]) == content_of(tmp_path / "b")
    both = TokenStore.open(tmp_path / "whole")
    assert train.num_proteins + held_out.num_proteins == len(both)
    counts = np.add(train.residue_counts, held_out.residue_counts)
    assert counts.tolist() == list(both.manifest.residue_counts)


KILLED = f"""
import os, signal, sys
from pathlib import Path
from protformer.corpus.store_build import build_stores
left = int(sys.argv[3])
def progress(amount):
    global left
    left -= amount
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
build_stores(sys.argv[4:], [Path(sys.argv[1])], workers=int(sys.argv[2]), progress=progress, _range_bytes={RANGE_BYTES})
"""


def killed_build(corpus, out: Path, *, workers: int, after_bytes: int) -> None:
    command = [sys.executable, "-c", KILLED, str(out), str(workers), str(after_bytes), *map(str, corpus)]
    assert subprocess.run(command, timeout=300, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_is_killed_again_and_again_ends_in_the_same_store(corpus, whole, tmp_path, monkeypatch, workers):
    out = tmp_path / "store"
    total = sum(path.stat().st_size for path in corpus)
    for share in (0.01, 0.3, 0.6, 0.9):
        killed_build(corpus, out, workers=workers, after_bytes=int(total * share))
        assert not out.exists()
        assert building_folder(out).exists()
    built = count_built_parts(monkeypatch)
    read: list[int] = []
    assert build(corpus, out, progress=read.append) == whole
    assert len(built) < 0.4 * len(plan_ranges(corpus, RANGE_BYTES))
    assert sum(read) >= 0.99 * total
    assert not building_folder(out).exists()


def count_built_parts(monkeypatch) -> list[int]:
    built: list[int] = []

    def counted(task, consumed):
        built.append(task.number)
        return build_part(task, consumed)

    monkeypatch.setattr(build_workers, "build_part", counted)
    return built


def test_after_a_kill_a_changed_source_is_read_anew(corpus, tmp_path, monkeypatch):
    out = tmp_path / "store"
    killed_build(corpus, out, workers=1, after_bytes=60_000)
    content = corpus[0].read_bytes()
    corpus[0].write_bytes(content.replace(b"M\n>p1_9 ", b"W\n>p1_9 "))
    built = count_built_parts(monkeypatch)
    changed = build(corpus, out)
    assert len(built) == len(plan_ranges(corpus, RANGE_BYTES))
    build_token_store(corpus, tmp_path / "anew")
    assert changed == content_of(tmp_path / "anew")


def test_a_kill_between_any_two_steps_of_the_disk_ends_in_the_same_store(tmp_path, monkeypatch):
    """Renames and removals are where a state could be half of one and half of another."""
    fasta, out = tmp_path / "a.fa", tmp_path / "store"
    fasta.write_bytes(proteins(160))
    outs = [out, tmp_path / "held_out"]
    expected = [tmp_path / "x", tmp_path / "y"]
    build_stores([fasta], expected, divide=HashSplit(fraction=0.3))

    class Killed(BaseException):
        pass

    def built_in_steps(stop_at: int) -> bool:
        """Whether a build is done before it is killed at this step."""
        steps = 0

        def count(real):
            def step(*arguments, **options):
                nonlocal steps
                steps += 1
                if steps >= stop_at:
                    raise Killed
                return real(*arguments, **options)

            return step

        with monkeypatch.context() as patched:
            for name in ("replace", "rename", "rmdir", "unlink"):
                patched.setattr(os, name, count(getattr(os, name)))
            # Nothing is tidied up after a kill.
            patched.setattr(store_build, "remove_exclusive_folder", lambda folder: None)
            try:
                build_stores([fasta], outs, divide=HashSplit(fraction=0.3), _range_bytes=RANGE_BYTES)
            except Killed:
                return False
        return True

    stop_at = 1
    while not built_in_steps(stop_at):
        build_stores([fasta], outs, divide=HashSplit(fraction=0.3), _range_bytes=RANGE_BYTES)
        for made, meant in zip(outs, expected, strict=True):
            assert content_of(made) == content_of(meant), stop_at
        stop_at += 1
    assert stop_at > 10


def test_ctrl_c_keeps_what_is_finished_and_says_so(corpus, whole, tmp_path, monkeypatch):
    out = tmp_path / "store"
    with pytest.raises(InterruptedRunError, match="the same command goes on from here, else delete"):
        build(corpus, out, progress=raise_after(60_000, KeyboardInterrupt))
    built = count_built_parts(monkeypatch)
    told: list[str] = []
    assert build(corpus, out, tell=told.append) == whole
    num_parts = len(plan_ranges(corpus, RANGE_BYTES))
    assert len(built) < num_parts
    assert told == [
        f"going on with an interrupted build: {num_parts - len(built)} of {num_parts} parts are there already"
    ]


def test_ctrl_c_keeps_a_part_that_waits_for_an_earlier_one(corpus, whole, tmp_path, monkeypatch):
    out = tmp_path / "store"

    def interrupted(tasks, **_):
        build_part(tasks[1], lambda amount: None)
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patched:
        patched.setattr(store_build, "run_parts", interrupted)
        with pytest.raises(InterruptedRunError, match="the same command goes on from here"):
            build(corpus, out)
    built = count_built_parts(monkeypatch)
    assert build(corpus, out) == whole
    assert len(built) == len(plan_ranges(corpus, RANGE_BYTES)) - 1


def test_ctrl_c_before_anything_is_finished_leaves_nothing(corpus, tmp_path):
    before = entries(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build(corpus, tmp_path / "store", progress=raise_after(1, KeyboardInterrupt))
    assert entries(tmp_path) == before


def raise_after(num_bytes: int, error: type[BaseException]) -> Callable[[int], None]:
    left = num_bytes

    def progress(amount: int) -> None:
        nonlocal left
        left -= amount
        if left <= 0:
            raise error

    return progress


def test_a_second_process_may_not_build_in_the_same_place(corpus, tmp_path):
    out = tmp_path / "store"
    with exclusive_folder(building_folder(out), out), pytest.raises(OutputError, match="another process is building"):
        build(corpus, out)
    build(corpus, out)


def test_who_waits_for_a_folder_gets_it_after_its_holder(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from protformer.corpus.build_lock import *\n"
        "folder = Path(sys.argv[1])\n"
        "with exclusive_folder(folder, folder):\n"
        "    print('locked', flush=True); sys.stdin.read(1); (folder / 'left').mkdir(); remove_exclusive_folder(folder)"
    )
    folder = tmp_path / "folder"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        with exclusive_folder(folder, folder, wait=lambda: holder.stdin.close()):
            assert entries(folder) == ["lock"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("max_bytes", [1000, 20_000])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(corpus, tmp_path, workers, max_bytes):
    before = entries(tmp_path)
    out = tmp_path / "store"
    with disk_full_at(max_bytes), pytest.raises(OutputError) as caught:
        build(corpus, out, workers=workers)
    assert str(caught.value) == f"{out}: the token store cannot be written: File too large"
    assert entries(tmp_path) == before


def test_a_worker_that_is_lost_is_told_in_one_line(corpus, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/bin/false")
        with pytest.raises(OutputError, match="a worker process ended with code 1, perhaps for want of memory"):
            build(corpus, tmp_path / "store", workers=2)
    assert not (tmp_path / "store").exists()
    assert build(corpus, tmp_path / "store", workers=2) == whole


def test_workers_end_when_their_parent_is_killed(corpus, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), "3", "10000", *map(str, corpus * 20)]
    with subprocess.Popen(command, start_new_session=True) as parent:
        pass
    deadline = time.monotonic() + 60
    while is_alive(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(parent.pid)


def is_alive(process_group: int) -> bool:
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    return True
