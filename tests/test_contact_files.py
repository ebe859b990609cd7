"""Contact files agree with each other and with the map, under names that ids cannot break out of."""

import csv
import re
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import record_ids

from protformer.errors import OutputError
from protformer.inference import contact_writers
from protformer.inference.contact_scores import ContactMap
from protformer.inference.contact_writers import contact_paths, file_stem, is_written, refuse_existing, write_contacts

NASTY_IDS = [
    "../../etc/passwd", "", ".hidden", "..", ".", "a/b", "a%2Fb", "a b", "/", "\\", "a\0b", "C:x", "-rf", "~",
    "a.partial", "_", "__", "a_", "_a", "a__b", "a___b", "\u03b1\u86cb\U0001f9ec", "sp|P12345|ABCD_ECOLI",
]  # fmt: skip
LONG_IDS = ["x" * 5000, "x" * 4999 + "y", "\u86cb" * 300, "/" * 300]

FORMATS = ("npz", "rr", "csv")


def contact_map(*chains, ids=None, seed=0):
    sequence = "".join(chains)
    scores = np.random.default_rng(seed).random((len(sequence), len(sequence)), dtype=np.float32)
    contacts = (scores + scores.T) / 2
    np.fill_diagonal(contacts, 0)
    ids = tuple(ids or "abc"[: len(chains)])
    return ContactMap(
        id="__".join(ids), contacts=contacts, sequence=sequence, chain_lengths=tuple(map(len, chains)), chain_ids=ids
    )


def random_sequence(length, seed=0):
    return "".join(np.random.default_rng(seed).choice(list("ACDEFGHIKLMNPQRSTVWYX"), length))


SINGLE = contact_map(random_sequence(123), ids=["sp|P1|X"])
PAIR = contact_map(random_sequence(60), random_sequence(23, seed=1), ids=["a/1", "b,\u03b2"])
HOMODIMER = contact_map("MKVLA", "MKVLA", ids=["a", "a"])
ONE_RESIDUE = contact_map("M")
MAPS = pytest.mark.parametrize(
    "chosen", [SINGLE, PAIR, HOMODIMER, ONE_RESIDUE], ids=["single", "pair", "homodimer", "one_residue"]
)


def read_npz(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def chain_starts(chosen):
    return np.cumsum([0, *chosen.chain_lengths])


def read_rr(path, chosen):
    """The header lines, the sequence lines, and the rows (i, j, score), i and j counted from 0 in the whole map."""
    lines = path.read_text(encoding="ascii").splitlines()
    assert lines[-1] == "END"
    end_of_header = lines.index("MODEL 1") + 1
    rest = lines[end_of_header:-1]
    sequence_lines = [line for line in rest if " " not in line]
    assert rest[: len(sequence_lines)] == sequence_lines
    letters = dict(zip("ABC", chain_starts(chosen)[:-1].tolist(), strict=False))
    rows = []
    for line in rest[len(sequence_lines) :]:
        i, j, near, far, score = line.split(" ")
        assert (near, far) == ("0", "8")
        places = []
        for name in (i, j):
            letter, number = re.fullmatch(r"([A-Z]?)(\d+)", name).groups()
            assert bool(letter) == (len(chosen.chain_ids) > 1)
            places.append(letters[letter or "A"] + int(number) - 1)
        rows.append((*places, float(score)))
    return lines[:end_of_header], sequence_lines, rows


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@MAPS
def test_npz_holds_the_map_its_sequence_and_its_chains(tmp_path, chosen):
    (path,) = write_contacts(chosen, tmp_path, ["npz"])
    arrays = read_npz(path)
    pair = len(chosen.chain_ids) == 2
    names = {"contacts", "sequence", "chain_lengths", "chain_ids", "provenance"} | ({"inter_chain"} if pair else set())
    assert set(arrays) == names
    assert arrays["contacts"].dtype == np.float32
    np.testing.assert_array_equal(arrays["contacts"], chosen.contacts)
    assert str(arrays["sequence"]) == chosen.sequence
    assert arrays["chain_lengths"].tolist() == list(chosen.chain_lengths)
    assert arrays["chain_ids"].tolist() == list(chosen.chain_ids)


@pytest.mark.parametrize("chosen", [PAIR, HOMODIMER])
def test_the_inter_chain_block_of_a_pair_has_the_first_chain_along_its_rows(tmp_path, chosen):
    (path,) = write_contacts(chosen, tmp_path, ["npz"])
    block = read_npz(path)["inter_chain"]
    first, second = chosen.chain_lengths
    assert block.shape == (first, second)
    for i, j in ((0, 0), (first - 1, 0), (0, second - 1), (3, 2)):
        assert block[i, j] == chosen.contacts[i, first + j]


@MAPS
def test_rr_lists_every_pair_once_from_the_strongest_to_the_weakest(tmp_path, chosen):
    (path,) = write_contacts(chosen, tmp_path, ["rr"])
    _, _, rows = read_rr(path, chosen)
    assert all(i < j for i, j, _ in rows)
    length = len(chosen.sequence)
    assert {(i, j) for i, j, _ in rows} == {(i, j) for i in range(length) for j in range(i + 1, length)}
    assert len(rows) == length * (length - 1) // 2
    scores = [score for _, _, score in rows]
    assert scores == sorted(scores, reverse=True)
    for i, j, score in rows:
        assert score == pytest.approx(float(chosen.contacts[i, j]), abs=6e-7)


@MAPS
def test_rr_begins_as_casp_wants_it_with_each_chain_in_lines_of_50_residues(tmp_path, chosen):
    (path,) = write_contacts(chosen, tmp_path, ["rr"])
    header, sequence_lines, _ = read_rr(path, chosen)
    assert header[0] == "PFRMAT RR"
    assert [line.split(" ")[0] for line in header] == ["PFRMAT", "TARGET", "AUTHOR", "METHOD", "MODEL"]
    assert header[1] == f"TARGET {'__'.join(chosen.chain_ids) if chosen.id.isascii() else path.stem}"
    expected = []
    for start, length in zip(chain_starts(chosen), chosen.chain_lengths, strict=False):
        chain = chosen.sequence[start : start + length]
        expected += [chain[at : at + 50] for at in range(0, length, 50)]
    assert sequence_lines == expected


@MAPS
def test_csv_counts_residues_from_1_in_each_chain_and_names_the_chains(tmp_path, chosen):
    (path,) = write_contacts(chosen, tmp_path, ["csv"])
    assert path.read_text(encoding="utf-8").splitlines()[0] == "i,aa_i,chain_i,j,aa_j,chain_j,p"
    rows = read_csv(path)
    residues = [
        (str(number), amino_acid, chain_id)
        for start, length, chain_id in zip(chain_starts(chosen), chosen.chain_lengths, chosen.chain_ids, strict=False)
        for number, amino_acid in enumerate(chosen.sequence[start : start + length], start=1)
    ]
    pairs = [(i, j) for i in range(len(residues)) for j in range(i + 1, len(residues))]
    assert len(rows) == len(pairs)
    for row, (i, j) in zip(rows, pairs, strict=True):
        assert (row["i"], row["aa_i"], row["chain_i"]) == residues[i]
        assert (row["j"], row["aa_j"], row["chain_j"]) == residues[j]
        assert float(row["p"]) == pytest.approx(float(chosen.contacts[i, j]), abs=6e-7)


@MAPS
def test_csv_and_rr_give_each_pair_the_same_digits(tmp_path, chosen):
    _, rr, table = write_contacts(chosen, tmp_path, FORMATS)
    _, _, rows = read_rr(rr, chosen)
    length = len(chosen.sequence)
    pairs = [(i, j) for i in range(length) for j in range(i + 1, length)]
    from_csv = {pair: float(row["p"]) for pair, row in zip(pairs, read_csv(table), strict=True)}
    assert {(i, j): score for i, j, score in rows} == from_csv


def test_each_format_and_the_figure_is_one_file_named_by_the_escaped_id(tmp_path):
    paths = write_contacts(SINGLE, tmp_path, FORMATS, plot=True)
    stem = "sp%7CP1%7CX"
    assert paths == [tmp_path / f"{stem}.{suffix}" for suffix in (*FORMATS, "png")]
    assert entries(tmp_path) == sorted(path.name for path in paths)
    assert paths[-1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("suffix", [*FORMATS, "png"])
def test_a_file_that_exists_is_refused_before_anything_is_computed_or_written(tmp_path, suffix):
    existing = tmp_path / f"a.{suffix}"
    existing.write_text("kept")
    chosen = contact_map("MKVLA")
    with pytest.raises(OutputError, match="exists already") as refused:
        refuse_existing(contact_paths(chosen.chain_ids, tmp_path, FORMATS, plot=True))
    assert str(existing) in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(OutputError, match="exists already"):
        write_contacts(chosen, tmp_path, FORMATS, plot=True)
    assert entries(tmp_path) == [existing.name]
    assert existing.read_text() == "kept"


class InterruptedArray(np.ndarray):
    """Contacts of which the last rows cannot be had: whoever asks is interrupted."""

    def __getitem__(self, key):
        rows = key[0] if isinstance(key, tuple) else key
        if np.max(rows) >= len(self) - 2:
            raise KeyboardInterrupt
        return np.asarray(super().__getitem__(key))


@pytest.mark.parametrize("written", ["rr", "csv"])
def test_an_interruption_in_the_middle_leaves_no_file(tmp_path, written):
    whole = contact_map("MKVLA")
    broken = ContactMap(
        id="a", contacts=whole.contacts.view(InterruptedArray), sequence="MKVLA", chain_lengths=(5,), chain_ids=("a",)
    )
    with pytest.raises(KeyboardInterrupt):
        write_contacts(broken, tmp_path, [written])
    assert entries(tmp_path) == []
    write_contacts(whole, tmp_path, [written])
    assert entries(tmp_path) == [f"a.{written}"]


def decoded(stem):
    return tuple(unquote(name, errors="strict") for name in stem.split("__"))


def any_ids():
    return st.one_of(record_ids(), st.sampled_from(NASTY_IDS), st.text("a_.%/", min_size=1, max_size=6))


@given(st.lists(any_ids(), min_size=1, max_size=2))
@example([""])
@example(["", "a"])
@example(["a_", "_b"])
@example(["a", "_b"])
@example([".", ".."])
def test_a_name_gives_back_the_ids_it_was_made_of(ids):
    stem = file_stem(ids)
    assert re.fullmatch(r"[A-Za-z0-9._%-]*", stem)
    assert not stem.startswith(".")
    if len(stem) < 200:
        assert decoded(stem) == tuple(ids)


@pytest.mark.parametrize("nasty", [*NASTY_IDS, *LONG_IDS], ids=lambda value: repr(value[:12]))
def test_files_of_nasty_ids_stay_in_their_folder(tmp_path, nasty):
    folder = tmp_path / "deep" / "out"
    folder.mkdir(parents=True)
    paths = write_contacts(contact_map("MKVL", ids=[nasty]), folder, FORMATS)
    assert {path.parent for path in paths} == {folder}
    assert entries(folder) == sorted(path.name for path in paths)
    assert entries(tmp_path) == ["deep"]
    assert entries(tmp_path / "deep") == ["out"]
    assert read_npz(paths[0])["chain_ids"].tolist() == [nasty]
    assert read_csv(paths[2])[0]["chain_i"] == nasty


def test_ids_that_differ_have_names_that_differ_also_where_they_are_cut():
    ids = [*NASTY_IDS, *LONG_IDS]
    stems = [file_stem([one]) for one in ids] + [file_stem([one, other]) for one in ids for other in ids]
    assert len(set(stems)) == len(stems)
    assert max(len(stem.encode()) for stem in stems) <= 200


def test_a_pair_is_told_from_one_protein_whose_id_looks_like_a_pair():
    assert file_stem(["a", "b"]) == "a__b"
    assert file_stem(["a__b"]) != "a__b"
    assert file_stem(["a_", "b"]) != file_stem(["a", "_b"])


def test_a_write_that_is_cut_short_leaves_no_npz_to_vouch_for_the_rest(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space")

    monkeypatch.setitem(contact_writers._WRITERS, "png", full)
    with pytest.raises(OutputError, match="no space"):
        write_contacts(contact_map("MKVLA"), tmp_path, ["npz", "rr"], plot=True)
    assert entries(tmp_path) == ["a.rr"]


def test_a_map_is_there_when_all_its_files_are(tmp_path):
    chosen = contact_map("MKVLA")
    paths = write_contacts(chosen, tmp_path, FORMATS, plot=True)
    assert is_written(paths, ["MKVLA"], {})
    for others in (["MKVLV"], ["MKV", "LA"]):
        with pytest.raises(OutputError, match="another sequence"):
            is_written(paths, others, {})
    paths[1].unlink()
    assert not is_written(paths, ["MKVLA"], {})
    with pytest.raises(OutputError, match="another sequence"):
        is_written(paths, ["MKVLV"], {})
    assert write_contacts(chosen, tmp_path, FORMATS, plot=True, replace=True) == paths
    assert is_written(paths, ["MKVLA"], {})
    npz = next(path for path in paths if path.suffix == ".npz")
    write_contacts(chosen, tmp_path, ["npz"], replace=True)
    assert not is_written(paths, ["MKVLA"], {})  # the others are of another time, perhaps of another model
    assert is_written([npz], ["MKVLA"], {})
    with pytest.raises(OutputError, match="was made by model None with method None, not jacobian"):
        is_written(paths, ["MKVLA"], {"method": "jacobian"})
    arrays = read_npz(npz)
    for provenance in ("[1]", "{", None):
        changed = arrays | {"provenance": np.array(provenance or "")}
        if provenance is None:
            del changed["provenance"]
        np.savez(npz, **changed)
        with pytest.raises(OutputError, match="not a contact map, or damaged"):
            is_written(paths, ["MKVLA"], {})
    npz.write_bytes(b"PK damaged")
    with pytest.raises(OutputError, match="not a contact map, or damaged"):
        is_written(paths, ["MKVLA"], {})
