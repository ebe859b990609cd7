"""Embeddings on disk: what goes in comes out, in order, under safe names, whole or not at all, and resumable."""

import builtins
import csv
import json

import h5py
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from protformer.errors import InputError, InterruptedRunError, OutputError
from protformer.inference.embedding_writers import EmbeddingRecord, open_embedding_writer
from protformer.inference.hdf5_embeddings import INDEX_GROUP, escape_id, unescape_id

DESCRIPTION = {"name": "test", "layer": -1, "pooling": "mean over residues", "weights": "abc"}
IDS = ["z", "sp|P1/x", "ids", ".", "..", "100%", "a b\u00e9", "%index", "m"]
SUFFIXES = [".h5", ".npy", ".parquet", ".pt"]


def record(name, length=3, dim=4, truncated=False):
    residue = np.random.default_rng(len(name) + length).standard_normal((length, dim)).astype(np.float32)
    return EmbeddingRecord(
        id=name,
        header=f'{name} a "quoted"\theader',
        length=length + 2 * truncated,
        truncated=truncated,
        residue=residue,
        protein=residue.mean(axis=0),
    )


RECORDS = [record(name, length, truncated=length == 5) for length, name in enumerate(IDS, start=1)]


def open_writer(path, per="residue", *, dtype="float32", resume=False, description=DESCRIPTION):
    return open_embedding_writer(
        path, per=per, dtype=dtype, description=description, resume=resume, save=lambda value, at: torch.save(value, at)
    )


def write_all(path, records=RECORDS, **options):
    with open_writer(path, **options) as writer:
        for one in records:
            writer.write(one)
    return path


def read_back(path, per):
    """The rows (id, header, length, truncated) in the order of the file, and `parts[id][part]`, as users read them."""
    parts_asked = ("residue", "protein") if per == "both" else (per,)
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            index = file[INDEX_GROUP]
            rows = zip(
                index["id"].asstr()[:], index["header"].asstr()[:], index["length"], index["truncated"], strict=True
            )
            table = [(name, header, int(length), bool(cut)) for name, header, length, cut in rows]
            groups = {part: file[part] if per == "both" else file for part in parts_asked}
            return table, {row[0]: {p: g[escape_id(row[0])][:] for p, g in groups.items()} for row in table}
    if path.suffix == ".npy":
        matrix = np.load(path, mmap_mode="r")
        with path.with_suffix(".tsv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        table = [(r["id"], r["header"], int(r["length"]), r["truncated"] == "1") for r in rows]
        if per == "protein":
            return table, {r["id"]: {per: matrix[i]} for i, r in enumerate(rows)}
        return table, {r["id"]: {per: matrix[int(r["start"]) : int(r["stop"])]} for r in rows}
    if path.suffix == ".parquet":
        from pyarrow import parquet

        content = parquet.read_table(path)
        dim = int(content.schema.metadata[b"dim"])
        rows = content.to_pylist()
        table = [(r["id"], r["header"], r["length"], r["truncated"]) for r in rows]
        values = {r["id"]: {p: np.array(r[p if per == "both" else "embedding"]) for p in parts_asked} for r in rows}
        for one in values.values():
            if "residue" in one:
                one["residue"] = one["residue"].reshape(-1, dim)
        return table, values
    content = torch.load(path, weights_only=True)
    table = list(zip(*(content["index"][name] for name in ("id", "header", "length", "truncated")), strict=True))
    return table, {name: {p: t.numpy() for p, t in one.items()} for name, one in content["embeddings"].items()}


LAYOUTS = [(s, p) for s in SUFFIXES for p in ("protein", "residue", "both") if (s, p) != (".npy", "both")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("suffix", "per"), LAYOUTS)
def test_every_format_gives_back_ids_headers_and_values_in_input_order(tmp_path, suffix, per, dtype):
    table, parts = read_back(write_all(tmp_path / f"x{suffix}", per=per, dtype=dtype), per)
    assert table == [(r.id, r.header, r.length, r.truncated) for r in RECORDS]
    for one in RECORDS:
        expected = {"residue": one.residue, "protein": one.protein}
        assert set(parts[one.id]) == ({"residue", "protein"} if per == "both" else {per})
        for part, values in parts[one.id].items():
            np.testing.assert_array_equal(values, expected[part].astype(dtype))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_proteins_is_a_valid_file(tmp_path, suffix):
    assert read_back(write_all(tmp_path / f"x{suffix}", [], per="residue"), "residue") == ([], {})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_exception_midway_leaves_no_final_file(tmp_path, suffix):
    interrupt(tmp_path / f"x{suffix}", 1)
    assert [path.name for path in tmp_path.iterdir()] == (["x.h5.partial"] if suffix == ".h5" else [])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_but_the_result_is_left_behind(tmp_path, suffix):
    write_all(tmp_path / f"x{suffix}")
    expected = ["x.json", "x.npy", "x.tsv"] if suffix == ".npy" else [f"x{suffix}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_existing_file_is_not_overwritten(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        open_writer(path)
    assert path.read_bytes() == b"precious"


def test_an_existing_table_beside_a_matrix_is_not_overwritten(tmp_path):
    (tmp_path / "x.tsv").write_text("precious")
    with pytest.raises(OutputError, match=r"x\.tsv: exists already"):
        open_writer(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.csv", {}, r"unknown suffix '\.csv'.*\.h5, \.npy, \.parquet, \.pt"),
        ("x.npy", {"per": "both"}, r"npy holds one matrix.*\.h5, \.parquet or \.pt"),
        ("x.npy", {"resume": True}, "only h5 can be resumed"),
        ("x.parquet", {"resume": True}, "only h5 can be resumed"),
        ("x.pt", {"resume": True}, "only h5 can be resumed"),
        ("missing/x.h5", {}, "the folder .* does not exist"),
    ],
)
def test_what_a_format_cannot_do_is_said_before_anything_is_written(tmp_path, name, options, message):
    with pytest.raises(OutputError, match=message):
        open_writer(tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_parquet_without_pyarrow_names_the_extra_to_install(tmp_path, monkeypatch):
    original = builtins.__import__

    def without_pyarrow(name, *arguments, **keywords):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(OutputError, match=r"pip install 'protformer\[parquet\]'"):
        open_writer(tmp_path / "x.parquet")


def test_a_value_beyond_float16_is_an_error_and_not_infinity(tmp_path):
    big = EmbeddingRecord(
        id="big", header="big", length=1, truncated=False, residue=np.array([[1e5, 0.0]], dtype=np.float32)
    )
    with pytest.raises(OutputError, match=r"'big' has the value 100000.*--dtype float32"):
        write_all(tmp_path / "x.h5", [big], dtype="float16")


@pytest.mark.parametrize("suffix", [".h5", ".pt"])
def test_a_repeated_id_is_an_error(tmp_path, suffix):
    with pytest.raises(OutputError, match="'z' is in the file already"):
        write_all(tmp_path / f"x{suffix}", [RECORDS[0], RECORDS[0]])


def test_an_h5_file_says_what_made_it(tmp_path):
    with h5py.File(write_all(tmp_path / "x.h5", per="both", dtype="float16")) as file:
        assert json.loads(file.attrs["model"]) == DESCRIPTION
        assert (file.attrs["per"], file.attrs["dtype"], file.attrs["format_version"]) == ("both", "float16", 1)
        assert [unescape_id(name) for name in file["residue"]] == IDS


@given(st.text(st.characters(codec="utf-8"), min_size=1))
@example("100%2F")
@example("a/\0b")
@example(".")
@example("..")
@example("%index")
def test_an_escaped_id_is_one_name_in_an_h5_group_and_reversible(name):
    escaped = escape_id(name)
    assert unescape_id(escaped) == name
    assert not set(escaped) & set("/\0")
    assert escaped not in (".", "..", INDEX_GROUP)


def interrupt(path, num_records, **options):
    def records():
        yield from RECORDS[:num_records]
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, InterruptedRunError)) as interruption:
        write_all(path, records(), **options)
    if path.suffix == ".h5":
        assert f"interrupted; {num_records} proteins are kept in {path}.partial: " in str(interruption.value)


def resume(path, **options):
    with open_writer(path, resume=True, **options) as writer:
        done = writer.done_ids()
        for one in RECORDS:
            if one.id not in done:
                writer.write(one)
    return done


@pytest.mark.parametrize("per", ["residue", "protein", "both"])
def test_a_resumed_file_holds_what_an_uninterrupted_one_does(tmp_path, per):
    interrupt(tmp_path / "x.h5", 4, per=per)
    assert resume(tmp_path / "x.h5", per=per) == set(IDS[:4])
    table, parts = read_back(tmp_path / "x.h5", per)
    whole_table, whole_parts = read_back(write_all(tmp_path / "whole.h5", per=per), per)
    assert table == whole_table
    for name, one in whole_parts.items():
        for part, values in one.items():
            np.testing.assert_array_equal(parts[name][part], values)


def test_a_mistake_midway_says_what_is_kept(tmp_path):
    path = tmp_path / "x.h5"

    def records():
        yield from RECORDS[:2]
        raise InputError("bad record")

    message = f"^bad record; 2 proteins are kept in {path}.partial: --resume goes on from"
    with pytest.raises(InputError, match=message):
        write_all(path, records())
    assert resume(path) == set(IDS[:2])


def test_resuming_a_finished_file_adds_what_it_lacks(tmp_path):
    write_all(tmp_path / "x.h5", RECORDS[:2])
    assert resume(tmp_path / "x.h5") == set(IDS[:2])
    assert [row[0] for row in read_back(tmp_path / "x.h5", "residue")[0]] == IDS


def test_resuming_where_nothing_is_starts_anew(tmp_path):
    assert resume(tmp_path / "x.h5") == set()
    assert resume(tmp_path / "x.h5") == set(IDS)


def test_an_empty_partial_file_does_not_cost_the_finished_one(tmp_path):
    write_all(tmp_path / "x.h5", RECORDS[:2])
    (tmp_path / "x.h5.partial").touch()
    assert resume(tmp_path / "x.h5") == set(IDS[:2])


def test_unfinished_work_is_not_thrown_away_by_a_fresh_start(tmp_path):
    interrupt(tmp_path / "x.h5", 4)
    with pytest.raises(OutputError, match="left by an interrupted run; go on with --resume"):
        open_writer(tmp_path / "x.h5")
    assert resume(tmp_path / "x.h5") == set(IDS[:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "protein"}, "per residue, not protein"),
        ({"dtype": "float16"}, "dtype float32, not float16"),
        ({"description": DESCRIPTION | {"layer": 3}}, "layer -1, not 3"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_resuming_with_another_model_or_options_is_refused(tmp_path, options, message, finished):
    path = tmp_path / "x.h5"
    if finished:
        write_all(path)
    else:
        interrupt(path, 4)
    with pytest.raises(OutputError, match=message):
        open_writer(path, resume=True, **options)
    assert resume(path) == set(IDS if finished else IDS[:4])


@pytest.mark.parametrize("name", ["x.h5", "x.h5.partial"])
def test_a_damaged_file_is_not_resumed(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an HDF5 file")
    with pytest.raises(OutputError, match=rf"{name}: damaged, cannot be resumed.*delete it"):
        open_writer(tmp_path / "x.h5", resume=True)


@pytest.mark.parametrize("damaged", [b'{"name"', b"sequence_hash"], ids=["attribute", "index"])
def test_a_file_with_damage_inside_is_left_as_it_is(tmp_path, damaged):
    path = tmp_path / "x.h5"
    write_all(path)
    content = path.read_bytes()
    assert damaged in content
    path.write_bytes(content.replace(damaged, damaged[::-1]))
    with pytest.raises(OutputError, match=r"x\.h5: (damaged|begun by an earlier version).*start anew"):
        open_writer(path, resume=True)
    assert path.read_bytes() == content.replace(damaged, damaged[::-1])
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, suffix):
    (tmp_path / f"x{suffix}.partial").mkdir()  # root may write in every folder, but not here
    with pytest.raises((OSError, OutputError)):
        open_writer(tmp_path / f"x{suffix}")


def test_another_programs_h5_is_not_resumed(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["P12345"] = np.zeros(3)
        file.attrs["model"] = "theirs"
    with pytest.raises(OutputError, match="not written by protformer"):
        open_writer(tmp_path / "x.h5", resume=True)
    with h5py.File(tmp_path / "x.h5") as file:
        assert list(file) == ["P12345"]
