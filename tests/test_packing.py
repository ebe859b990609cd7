"""Rows hold every protein, in an order that is a permutation and can be taken up anywhere."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import make_store

from protformer.alphabet import EOS, PAD
from protformer.config import DataConfig
from protformer.corpus.packing import POOL_SIZE, best_fit_decreasing, build_packing
from protformer.corpus.row_stream import SamplerPosition, position_behind, row_generator, row_plans
from protformer.corpus.sampling import Corpus

LENGTHS = [40, 10, 200, 33, 70, 8, 90, 120]
LAYOUTS = [
    {"packing": "attend"},
    {"packing": "isolate"},
    {"packing": "isolate", "on_long": "windows"},
    {"packing": "isolate", "on_long": "skip"},
]


def pack(*stores, seed=5, **fields):
    return build_packing(Corpus(stores=stores), DataConfig(**({"max_residues": 64} | fields)), seed=seed)


def rows_of(packing, units):
    return list(packing.assemble(packing.plan(np.array(units))))


def epoch_of(packing, epoch):
    return rows_of(packing, range(epoch * packing.units_per_epoch, (epoch + 1) * packing.units_per_epoch))


def pieces_of(rows):
    return [row.tokens[row.segments == s] for row in rows for s in range(1, row.segments.max() + 1)]


def residues(rows):
    """The tokens of rows in any order, padding left out."""
    return np.sort(np.concatenate([row.tokens[row.segments > 0] for row in rows]))


def coordinates(packing, epoch):
    """Where in their stores the tokens of an epoch lie."""
    units = np.arange(epoch * packing.units_per_epoch, (epoch + 1) * packing.units_per_epoch)
    return sorted(
        (store, place)
        for plan in packing.plan(units)
        for group in plan.groups
        for store, start, end in group
        for place in range(start, end)
    )


@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_places_every_piece_once_and_overfills_no_row(lengths):
    rows = best_fit_decreasing(lengths, 50)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert all(sum(lengths[piece] for piece in row) <= 50 for row in rows)
    # Johnson 1973: at most 11/9 of the optimum + 4, and the optimum is at least the total over the capacity.
    if lengths:
        halves = sum(length > 25 for length in lengths)
        assert len(rows) <= max(2 * sum(lengths) / 50 + 1, halves)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=30),
    max_residues=st.integers(8, 200),
    layout=st.sampled_from([{"packing": "attend"}, {"packing": "isolate", "on_long": "windows"}]),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 10**6),
)
def test_every_token_is_packed_exactly_once_in_every_epoch(
    tmp_path_factory, lengths, max_residues, layout, seed, epoch
):
    store = make_store(tmp_path_factory.mktemp("store"), lengths)
    packing = pack(store, seed=seed, max_residues=max_residues, **layout)
    assert coordinates(packing, epoch) == [(0, place) for place in range(store.num_tokens)]


def test_rows_hold_the_tokens_of_their_plans(tmp_path):
    store = make_store(tmp_path, LENGTHS)
    for layout in LAYOUTS[:1] + LAYOUTS[2:3]:
        rows = epoch_of(pack(store, **layout), 3)
        assert np.array_equal(residues(rows), np.sort(store.tokens))
        assert all((row.tokens[row.segments == 0] == PAD).all() for row in rows)
        assert all((row.tokens[row.segments > 0] != PAD).all() for row in rows)


def test_windows_are_cut_from_the_chain_of_proteins_at_other_places_in_each_epoch(tmp_path):
    store = make_store(tmp_path, [5, 90, 300, 17, 64])
    packing = pack(store, packing="attend")
    ring = store.tokens.tobytes() * 2
    firsts = set()
    for epoch in range(20):
        rows = epoch_of(packing, epoch)
        assert all(row.tokens[row.segments > 0].tobytes() in ring for row in rows)
        assert sum((row.segments == 0).any() for row in rows) <= 1
        assert all(set(row.segments.tolist()) <= {0, 1} for row in rows)
        firsts |= {row.tokens.tobytes() for row in rows}
    assert len(firsts) > 10 * packing.units_per_epoch


def test_isolated_rows_hold_each_protein_whole_with_its_eos(tmp_path):
    lengths = [5, 90, 30, 17, 63, 64, 1]
    store = make_store(tmp_path, lengths)
    pieces = pieces_of(epoch_of(pack(store, packing="isolate", max_residues=65), 0))
    assert sorted(len(piece) for piece in pieces) == sorted(min(length + 1, 65) for length in lengths)
    whole = {store.protein(i).tobytes() + bytes([EOS]) for i, length in enumerate(lengths) if length < 65}
    assert whole <= {piece.tobytes() for piece in pieces}


def test_a_protein_longer_than_a_row_gives_another_crop_each_epoch(tmp_path):
    store = make_store(tmp_path, [500])
    packing = pack(store, packing="isolate", max_residues=50)
    crops = {epoch_of(packing, epoch)[0].tokens.tobytes() for epoch in range(10)}
    assert len(crops) > 5
    assert all(crop in store.tokens.tobytes() for crop in crops)


def test_a_protein_longer_than_a_row_is_cut_into_windows_or_left_out_on_request(tmp_path):
    store = make_store(tmp_path, [130, 20])
    windows = pieces_of(epoch_of(pack(store, packing="isolate", on_long="windows"), 0))
    assert sum(len(piece) for piece in windows) == 131 + 21
    assert len(windows) == 4
    (kept,) = pieces_of(epoch_of(pack(store, packing="isolate", on_long="skip"), 0))
    assert kept.tobytes() == store.protein(1).tobytes() + bytes([EOS])


def test_rows_of_a_pool_do_not_come_by_length(tmp_path):
    store = make_store(tmp_path, list(range(1, 61)) * 4)
    longest = [max(len(piece) for piece in pieces_of([row])) for row in epoch_of(pack(store, packing="isolate"), 0)]
    assert longest != sorted(longest, reverse=True)
    first = sum(longest[: len(longest) // 2]) / sum(longest)
    assert 0.4 < first < 0.6


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20)
@given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=3), rank=st.integers(0, 2), num_ranks=st.integers(3, 4))
def test_a_stream_taken_up_at_any_position_goes_on_with_the_very_next_row(
    tmp_path_factory, layout, cuts, rank, num_ranks
):
    store = make_store(tmp_path_factory.mktemp("store"), LENGTHS)
    packing = pack(store, **layout)
    stream = list(islice(row_plans(packing, SamplerPosition(), rank=rank, num_ranks=num_ranks), 61))
    position = SamplerPosition()
    done = 0
    for cut in sorted(cuts):
        part = list(islice(row_plans(packing, position, rank=rank, num_ranks=num_ranks), cut - done))
        assert part == stream[done:cut]
        position, done = position_behind(stream[cut - 1], num_ranks=num_ranks), cut
    assert next(row_plans(packing, position, rank=rank, num_ranks=num_ranks)) == stream[done]


@settings(max_examples=30)
@given(num_ranks=st.integers(1, 7), lengths=st.lists(st.integers(1, 99), min_size=1, max_size=20))
def test_ranks_together_cover_everything_once(tmp_path_factory, num_ranks, lengths):
    store = make_store(tmp_path_factory.mktemp("store"), lengths)
    packing = pack(store, packing="attend", max_residues=16)
    streams = [row_plans(packing, SamplerPosition(), rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    in_turns = [next(streams[i % num_ranks]) for i in range(2 * packing.units_per_epoch)]
    for lap in (in_turns[: packing.units_per_epoch], in_turns[packing.units_per_epoch :]):
        places = sorted(
            i for plan in lap for group in plan.groups for _, start, end in group for i in range(start, end)
        )
        assert places == list(range(store.num_tokens))


def test_ranks_take_the_pools_of_an_epoch_in_turns(tmp_path):
    store = make_store(tmp_path, [10] * (3 * POOL_SIZE))
    packing = pack(store, packing="isolate")
    assert packing.units_per_epoch == 3
    seen = []
    for rank in range(3):
        stream = row_plans(packing, SamplerPosition(), rank=rank, num_ranks=3)
        seen += [plan for plan in islice(stream, 200) if plan.unit == rank]
    starts = sorted(start for plan in seen for ((_, start, _),) in plan.groups)
    assert starts == [11 * i for i in range(3 * POOL_SIZE)]


def test_more_ranks_than_windows_still_gives_every_rank_rows(tmp_path):
    store = make_store(tmp_path, [10])
    packing = pack(store, packing="attend")
    for rank in range(4):
        plans = list(islice(row_plans(packing, SamplerPosition(), rank=rank, num_ranks=4), 3))
        assert all(np.array_equal(row.tokens[:11], store.tokens) for row in packing.assemble(plans))


def test_each_row_has_a_generator_of_its_own(tmp_path):
    packing = pack(make_store(tmp_path, LENGTHS), packing="isolate")
    plans = list(islice(row_plans(packing, SamplerPosition()), 50))
    first, again = ([row_generator(3, plan).random() for plan in plans] for _ in range(2))
    assert first == again
    assert len(set(first)) == 50
    assert row_generator(4, plans[0]).random() not in first
