"""Cluster tables: every protein of a store gets its cluster, or the user is told which have none."""

import gzip

import numpy as np
import pytest

from protformer.corpus.clusters import read_clusters
from protformer.corpus.identifiers import accession, hash_ids, hash_names, short_name, stored_ids
from protformer.corpus.token_store import TokenStore, build_token_store
from protformer.errors import InputError


def make_store(folder, ids):
    fasta = folder / "proteins.fa"
    fasta.write_text("".join(f">{name} words\nMKV\n" for name in ids), encoding="utf-8")
    build_token_store([fasta], folder / "store")
    return TokenStore.open(folder / "store")


def write_table(folder, text, compress=bytes):
    path = folder / "cluster.tsv"
    path.write_bytes(compress(text.encode()))
    return path


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_clusters_are_numbered_in_the_order_of_the_store(tmp_path, compress, line_end):
    store = make_store(tmp_path, ["c", "a", "b", "d"])
    lines = ["a\ta", "a\tb", "elsewhere\td", "", "elsewhere\tnot_here", "c\tc"]
    clusters = read_clusters(write_table(tmp_path, line_end.join(lines), compress), store)
    assert clusters.of_protein.tolist() == [0, 1, 1, 2]
    assert (clusters.num_unlisted, clusters.num_absent) == (0, 1)
    assert clusters.keys.tolist() == hash_names([b"c", b"a", b"elsewhere"]).tolist()


def test_ids_are_found_by_the_name_that_mmseqs2_writes(tmp_path):
    store = make_store(tmp_path, ["sp|P12345|NAME_HUMAN", "gi|290|emb|CBH40238.1|", "a|b", "sp|Q11111|X"])
    table = write_table(tmp_path, "P12345\tP12345\nP12345\tCBH40238.1\na|b\ta|b\na|b\tsp|Q11111|X\n")
    assert read_clusters(table, store).of_protein.tolist() == [0, 0, 1, 1]


def test_an_id_as_it_stands_comes_before_its_short_name(tmp_path):
    store = make_store(tmp_path, ["sp|P35956|POL_VILVK", "P35956"])
    table = write_table(tmp_path, "a\tP35956\nb\tsp|P35956|POL_VILVK\n")
    assert read_clusters(table, store).of_protein.tolist() == [0, 1]
    assert read_clusters(table, store).keys.tolist() == hash_names([b"b", b"a"]).tolist()


def test_proteins_with_one_id_share_its_cluster(tmp_path):
    store = make_store(tmp_path, ["a", "b", "a"])
    assert read_clusters(write_table(tmp_path, "b\tb\na\ta\n"), store).of_protein.tolist() == [0, 1, 0]


def test_unlisted_proteins_are_named_and_counted_or_handled_as_asked(tmp_path):
    store = make_store(tmp_path, ["a", "b", "c", "d", "e"])
    table = write_table(tmp_path, "a\ta\n")
    with pytest.raises(InputError, match=r"cluster.tsv: does not list 4 of 5 proteins \('b', 'c', 'd', \.\.\.\)"):
        read_clusters(table, store)
    dropped = read_clusters(table, store, unlisted="drop")
    assert (dropped.of_protein.tolist(), dropped.num_unlisted) == ([0, -1, -1, -1, -1], 4)
    assert len(dropped.keys) == 1
    assert read_clusters(table, store, unlisted="single").of_protein.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ta\na b\n", r"line 2: expected 2 columns separated by a tab \(representative, member\), found 1"),
        ("a\ta\tb\n", "line 1: expected 2 columns .* found 3"),
        ("a\t\n", "line 1: .* found an empty one"),
        ("a\ta\na\tb\nb\tb\n", "line 2: 'b' is in two clusters"),
        ("x\ty\n", "lists none of the 2 proteins; its first member is 'y', the first protein is 'a'"),
        ("", "empty file"),
        ("\n", "empty file: no clusters in it"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(tmp_path, text, message):
    store = make_store(tmp_path, ["a", "b"])
    with pytest.raises(InputError, match=message):
        read_clusters(write_table(tmp_path, text), store)


def test_a_contradiction_far_down_the_file_is_found(tmp_path):
    store = make_store(tmp_path, [f"p{i}" for i in range(200)])
    padding = "".join(f"x\tx{i:09}\n" for i in range(150_000))  # more than a block
    text = "".join(f"p0\tp{i}\n" for i in range(200))
    with pytest.raises(InputError, match=r"line 150202: 'p7' is in two clusters"):
        read_clusters(write_table(tmp_path, text + padding + "\np1\tp7\n"), store)


def test_stored_ids_come_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("protformer.corpus.identifiers._IDS_AT_ONCE", 3)
    ids = ["a", "bé", "ccc", "d", "ee", "f", "g"]
    store = make_store(tmp_path, ids)
    assert [name.decode() for many in stored_ids(store) for name in many] == ids
    assert np.array_equal(hash_ids(store, short_name), hash_names([name.encode() for name in ids]))


@pytest.mark.parametrize(
    ("identifier", "short", "plain"),
    [
        # The names in the second column are those that MMseqs2 14 wrote into a cluster table.
        ("sp|P12345|N_X", "P12345", "P12345"),
        ("gi|290|emb|CBH40238.1|", "CBH40238.1", "CBH40238"),
        ("UniRef50_Q9ABC1", "UniRef50_Q9ABC1", "Q9ABC1"),
        ("ref|WP_031490994.1|", "WP_031490994.1", "WP_031490994"),
        ("lcl|abc|d", "abc", "abc"),
        ("a|b|c", "a|b|c", "a|b|c"),
        ("gnl|CDD|123", "123", "123"),
        ("pir||S12", "S12", "S12"),
        ("P12345-2", "P12345-2", "P12345"),
        ("A0A0A0MT36.3", "A0A0A0MT36.3", "A0A0A0MT36"),
        ("Tb927.2.5720", "Tb927.2.5720", "Tb927.2.5720"),
        ("UniRef100_UPI0001", "UniRef100_UPI0001", "UniRef100_UPI0001"),
        ("sp|", "sp|", "sp|"),
    ],
)
def test_names_of_other_programs_are_found_in_ids(identifier, short, plain):
    assert short_name(identifier.encode()).decode() == short
    assert accession(identifier.encode()).decode() == plain
