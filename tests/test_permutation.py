"""Orders that are computed point by point: bijections at any size, shares that are kept at any time."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protformer.corpus.draws import DrawOrder
from protformer.corpus.permutation import keyed_hash, keyed_integers, permute

seeds = st.integers(0, 2**32 - 1)


@given(n=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 10**12))
def test_the_order_of_an_epoch_is_a_bijection(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, keyed_hash(seed, epoch)).tolist()) == list(range(n))


@given(n=st.integers(1, 2**62), seed=seeds, data=st.data())
def test_at_any_size_indices_stay_in_range_and_apart(n, seed, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    places = permute(np.array(indices), n, keyed_hash(seed)).tolist()
    assert all(0 <= place < n for place in places)
    assert len(set(places)) == len(places)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), seed=seeds)
def test_each_index_may_have_a_size_and_a_key_of_its_own(sizes, seed):
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    indices = np.concatenate([np.arange(size) for size in sizes])
    together = permute(indices, np.array(sizes)[numbers], keyed_hash(seed, numbers)).tolist()
    alone = [permute(np.arange(size), size, keyed_hash(seed, number)).tolist() for number, size in enumerate(sizes)]
    assert together == [place for places in alone for place in places]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [permute(np.arange(100), 100, keyed_hash(seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len({order.tobytes() for order in orders}) == 25
    # A shuffled order has one fixed point on average, Poisson distributed: 25 of them have 75 with odds below 1e-14.
    assert sum(int((order == np.arange(100)).sum()) for order in orders) < 75


def test_an_order_looks_random():
    order = permute(np.arange(100_000), 100_000, keyed_hash(7))
    # Standard deviation of a serial correlation: 1 / sqrt(n) = 0.003.
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015
    # Steps between neighbours, in 100 classes: chi-squared of 99 degrees of freedom, 99 +- 14.
    classes = np.bincount(np.diff(order) % 100_000 // 1000, minlength=100)
    assert ((classes - 1000.0) ** 2 / 1000).sum() < 99 + 5 * 14


@given(bound=st.integers(1, 2**62), parts=st.lists(st.integers(0, 2**62), min_size=1, max_size=4))
def test_keyed_integers_stay_below_their_bound_and_are_a_function_of_their_key(bound, parts):
    first, again = (keyed_integers(np.array([bound]), *parts) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert 0 <= first[0] < bound


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5), seed=seeds, epoch=st.integers(0, 10**9))
def test_without_weights_every_item_of_every_source_is_drawn_once_an_epoch(sizes, seed, epoch):
    order = DrawOrder(sizes, seed=seed)
    numbers = epoch * order.draws_per_epoch + np.arange(order.draws_per_epoch)
    draws = order.draw(numbers)
    drawn = sorted(zip(draws.source.tolist(), draws.item.tolist(), strict=True))
    assert drawn == [(source, item) for source, size in enumerate(sizes) for item in range(size)]
    assert set(draws.lap.tolist()) == {epoch}


def test_each_epoch_each_source_and_each_seed_has_an_order_of_its_own():
    items = [
        order.draw(epoch * 80 + np.arange(80))
        for order in (DrawOrder([40, 40], seed=seed) for seed in (1, 2))
        for epoch in range(5)
    ]
    assert len({draws.item[draws.source == source].tobytes() for draws in items for source in (0, 1)}) == 20


@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    start=st.integers(0, 10**9),
    length=st.integers(1, 300),
)
def test_weighted_sources_keep_their_shares_in_any_stretch(weights, start, length):
    order = DrawOrder([7] * len(weights), seed=1, weights=weights)
    counts = np.bincount(order.draw(start + np.arange(length)).source, minlength=len(weights))
    expected = np.array(weights) / sum(weights) * length
    assert (np.abs(counts - expected) <= len(weights) + 1).all()


@given(seed=seeds, epoch=st.integers(0, 1000))
def test_a_weighted_source_is_gone_through_in_full_before_it_begins_again(seed, epoch):
    order = DrawOrder([5, 11], seed=seed, weights=[3.0, 1.0])
    draws = order.draw(epoch * 160 + np.arange(160))
    for source, size in enumerate(order.sizes):
        laps = draws.lap[draws.source == source]
        items = draws.item[draws.source == source]
        assert all(later - earlier in (0, 1) for earlier, later in pairwise(laps.tolist()))
        for lap in range(int(laps[0]) + 1, int(laps[-1])):
            assert sorted(items[laps == lap].tolist()) == list(range(size))


def test_a_billion_proteins_need_no_more_than_the_draws_asked_for():
    order = DrawOrder([250_000_000, 10**9], seed=3)
    draws = order.draw(np.array([0, 10**9, 10**15]))
    assert (draws.item < np.array(order.sizes)[draws.source]).all()
    assert draws.lap.tolist() == [0, 0, 10**15 // 1_250_000_000]
