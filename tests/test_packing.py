"""Rows hold every protein, in an order that is a permutation and can be taken up anywhere."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protformer.alphabet import EOS, PAD
from protformer.corpus.packing import SamplerPosition, best_fit_decreasing, build_packing, endless_rows
from protformer.corpus.permutation import permute
from protformer.corpus.token_store import TokenStore, build_token_store


def make_store(folder, lengths, seed=0):
    rng = np.random.default_rng(seed)
    fasta = folder / "proteins.fa"
    with fasta.open("w") as file:
        for number, length in enumerate(lengths):
            sequence = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length))
            file.write(f">p{number}\n{sequence}\n")
    build_token_store([fasta], folder / "store")
    return TokenStore.open(folder / "store")


@given(n=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_the_order_of_an_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(permute(i, n, seed=seed, epoch=epoch) for i in range(n)) == list(range(n))


@given(n=st.integers(1, 2**62), data=st.data())
def test_the_permutation_stays_in_range_at_any_size(n, data):
    index = data.draw(st.integers(0, n - 1))
    assert 0 <= permute(index, n, seed=3, epoch=1) < n


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(permute(i, 100, seed=seed, epoch=epoch) for i in range(100)) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25
    # A shuffled order has one fixed point on average, Poisson distributed: 25 of them have 75 with odds below 1e-14.
    fixed = sum(order[i] == i for order in orders for i in range(100))
    assert fixed < 75


@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_places_every_piece_once_and_overfills_no_row(lengths):
    rows = best_fit_decreasing(lengths, 50)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert all(sum(lengths[piece] for piece in row) <= 50 for row in rows)
    # Johnson 1973: at most 11/9 of the optimum + 4, and the optimum is at least the total over the capacity.
    if lengths:
        halves = sum(length > 25 for length in lengths)
        assert len(rows) <= max(2 * sum(lengths) / 50 + 1, halves)


def test_windows_of_an_epoch_are_the_whole_chain_once(tmp_path):
    store = make_store(tmp_path, [5, 90, 300, 17, 64])
    packing = build_packing("attend", store, max_residues=64, seed=1)
    rows = [row for unit in range(packing.num_units) for row in packing.rows(unit, epoch=3)]
    # Every token of the store is in exactly one window; only the last window of the chain is padded.
    kept = sorted(row.tokens[row.segments > 0].tobytes() for row in rows)
    windows = [store.tokens[start : start + 64].tobytes() for start in range(0, store.num_tokens, 64)]
    assert kept == sorted(windows)
    assert sum((row.segments == 0).any() for row in rows) <= 1
    assert all(set(row.segments) <= {0, 1} for row in rows)


def test_isolated_rows_hold_each_protein_whole_with_its_eos(tmp_path):
    lengths = [5, 90, 30, 17, 63, 64, 1]
    store = make_store(tmp_path, lengths)
    packing = build_packing("isolate", store, max_residues=65, seed=1)
    pieces = []
    for row in packing.rows(0, epoch=0):
        assert (row.tokens[row.segments == 0] == PAD).all()
        pieces += [row.tokens[row.segments == s] for s in range(1, row.segments.max() + 1)]
    assert sorted(len(piece) for piece in pieces) == sorted(min(length + 1, 65) for length in lengths)
    whole = {store.protein(i).tobytes() + bytes([EOS]) for i, length in enumerate(lengths) if length < 65}
    assert whole <= {piece.tobytes() for piece in pieces}


def test_a_protein_longer_than_a_row_gives_another_crop_each_epoch(tmp_path):
    store = make_store(tmp_path, [500])
    packing = build_packing("isolate", store, max_residues=50, seed=1)
    crops = {packing.rows(0, epoch=epoch)[0].tokens.tobytes() for epoch in range(10)}
    assert len(crops) > 5
    assert all(crop in store.tokens.tobytes() for crop in crops)


@pytest.mark.parametrize("kind", ["attend", "isolate"])
def test_a_stream_taken_up_at_any_position_goes_on_with_the_very_next_row(tmp_path, kind):
    store = make_store(tmp_path, [40, 10, 200, 33, 70, 8, 90, 120])
    packing = build_packing(kind, store, max_residues=64, seed=5)
    stream = list(islice(endless_rows(packing, SamplerPosition()), 40))
    for cut in (1, 2, 7, 19, 33):
        again = list(islice(endless_rows(packing, stream[cut - 1][2]), 40 - cut))
        for (row, generator, after), (row2, generator2, after2) in zip(stream[cut:], again, strict=True):
            assert np.array_equal(row.tokens, row2.tokens)
            assert after == after2
            assert generator.bit_generator.seed_seq.entropy == generator2.bit_generator.seed_seq.entropy


def test_ranks_share_an_epoch_without_overlap(tmp_path):
    store = make_store(tmp_path, [100] * 20)
    packing = build_packing("attend", store, max_residues=32, seed=5)
    per_rank = packing.num_units // 3
    seen = [
        row.tokens.tobytes()
        for rank in range(3)
        for row, _, _ in islice(endless_rows(packing, SamplerPosition(), rank=rank, num_ranks=3), per_rank)
    ]
    assert len(set(seen)) == len(seen) == 3 * per_rank


def test_more_ranks_than_windows_still_gives_every_rank_rows(tmp_path):
    store = make_store(tmp_path, [10])
    packing = build_packing("attend", store, max_residues=32, seed=5)
    for rank in range(4):
        rows = list(islice(endless_rows(packing, SamplerPosition(), rank=rank, num_ranks=4), 3))
        assert all(np.array_equal(row.tokens[:11], store.tokens) for row, _, _ in rows)
