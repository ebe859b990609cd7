"""What is drawn: weighted stores, clusters, pairs."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from small_stores import make_store

from protformer.alphabet import EOS
from protformer.config import DataConfig
from protformer.corpus.cluster_members import ClusterMembers, build_cluster_members
from protformer.corpus.interacting_pairs import InteractingPairs, build_interacting_pairs
from protformer.corpus.packing import build_packing, share_room
from protformer.corpus.random_reads import ArrayFile, BytesFile
from protformer.corpus.row_stream import SamplerPosition, row_plans
from protformer.corpus.sampling import ClusterDraws, Corpus, StoreDraws
from protformer.errors import InputError


def clusters_of(store, folder, text):
    table = folder / "clusters.tsv"
    table.write_text(text)
    report = build_cluster_members(store, table, folder)
    return ClusterMembers(folder), report


def pairs_of(store, folder, text, held_out=None, max_residues=64):
    table = folder / "pairs.tsv"
    table.write_text(text)
    report = build_interacting_pairs(store, held_out, table, folder / "pairs.npy", max_residues=max_residues)
    return InteractingPairs(folder / "pairs.npy"), report


def protein_numbers(store, starts):
    return np.searchsorted(store.offsets, starts).tolist()


@pytest.mark.parametrize("packing", ["attend", "isolate"])
def test_weights_are_shares_of_tokens_whatever_the_length_of_proteins(tmp_path, packing):
    short, long = make_store(tmp_path / "short", [10] * 300), make_store(tmp_path / "long", [40] * 30)
    config = DataConfig(packing=packing, max_residues=64, source_weights=[1.0, 3.0])
    rows = build_packing(Corpus(stores=(short, long)), config, seed=1)
    tokens = Counter()
    for plan in islice(row_plans(rows, SamplerPosition()), 2000):
        for group in plan.groups:
            for store, start, end in group:
                tokens[store] += end - start
    assert tokens[1] / (tokens[0] + tokens[1]) == pytest.approx(0.75, abs=0.02)


def test_several_stores_without_weights_are_one_corpus(tmp_path):
    stores = make_store(tmp_path / "a", [10] * 7), make_store(tmp_path / "b", [20] * 5)
    draws = StoreDraws(stores, seed=1).draw(np.arange(12))
    drawn = sorted(zip(draws.store.tolist(), draws.start.tolist(), strict=True))
    assert drawn == [(0, 11 * i) for i in range(7)] + [(1, 21 * i) for i in range(5)]


def test_each_cluster_gives_one_member_an_epoch_and_each_member_has_its_turn(tmp_path):
    store = make_store(tmp_path, [3, 4, 5, 6, 7, 8], names=list("abcdef"))
    clusters, report = clusters_of(store, tmp_path, "a\ta\na\tb\na\tc\nd\te\nd\td\nd\tx\n")
    assert (report.num_clusters, report.num_unlisted, report.num_absent) == (3, 1, 1)
    draws = ClusterDraws(store, clusters, seed=4)
    assert draws.draws_per_epoch == 3
    family = {0: "abc", 1: "abc", 2: "abc", 3: "de", 4: "de", 5: "f"}
    seen = []
    for epoch in range(6):
        proteins = protein_numbers(store, draws.draw(np.arange(3) + 3 * epoch).start)
        assert sorted(family[protein] for protein in proteins) == ["abc", "de", "f"]
        seen += proteins
    # In six epochs each of three members comes twice, each of two three times.
    assert Counter(seen) == {0: 2, 1: 2, 2: 2, 3: 3, 4: 3, 5: 6}


def test_windows_of_sampled_proteins_chain_whole_proteins(tmp_path):
    lengths = list(np.random.default_rng(0).integers(5, 90, 200))
    store = make_store(tmp_path, lengths)
    clusters, _ = clusters_of(store, tmp_path, "".join(f"p{i // 4}\tp{i}\n" for i in range(200)))
    config = DataConfig(packing="attend", max_residues=64)
    packing = build_packing(Corpus(stores=(store,), clusters=clusters), config, seed=1)
    rows = list(packing.assemble(packing.plan(np.arange(packing.units_per_epoch))))
    assert sum(int((row.tokens[row.segments > 0] == EOS).sum()) for row in rows) == 50
    filled = sum(int((row.segments > 0).sum()) for row in rows) / (64 * len(rows))
    assert filled > 0.95
    plans = packing.plan(np.arange(packing.units_per_epoch))
    tokens = Counter(
        place for plan in plans for (group,) in [plan.groups] for _, a, b in group for place in range(a, b)
    )
    assert set(tokens.values()) == {1}
    counts = {
        protein
        for protein in range(200)
        if all(tokens[place] for place in range(store.offsets[protein], store.offsets[protein + 1]))
    }
    assert len(counts) == 50
    assert len({protein // 4 for protein in counts}) == 50


@pytest.mark.parametrize("packing", ["attend", "isolate"])
def test_pairs_stand_in_one_row_in_both_orders_each_protein_closed_by_eos(tmp_path, packing):
    store = make_store(tmp_path, [10, 20, 15, 12], names=list("abcd"))
    pairs, report = pairs_of(store, tmp_path, "a\tb\t1\nc\td\na\td\t0\n")
    assert (report.num_pairs, report.num_negative, report.num_held_out, report.num_long) == (2, 1, 0, 0)
    config = DataConfig(packing=packing, max_residues=64)
    rows = build_packing(Corpus(stores=(store,), pairs=pairs), config, seed=1)
    expected = sorted(
        b"".join(store.protein(i).tobytes() + bytes([EOS]) for i in order) for order in ([0, 1], [1, 0], [2, 3], [3, 2])
    )
    for epoch in range(3):
        (*plans,) = rows.plan(np.array([epoch]))
        packed = list(rows.assemble(plans))
        if packing == "isolate":
            groups = [row.tokens[row.segments == s] for row in packed for s in range(1, row.segments.max() + 1)]
            assert sorted(group.tobytes() for group in groups) == expected
        else:
            assert all(set(row.segments.tolist()) <= {0, 1} for row in packed)
            assert sorted(len(row.tokens[row.segments > 0]) for row in packed) == sorted(
                sum(end - start for start, end in [(s[1], s[2]) for s in plan.groups[0]]) for plan in plans
            )
            text = b"".join(row.tokens[row.segments > 0].tobytes() for row in packed)
            assert all(pair in text for pair in expected)


def test_a_pair_longer_than_a_row_is_cropped_with_both_ends_marked_or_left_out(tmp_path):
    store = make_store(tmp_path, [100, 20, 10], names=list("abc"))
    pairs, report = pairs_of(store, tmp_path, "a\tb\nb\tc\n")
    assert report.num_long == 1
    assert "cropped to fit" in report.summary(64, True)
    crops = set()
    for epoch in range(10):
        config = DataConfig(packing="isolate", max_residues=64, on_long="crop")
        rows = build_packing(Corpus(stores=(store,), pairs=pairs), config, seed=1)
        for row in rows.assemble(rows.plan(np.array([epoch]))):
            for segment in range(1, row.segments.max() + 1):
                tokens = row.tokens[row.segments == segment].tobytes()
                assert tokens.count(EOS) == 2
                assert tokens[-1] == EOS
                if len(tokens) == 64:
                    first, second, _ = tokens.split(bytes([EOS]))
                    assert {len(first), len(second)} == {42, 20}
                    crop = first if len(first) == 42 else second
                    assert crop in store.protein(0).tobytes()
                    crops.add(crop)
    assert len(crops) > 10
    config = DataConfig(packing="isolate", max_residues=64, on_long="skip")
    rows = build_packing(Corpus(stores=(store,), pairs=pairs), config, seed=1)
    (row,) = rows.assemble(rows.plan(np.array([0])))
    assert (row.segments > 0).sum() == 2 * (21 + 11)


def test_the_longer_protein_of_a_pair_gives_room_first():
    lengths = np.array([[10, 20], [100, 20], [20, 100], [100, 100], [60, 33]])
    assert share_room(lengths, 64).tolist() == [[10, 20], [44, 20], [20, 44], [32, 32], [32, 32]]


def test_pairs_with_a_held_out_protein_are_left_out_and_unknown_or_shared_ids_are_errors(tmp_path):
    store = make_store(tmp_path / "train", [10, 20, 15], names=["a", "b", "b"])
    held_out = make_store(tmp_path / "held_out", [10], names=["h"])
    _, report = pairs_of(store, tmp_path, "a\ta\na\th\n", held_out)
    assert (report.num_pairs, report.num_held_out) == (1, 1)
    with pytest.raises(InputError, match=r"pairs.tsv: line 2: no protein 'h' in the FASTA"):
        pairs_of(store, tmp_path, "a\ta\na\th\n")
    with pytest.raises(InputError, match="'b' is the id of 2 proteins in the FASTA"):
        pairs_of(store, tmp_path, "a\tb\n", held_out)
    with pytest.raises(InputError, match="no pair is left to train on"):
        pairs_of(store, tmp_path, "a\th\na\ta\t0\n", held_out)


def test_a_file_that_was_cut_short_is_told(tmp_path):
    path = tmp_path / "tokens.bin"
    path.write_bytes(bytes(100))
    file = BytesFile(path)
    file.read_into(memoryview(bytearray(100)), 0)
    with pytest.raises(InputError, match="is shorter than it was"):
        file.read_into(memoryview(bytearray(100)), 1)
    np.save(tmp_path / "array.npy", np.arange(5))
    assert ArrayFile(tmp_path / "array.npy").rows(np.array([3, 0]), 2).tolist() == [[3, 4], [0, 1]]
    with pytest.raises(InputError, match="is shorter than it was"):
        ArrayFile(tmp_path / "array.npy").rows(np.array([4]), 2)
