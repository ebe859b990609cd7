"""The token store: what goes in comes out, it appears whole or not at all, and a foreign or damaged one is refused."""

import errno
import gzip
import io
import json
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FastaText, fasta_texts

from protformer.alphabet import EOS, NUM_TOKENS, RESIDUE_TO_TOKEN
from protformer.corpus.fasta import FastaReport, read_fasta
from protformer.corpus.token_store import (
    IDS_FILE,
    MANIFEST_FILE,
    OFFSETS_FILE,
    TOKENS_FILE,
    TokenStore,
    TokenStoreWriter,
    build_token_store,
)
from protformer.errors import InputError, OutputError

FASTA = b">a first\nMKVJ\n>b\nMK-L*\n>a again\nMUOBZX\n"


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(FASTA)
    return path


def letters(tokens: np.ndarray) -> str:
    names = {token: letter for letter, token in RESIDUE_TO_TOKEN.items()}
    return "".join(names[token] for token in tokens.tolist())


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(st.lists(fasta_texts(), min_size=1, max_size=3))
def test_the_store_gives_back_every_protein_of_every_file_in_order(tmp_path_factory, texts: list[FastaText]):
    folder = tmp_path_factory.mktemp("stores")
    paths = [folder / f"{i}.fasta.gz" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(gzip.compress(text.content, mtime=0))
    manifest = build_token_store(paths, folder / "store")
    store = TokenStore.open(folder / "store")
    assert [store.id(i) for i in range(len(store))] == [name for text in texts for name in text.ids]
    sequences = [sequence for text in texts for sequence in text.sequences]
    assert [letters(store.protein(i)) for i in range(len(store))] == sequences
    assert store.tokens[store.offsets[1:] - 1].tolist() == [EOS] * len(sequences)
    assert manifest == store.manifest
    assert manifest.num_residues == sum(map(len, sequences)) == store.num_tokens - len(sequences)
    assert manifest.residue_counts == tuple(np.bincount(store.tokens, minlength=NUM_TOKENS).tolist())
    assert [Path(source.path).name for source in manifest.sources] == [path.name for path in paths]


def test_changes_of_letters_are_kept_in_the_manifest(tmp_path, fasta):
    build_token_store([fasta], tmp_path / "store")
    assert TokenStore.open(tmp_path / "store").manifest.changes_summary() == (
        "1 J read as X, 1 trailing * dropped, 1 gap characters removed (in 3 sequences read)"
    )


def test_the_files_are_plain_arrays_that_others_can_read(tmp_path, fasta):
    build_token_store([fasta], tmp_path / "store")
    offsets = np.load(tmp_path / "store" / OFFSETS_FILE)
    tokens = np.fromfile(tmp_path / "store" / TOKENS_FILE, dtype=np.uint8)
    assert (offsets.dtype, offsets.tolist()) == (np.int64, [0, 5, 9, 16])
    assert len(tokens) == 16
    assert (tmp_path / "store" / IDS_FILE).read_bytes() == b"aba"


def test_duplicates_are_allowed_unless_asked_otherwise(tmp_path, fasta):
    assert build_token_store([fasta], tmp_path / "all").num_proteins == 3
    first = build_token_store([fasta], tmp_path / "first", on_duplicate="first")
    assert (first.num_proteins, first.report.duplicates_dropped) == (2, 1)
    with pytest.raises(InputError, match="record 'a', line 5: duplicate id, first on line 1"):
        build_token_store([fasta], tmp_path / "error", on_duplicate="error")


def test_a_store_without_ids_says_so_when_asked_for_one(tmp_path, fasta):
    build_token_store([fasta], tmp_path / "store", keep_ids=False)
    assert IDS_FILE not in entries(tmp_path / "store")
    with pytest.raises(InputError, match="made without ids"):
        TokenStore.open(tmp_path / "store").id(0)


def test_indices_outside_the_store_are_refused(tmp_path, fasta):
    build_token_store([fasta], tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    for index in (-1, 3):
        with pytest.raises(IndexError):
            store.protein(index)
        with pytest.raises(IndexError):
            store.id(index)


def test_tokens_cannot_be_written_to(tmp_path, fasta):
    build_token_store([fasta], tmp_path / "store")
    protein = TokenStore.open(tmp_path / "store").protein(0)
    with pytest.raises(ValueError, match="read-only"):
        protein[0] = 0


def test_a_pickled_store_is_opened_again_instead_of_copied(tmp_path, fasta):
    build_token_store([fasta], tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    assert letters(pickle.loads(pickled).protein(1)) == "MKL"


def test_progress_adds_up_to_the_bytes_of_the_files(tmp_path, fasta):
    steps: list[int] = []
    build_token_store([fasta, fasta], tmp_path / "store", progress=steps.append)
    assert sum(steps) == 2 * len(FASTA)


@pytest.mark.parametrize("content", [b">a\nMK\n>b\nM1\n", b"", gzip.compress(FASTA * 9, mtime=0)[:-5]])
def test_a_bad_file_leaves_nothing_behind(tmp_path, content):
    (tmp_path / "bad.fasta").write_bytes(content)
    with pytest.raises(InputError):
        build_token_store([tmp_path / "bad.fasta"], tmp_path / "store")
    assert entries(tmp_path) == ["bad.fasta"]


def test_a_bad_file_leaves_an_older_store_as_it_was(tmp_path, fasta):
    build_token_store([fasta], tmp_path / "store")
    (tmp_path / "bad.fasta").write_bytes(b">a\n")
    with pytest.raises(InputError):
        build_token_store([tmp_path / "bad.fasta"], tmp_path / "store")
    assert len(TokenStore.open(tmp_path / "store")) == 3
    assert entries(tmp_path) == ["bad.fasta", "proteins.fasta", "store"]


def test_an_older_store_or_an_empty_folder_is_replaced(tmp_path, fasta):
    (tmp_path / "store").mkdir()
    build_token_store([fasta, fasta], tmp_path / "store")
    build_token_store([fasta], tmp_path / "store", keep_ids=False)
    assert len(TokenStore.open(tmp_path / "store")) == 3
    assert entries(tmp_path) == ["proteins.fasta", "store"]
    assert IDS_FILE not in entries(tmp_path / "store")


def test_a_folder_or_file_that_is_no_store_is_not_touched(tmp_path, fasta):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("...")
    for out in (tmp_path / "mine", fasta):
        with pytest.raises(OutputError, match="exists and is not a token store"):
            build_token_store([fasta], out)
    assert entries(tmp_path) == ["mine", "proteins.fasta"]


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path, fasta, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError) as caught:
        build_token_store([fasta], tmp_path / "store")
    message = f"{tmp_path}/store: the token store cannot be written: No space left on device"
    assert str(caught.value) == message
    assert entries(tmp_path) == ["proteins.fasta"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_from_the_start_is_told_in_one_line(tmp_path, fasta, monkeypatch):
    monkeypatch.setattr("protformer.corpus.store_files.TOKENS_FILE", "/dev/full")
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        build_token_store([fasta], tmp_path / "store")
    assert entries(tmp_path) == ["proteins.fasta"]


def edit_manifest(**changes: object):
    def edit(store: Path) -> None:
        file = store / MANIFEST_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_manifest(alphabet="0" * 16), "made with another alphabet"),
        (edit_manifest(format_version=99), "format version 99, this program reads 1"),
        (edit_manifest(num_proteins=2, num_residues=14), "damaged token store: 3 proteins in 16 tokens"),
        (edit_manifest(num_proteins=7), "the counts in the manifest contradict each other"),
        (edit_manifest(num_proteins="3"), "incomplete manifest"),
        (edit_manifest(sources=[{}]), "incomplete manifest"),
        (lambda store: (store / MANIFEST_FILE).write_text("{"), "not the manifest of a token store"),
        (lambda store: (store / MANIFEST_FILE).write_text("[]"), "not the manifest of a token store"),
        (lambda store: (store / MANIFEST_FILE).unlink(), "not a token store: it has no manifest.json"),
        (lambda store: (store / TOKENS_FILE).write_bytes(bytes(15)), "damaged token store: 3 proteins in 15 tokens"),
        (lambda store: (store / TOKENS_FILE).write_bytes(b""), "damaged token store: 3 proteins in 0 tokens"),
        (lambda store: (store / TOKENS_FILE).unlink(), "tokens.bin: no such file"),
        (lambda store: (store / OFFSETS_FILE).write_bytes(b"no array"), "offsets.npy: damaged token store"),
        (lambda store: np.save(store / OFFSETS_FILE, np.zeros(4)), "offsets.npy: damaged token store"),
        (lambda store: np.save(store / OFFSETS_FILE, np.array([0, 1, 2])), "damaged token store: 2 proteins"),
    ],
)
def test_a_foreign_or_damaged_store_is_refused_in_one_line(tmp_path, fasta, damage, message):
    build_token_store([fasta], tmp_path / "store")
    damage(tmp_path / "store")
    with pytest.raises(InputError) as caught:
        TokenStore.open(tmp_path / "store")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/store")
    assert str(caught.value).isprintable()


def test_a_path_without_a_store_is_refused(tmp_path, fasta):
    with pytest.raises(InputError, match="no such file"):
        TokenStore.open(tmp_path / "none")
    with pytest.raises(InputError, match=r"proteins\.fasta"):
        TokenStore.open(fasta)


def test_sources_are_known_again_until_they_change(tmp_path, fasta):
    build_token_store([fasta], tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    moved = fasta.rename(tmp_path / "moved.fasta")
    assert store.difference_from([moved]) is None
    assert store.difference_from([moved, moved]) == "the token store was made from 1 FASTA files, not from 2"
    moved.write_bytes(FASTA.replace(b"MKVJ", b"MKVL"))
    assert store.difference_from([moved]) == f"{moved}: its content is not what the token store was made from"
    moved.write_bytes(FASTA + b"\n")
    assert "has 40 bytes, the token store was made from" in str(store.difference_from([moved]))
    with pytest.raises(InputError, match="no such file"):
        store.difference_from([fasta])


def test_a_store_can_be_made_from_standard_input(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(FASTA, mtime=0))))
    build_token_store(["-"], tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    assert len(store) == 3
    assert store.difference_from(["-"]) is None
    assert store.difference_from([tmp_path / "store" / TOKENS_FILE]) is not None


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, fasta):
    def grow(num_bytes: int) -> None:
        fasta.write_bytes(FASTA + b">late\nMK\n")

    with pytest.raises(InputError, match="changed while it was read"):
        build_token_store([fasta], tmp_path / "store", progress=grow)
    assert entries(tmp_path) == ["proteins.fasta"]


def test_a_store_of_several_blocks_agrees_with_the_reader_record_by_record(tmp_path):
    content = b"".join(b">protein%d\n%s\n" % (i, b"ACDEFGHIKLMNPQRSTVWY" * (1 + i % 40)) for i in range(2000))
    path = tmp_path / "many.fasta"
    path.write_bytes(content)
    build_token_store([path], tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    for i, record in enumerate(read_fasta(path)):
        assert store.id(i) == record.id
        assert store.protein(i).tobytes() == record.tokens


def test_a_store_may_be_left_without_proteins_by_who_selects_them(tmp_path):
    with TokenStoreWriter(tmp_path / "store") as writer:
        writer.finish([], FastaReport())
    store = TokenStore.open(tmp_path / "store")
    assert (len(store), store.num_tokens, store.offsets.tolist()) == (0, 0, [0])


def test_a_store_that_was_not_finished_does_not_appear(tmp_path):
    with TokenStoreWriter(tmp_path / "store") as writer:
        writer.append(["a"], bytes([RESIDUE_TO_TOKEN["M"], EOS]), np.array([2]))
    assert entries(tmp_path) == []


def test_a_manifest_is_json_of_plain_numbers(tmp_path, fasta):
    manifest = build_token_store([fasta], tmp_path / "store")
    tree = json.loads((tmp_path / "store" / MANIFEST_FILE).read_text())
    assert tree == json.loads(json.dumps(asdict(manifest)))
    assert tree["num_residues"] == 13
