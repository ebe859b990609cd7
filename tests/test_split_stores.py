"""Splits: whole clusters and families on one side, no relatives across, the same sides when data are added."""

import json
import os
import shutil
import stat
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protformer.cli import run
from protformer.corpus import split_stores
from protformer.corpus.families import read_families
from protformer.corpus.identifiers import hash_names
from protformer.corpus.split_sides import PRECEDENCE, Side, drop_copies, drop_relatives, sides_by_share
from protformer.corpus.token_store import TokenStore, build_token_store

FAKE_MMSEQS = f"""#!{sys.executable}
# Clusters: same first three letters. Relatives: same last three letters.
import sys

def records(path):
    words = open(path).read().split()
    return dict(zip((word[1:] for word in words[::2]), words[1::2]))

command, *rest = sys.argv[1:]
if command == "version":
    print("14-fake")
elif "WWWWW" in open(rest[0]).read():
    sys.exit("Error: out of cheese")
elif command in ("easy-linclust", "easy-cluster"):
    first = {{}}
    with open(rest[1] + "_cluster.tsv", "w") as table:
        for name, letters in records(rest[0]).items():
            print(first.setdefault(letters[:3], name), name, sep="\\t", file=table)
elif command == "easy-search":
    with open(rest[2], "w") as table:
        for query, letters in records(rest[0]).items():
            for target, others in records(rest[1]).items():
                if letters[-3:] == others[-3:]:
                    print(query, target, sep="\\t", file=table)
"""


@pytest.fixture
def fake_mmseqs(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "mmseqs"
    program.write_text(FAKE_MMSEQS)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def random_proteins(count, seed=0, letters="ACDE"):
    rng = np.random.default_rng(seed)
    return {f"p{seed}_{i}": "".join(rng.choice(list(letters), rng.integers(8, 20))) for i in range(count)}


def write_fasta(path, proteins):
    path.write_text("".join(f">{name} words\n{sequence}\n" for name, sequence in proteins.items()))
    return path


def prepare(tmp_path, proteins, *options, out="split"):
    fasta = write_fasta(tmp_path / "proteins.fa", proteins)
    return run(["prepare", "--fasta", str(fasta), "--out", str(tmp_path / out), *map(str, options)])


def sides(folder):
    """Id -> the store that holds it."""
    found = {}
    for store in sorted(folder.iterdir()):
        if store.is_dir():
            opened = TokenStore.open(store)
            for i in range(len(opened)):
                assert opened.id(i) not in found
                found[opened.id(i)] = store.name
    return found


def cluster_table(tmp_path, proteins, width=2):
    first = {}
    lines = [f"{first.setdefault(sequence[:width], name)}\t{name}\n" for name, sequence in proteins.items()]
    path = tmp_path / "cluster.tsv"
    path.write_text("".join(lines))
    return path


FRACTIONS = ("--validation-fraction", 0.2, "--test-fraction", 0.2)


def test_whole_clusters_of_a_table_go_to_one_side(tmp_path):
    proteins = random_proteins(300)
    table = cluster_table(tmp_path, proteins)
    assert prepare(tmp_path, proteins, "--split", "clusters", "--clusters", table, *FRACTIONS) == 0
    found = sides(tmp_path / "split")
    assert len(found) == len(proteins)
    assert set(found.values()) == {"train", "validation", "test"}
    of_cluster = {}
    for name, sequence in proteins.items():
        of_cluster.setdefault(sequence[:2], set()).add(found[name])
    assert {len(chosen) for chosen in of_cluster.values()} == {1}


@pytest.mark.parametrize("method", ["hash", "mmseqs"])
def test_proteins_stay_on_their_side_when_others_are_added(tmp_path, fake_mmseqs, method):
    proteins = random_proteins(200, letters="ACDEFG")
    more = random_proteins(200, seed=1, letters="HIKLMN") | proteins | random_proteins(200, seed=2, letters="ACDEFG")
    options = ("--split", method, "--no-search", *FRACTIONS)
    assert prepare(tmp_path, proteins, *options, out="a") == 0
    assert prepare(tmp_path, more, *options, out="b") == 0
    before, after = sides(tmp_path / "a"), sides(tmp_path / "b")
    assert {name: after[name] for name in before} == before
    assert prepare(tmp_path, proteins, *options, "--split-seed", 1, out="c") == 0
    assert sides(tmp_path / "c") != before


def test_mmseqs_clusters_and_what_its_search_still_finds_is_dropped(tmp_path, fake_mmseqs, capsys):
    proteins = random_proteins(300, letters="ACDEFGHIK")
    assert prepare(tmp_path, proteins, "--split", "mmseqs", "--threads", 2, *FRACTIONS) == 0
    found = sides(tmp_path / "split")
    for part in (slice(0, 3), slice(-3, None)):
        of_part = {}
        for name, side in found.items():
            of_part.setdefault(proteins[name][part], set()).add(side)
        assert {len(chosen) for chosen in of_part.values()} == {1}
    manifest = json.loads((tmp_path / "split" / "split.json").read_text())
    dropped = manifest["dropped"]["similar to another side's"]
    assert 0 < dropped == len(proteins) - len(found)
    assert f"in none of them: {dropped} similar to another side's" in capsys.readouterr().out
    assert manifest["tool"] == "MMseqs2 14-fake"
    assert [command.split()[:2] for command in manifest["commands"]] == [
        ["mmseqs", "easy-linclust"],
        ["mmseqs", "easy-search"],
    ]
    assert str(tmp_path) not in "".join(manifest["commands"])
    assert manifest["proteins"]["train"] == sum(side == "train" for side in found.values())


def test_a_missing_or_failing_mmseqs_is_told_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, request):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert prepare(tmp_path, random_proteins(5), "--split", "mmseqs") == 1
    assert "error: mmseqs is not on the PATH; install MMseqs2 (Debian's package mmseqs2" in capsys.readouterr().err
    request.getfixturevalue("fake_mmseqs")
    assert prepare(tmp_path, {"a": "MKWWWWW"}, "--split", "mmseqs", "-q") == 1
    assert capsys.readouterr().err == "error: mmseqs easy-linclust failed with exit code 1: Error: out of cheese\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "proteins.fa"]


def test_a_table_tells_where_each_protein_went_and_why(tmp_path, fake_mmseqs):
    proteins = random_proteins(200)
    proteins["copy"] = proteins["p0_0"]
    assert prepare(tmp_path, proteins, "--split", "mmseqs", *FRACTIONS) == 0
    header, *rows = [line.split("\t") for line in (tmp_path / "split" / "sides.tsv").read_text().splitlines()]
    assert header == ["id", "side", "reason"]
    assert [row[0] for row in rows] == list(proteins)
    found = sides(tmp_path / "split")
    assert {name: side for name, side, _ in rows if side != "dropped"} == found
    counts = Counter(reason for _, side, reason in rows if side == "dropped")
    dropped = json.loads((tmp_path / "split" / "split.json").read_text())["dropped"]
    assert counts == {reason: count for reason, count in dropped.items() if count}
    assert counts["similar to another side's"] > 0


def test_a_split_that_is_interrupted_does_not_read_the_proteins_again(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    proteins = random_proteins(50)
    with monkeypatch.context() as patched:
        patched.setattr(split_stores, "_divide", interrupted)
        assert prepare(tmp_path, proteins, "--split", "hash", "-q") == 130
    message = f"error: interrupted; the same command goes on with the proteins read so far, else delete {tmp_path}"
    assert capsys.readouterr().err == f"{message}/.split.splitting\n"
    assert prepare(tmp_path, proteins, "--split", "hash") == 0
    assert "the proteins were read already" in capsys.readouterr().err
    assert sides(tmp_path / "split").keys() == proteins.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["proteins.fa", "split"]


def test_held_out_families_are_whole_in_ood_and_nowhere_else(tmp_path):
    proteins = random_proteins(300)
    proteins["copy"] = proteins["p0_0"]
    table = cluster_table(tmp_path, proteins, width=3)
    families = {name: f"PF0000{sequence[3]}" for name, sequence in proteins.items() if name != "copy"}
    of_two = next(name for name, family in families.items() if family == "PF0000A")
    annotations = tmp_path / "families.tsv"
    lines = [f"{name}\tx\t{family}\n" for name, family in families.items()]
    annotations.write_text("#acc\tx\tpfam\n" + "".join(lines) + f"{of_two}\tx\tPF0000C;PF0000D.3;\nother\tx\tPF0000E\n")
    held_out = families["p0_0"]
    options = ("--families", annotations, "--family-column", "pfam", "--hold-out-families", f"{held_out}")
    assert prepare(tmp_path, proteins, "--split", "clusters", "--clusters", table, *options, *FRACTIONS) == 0
    found = sides(tmp_path / "split")
    members = {name for name, family in families.items() if family == held_out}
    if held_out in ("PF0000C", "PF0000D"):
        members.add(of_two)
    assert {name for name, side in found.items() if side == "ood"} == members
    assert "copy" not in found
    touched = {proteins[name][:3] for name in members}
    assert not {proteins[name][:3] for name in found if found[name] != "ood"} & touched
    facts = json.loads((tmp_path / "split" / "split.json").read_text())["families"]
    assert (facts["held_out"], facts["members"], facts["lines_without_a_protein"]) == ([held_out], len(members), 1)
    assert facts["proteins_without_a_family"] == 1


def test_families_are_matched_by_accession_and_chosen_by_a_key(tmp_path):
    ids = ["sp|P12345|A_B", "tr|A0A0A0MT36|C_D", "P12345-2", "UniRef50_Q11111", "gene.1"]
    build_token_store([write_fasta(tmp_path / "a.fa", dict.fromkeys(ids, "MKV"))], tmp_path / "store")
    table = tmp_path / "families.tsv"
    table.write_text("P12345.3\tPF00001.7;PF00002\nA0A0A0MT36\tPF00002\nQ11111\tPF00003\ngene.2\tPF00004\n")
    store = TokenStore.open(tmp_path / "store")
    families = read_families(table, store)
    assert families.names == ["PF00001", "PF00002", "PF00003"]
    assert families.sizes().tolist() == [2, 3, 1]
    assert families.are_members(["PF00001", "PF00003"], len(store)).tolist() == [True, False, True, True, False]
    assert (families.num_annotated, families.num_unmatched) == (4, 1)


def test_a_number_of_families_is_chosen_by_a_key(tmp_path):
    proteins = random_proteins(400, letters="ACDEFGHIKL")
    table = tmp_path / "families.tsv"
    table.write_text("".join(f"{name}\tCOG{sequence[0]}\n" for name, sequence in proteins.items()))
    options = ("--split", "hash", "--families", table, "--hold-out-families")
    assert prepare(tmp_path, proteins, *options, 3) == 0
    held_out = json.loads((tmp_path / "split" / "split.json").read_text())["families"]["held_out"]
    assert len(held_out) == 3
    found = sides(tmp_path / "split")
    for name, sequence in proteins.items():
        assert (found.get(name) == "ood") == (f"COG{sequence[0]}" in held_out)
    fewer = {name: sequence for name, sequence in proteins.items() if f"COG{sequence[0]}" not in held_out[:1]}
    assert prepare(tmp_path, fewer, *options, 2, out="fewer") == 0
    assert json.loads((tmp_path / "fewer" / "split.json").read_text())["families"]["held_out"] == held_out[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hold-out-families", "PF1"], "'PF1': no protein has this family in"),
        (
            ["--hold-out-families", "20"],
            "20: a number chooses among families of at least 10 proteins, of which there are 1 here (",
        ),
        (["--hold-out-families", "0"], "knows 13 of the 20 proteins, number of families 2); give 1 to 1, or names"),
        (["--hold-out-families", "PF2", "--family-column", "5"], "line 1: expected a family in column 5, found 2"),
        (
            ["--hold-out-families", "PF2", "--family-column", "pfam"],
            "line 1: no column 'pfam'; there are 'p0_0', 'PF2'",
        ),
        (["--hold-out-families", ","], "names no family"),
    ],
)
def test_a_mistake_about_families_is_told_in_one_line(tmp_path, capsys, options, message):
    table = tmp_path / "families.tsv"
    table.write_text("".join(f"p0_{i}\tPF2\n" for i in range(12)) + "p0_12\tPF3\n")
    assert prepare(tmp_path, random_proteins(20), "--split", "hash", "--families", table, "-q", *options) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "split").exists()


def test_the_only_large_family_can_be_held_out_by_number_and_small_ones_only_by_name(tmp_path, capsys):
    table = tmp_path / "families.tsv"
    options = ("--split", "hash", "--families", table, "--hold-out-families")
    table.write_text("".join(f"p0_{i}\tPF2\n" for i in range(12)))
    assert prepare(tmp_path, random_proteins(40), *options, 1) == 0
    assert json.loads((tmp_path / "split" / "split.json").read_text())["families"]["held_out"] == ["PF2"]
    table.write_text("p0_1\tPF2\n")
    capsys.readouterr()
    assert prepare(tmp_path, random_proteins(40), *options, 1, "-q", out="none") == 1
    assert "there are 0 here" in (told := capsys.readouterr().err)
    assert "knows 1 of the 40 proteins, number of families 1); give names instead" in told


@pytest.mark.parametrize(
    "options",
    [
        ["--clusters", "x"],
        ["--split", "clusters"],
        ["--split", "hash", "--clusters", "x"],
        ["--split", "hash", "--families", "x"],
        ["--split", "hash", "--unlisted", "drop"],
        ["--split", "hash", "--coverage", "0.5"],
        ["--split", "hash", "--threads", "2"],
        ["--split", "hash", "--test-fraction", "0.99"],
    ],
)
def test_options_that_contradict_each_other_are_a_usage_error(tmp_path, options):
    assert prepare(tmp_path, random_proteins(5), *options) == 2


def test_an_empty_training_side_is_refused(tmp_path, capsys):
    table = tmp_path / "families.tsv"
    table.write_text("".join(f"p0_{i}\tPF2\n" for i in range(5)))
    options = ("--families", table, "--hold-out-families", "PF2")
    assert prepare(tmp_path, random_proteins(5), "--split", "hash", *options, "-q") == 1
    assert "no proteins are left to train on" in capsys.readouterr().err
    assert not (tmp_path / "split").exists()


SIDES = st.lists(st.sampled_from([-1, 0, 1, 2, 3]), min_size=1, max_size=30)


@given(SIDES, st.data())
def test_dropping_leaves_no_relatives_on_two_sides_and_all_of_ood(before, data):
    index = st.integers(0, len(before) - 1)
    pairs = np.array(data.draw(st.lists(st.tuples(index, index), max_size=60)), dtype=np.int64).reshape(-1, 2)
    sides = np.array(before, dtype=np.int8)
    dropped = drop_relatives(sides, pairs[:, 0], pairs[:, 1])
    assert sides[~dropped].tolist() == np.array(before)[~dropped].tolist()
    assert (sides[dropped] == Side.DROPPED).all()
    alive = [(a, b) for a, b in pairs if sides[a] >= 0 and sides[b] >= 0]
    assert all(sides[a] == sides[b] for a, b in alive)
    assert not dropped[np.array(before) == Side.OOD].any()
    for i in np.flatnonzero(dropped):  # each for a reason: a relative on an earlier side that stayed
        partners = {int(b if a == i else a) for a, b in pairs if i in (a, b)} - {int(i)}
        assert any(sides[j] >= 0 and PRECEDENCE.index(sides[j]) < PRECEDENCE.index(before[i]) for j in partners)


@given(SIDES, st.data())
def test_no_sequence_is_left_on_two_sides(before, data):
    sequences = data.draw(st.lists(st.integers(0, 5), min_size=len(before), max_size=len(before)))
    sides = np.array(before, dtype=np.int8)
    drop_copies(sides, np.array(sequences, dtype=np.uint64))
    for sequence in set(sequences):
        own = {side for side, other in zip(sides.tolist(), sequences, strict=True) if other == sequence and side >= 0}
        assert len(own) <= 1
        had = {side for side, other in zip(before, sequences, strict=True) if other == sequence and side >= 0}
        assert bool(own) == bool(had)


def test_shares_are_met_and_differ_by_seed():
    keys = hash_names(str(i).encode() for i in range(100_000))
    counts = np.bincount(sides_by_share(keys, seed=0, validation_fraction=0.02, test_fraction=0.1))
    expected = np.array([0.88, 0.02, 0.1]) * 100_000
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()
    again = sides_by_share(keys[::2], seed=0, validation_fraction=0.02, test_fraction=0.1)
    assert (again == sides_by_share(keys, seed=0, validation_fraction=0.02, test_fraction=0.1)[::2]).all()
    assert (again != sides_by_share(keys[::2], seed=1, validation_fraction=0.02, test_fraction=0.1)).any()


def test_a_split_is_described(tmp_path, capsys):
    assert prepare(tmp_path, random_proteins(50), "--split", "hash", *FRACTIONS) == 0
    assert "homologs" in capsys.readouterr().err
    assert run(["describe", str(tmp_path / "split"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["method"], facts["seed"]) == ("split", "hash", 0)
    assert facts["proteins_train"] == len(TokenStore.open(tmp_path / "split" / "train"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
def test_mmseqs2_itself_keeps_relatives_together(tmp_path):
    rng = np.random.default_rng(0)
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    proteins = {}
    for family in range(20):
        ancestor = rng.choice(letters, 150)
        for member in range(5):
            changed = rng.random(150) < 0.2
            proteins[f"f{family}_{member}"] = "".join(np.where(changed, rng.choice(letters, 150), ancestor))
    assert prepare(tmp_path, proteins, "--split", "mmseqs", "--clustering", "cluster", *FRACTIONS) == 0
    found = sides(tmp_path / "split")
    of_family = {}
    for name, side in found.items():
        of_family.setdefault(name.split("_")[0], set()).add(side)
    assert {len(chosen) for chosen in of_family.values()} == {1}
    assert len(found) > 90
