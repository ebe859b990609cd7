"""Batches are a function of the seed and the place in the run, not of workers, ranks or batch size."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from small_stores import make_store
from torch.utils.data import DataLoader

from protformer.config import DataConfig, MaskingConfig, RunConfig
from protformer.corpus.packing import build_packing
from protformer.corpus.row_stream import SamplerPosition
from protformer.corpus.sampling import Corpus
from protformer.training.datamodule import BatchStream
from protformer.training.ranks import RankLayout

# A machine for tests may have fewer cores than workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

LENGTHS = [40, 10, 200, 33, 70, 8, 90, 120, 63, 64, 65]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), LENGTHS)


@pytest.fixture(params=["attend", "isolate"])
def config(request):
    masking = MaskingConfig(span_mean_length=3.0) if request.param == "isolate" else MaskingConfig()
    return RunConfig(seed=3, data=DataConfig(max_residues=64, packing=request.param, masking=masking))


def stream(store, config, *, batch_rows=2, start=None, num_batches=0, rank=0, num_ranks=1):
    packing = build_packing(Corpus(stores=(store,)), config.data, seed=config.seed)
    return BatchStream(
        packing,
        config,
        batch_rows=batch_rows,
        start=start or SamplerPosition(),
        num_batches=num_batches,
        rank=rank,
        ranks=RankLayout(num_ranks=num_ranks, context_parallel=1),
    )


def batches(batch_stream, count, num_workers=0):
    return list(islice(DataLoader(batch_stream, batch_size=None, num_workers=num_workers), count))


def rows(some_batches):
    return [
        tuple(tensor.tolist() for tensor in row)
        for batch in some_batches
        for row in zip(batch.masked.inputs, batch.masked.targets, batch.masked.segments, strict=True)
    ]


def same(first, second):
    assert [batch.number for batch in first] == [batch.number for batch in second]
    assert [batch.after for batch in first] == [batch.after for batch in second]
    assert rows(first) == rows(second)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_batches_of_none_in_the_same_order(store, config, num_workers):
    same(batches(stream(store, config), 12, num_workers), batches(stream(store, config), 12))


def test_workers_go_on_from_any_batch(store, config):
    whole = batches(stream(store, config), 12)
    for done in (1, 4, 7):
        rest = stream(store, config, start=whole[done - 1].after, num_batches=done)
        same(batches(rest, 12 - done, num_workers=2), whole[done:])


def test_batch_size_does_not_change_rows_or_masks(store, config):
    expected = rows(batches(stream(store, config, batch_rows=1), 24))
    for batch_rows in (2, 3, 8):
        assert rows(batches(stream(store, config, batch_rows=batch_rows), 24 // batch_rows)) == expected


def test_ranks_deal_out_the_windows_of_one_device_with_the_same_masks(store):
    config = RunConfig(seed=3, data=DataConfig(max_residues=64, packing="attend"))
    alone = rows(batches(stream(store, config, batch_rows=1), 24))
    for num_ranks in (2, 3):
        shares = [
            rows(batches(stream(store, config, batch_rows=1, rank=rank, num_ranks=num_ranks), 24 // num_ranks))
            for rank in range(num_ranks)
        ]
        assert [row for step in zip(*shares, strict=True) for row in step] == alone


def test_another_seed_and_another_epoch_mask_anew(store, config):
    first = batches(stream(store, config, batch_rows=30), 2)
    other = batches(stream(store, replace(config, seed=4), batch_rows=30), 1)
    assert not torch.equal(first[0].masked.targets, first[1].masked.targets)
    assert not torch.equal(first[0].masked.targets, other[0].masked.targets)
