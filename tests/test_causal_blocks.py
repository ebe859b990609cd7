"""Causal attention over many blocks: what is kept of them for the backward pass, and what is had from that."""

import gc

import pytest
import torch
from torch import Tensor

from protformer.attention import build_attention, causal_work, pieces
from protformer.attention.causal import attend_to_past
from protformer.attention.interface import Attention
from protformer.config import AttentionConfig, FavorConfig, GeneralizedConfig

HEAD_DIM, NUM_HEADS, NUM_FEATURES = 8, 2, 16
TILE = causal_work.TILE_RESIDUES
KINDS: dict[str, AttentionConfig] = {
    "favor": FavorConfig(num_features=NUM_FEATURES),
    "relu, mirrored": GeneralizedConfig(num_features=NUM_FEATURES, projection="mirrored"),
    "relu": GeneralizedConfig(num_features=NUM_FEATURES, projection="orthogonal"),
    "gelu": GeneralizedConfig(num_features=NUM_FEATURES, function="gelu"),
}
over_kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str) -> Attention:
    return build_attention(KINDS[kind], head_dim=HEAD_DIM, num_heads=NUM_HEADS, causal=True, seed=0, layer=0)


def draw(length: int, *, largest: float = 1.0) -> list[Tensor]:
    """Queries, keys that shrink from a factor, and values."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, NUM_HEADS, length, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(3))
    shrinking = torch.linspace(largest, 0.1, length, dtype=torch.float64)[:, None]
    return [x.requires_grad_() for x in (q, shrinking * k, v)]


def one_segment(length: int) -> Tensor:
    return torch.ones(1, length, dtype=torch.int64)


def blocks_of_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(causal_work.TIMES_AS_LARGE, "cpu", 1)
    monkeypatch.setitem(pieces.NUM_FEATURES_AT_ONCE, "cpu", 1)
    monkeypatch.setattr(causal_work, "TILE_RESIDUES", 16)  # the smallest block


@over_kinds
@pytest.mark.parametrize("most_states", [1, 3, 16])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("largest", [1.0, 100.0], ids=["alike", "shrinking"])
def test_however_few_states_are_kept_gradients_are_the_same(
    kind: str, most_states: int, length: int, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp(-c |k|^2) of keys that shrink grows, so that some blocks among the others are computed carefully."""
    attention, results = build(kind), []
    for several in (False, True):
        if several:
            blocks_of_one_tile(monkeypatch)
            monkeypatch.setattr(causal_work, "MOST_STATES", most_states)
        inputs = draw(length, largest=largest)
        output = attention(*inputs, one_segment(length))
        gradients = [torch.autograd.grad(output.square().sum(), inputs, retain_graph=True) for _ in range(2)]
        assert all(torch.equal(*twice) for twice in zip(*gradients, strict=True))
        results.append([output, *gradients[0]])
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, atol=1e-9, rtol=1e-9)


@over_kinds
@pytest.mark.parametrize("protein", [100 * TILE, 5 * TILE, 10], ids=["one protein", "some proteins", "many proteins"])
def test_what_is_kept_is_some_states_and_less_than_a_quarter_of_the_queries(
    kind: str, protein: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of_one_tile(monkeypatch)
    attention, length = build(kind), 100 * TILE
    inputs, segments = draw(length), torch.arange(length)[None] // protein + 1
    before = bytes_of_tensors()
    output = attention(*inputs, segments)
    kept = bytes_of_tensors() - before - output.untyped_storage().nbytes()
    num_features = attention.feature_map(HEAD_DIM, torch.float64).plain.num_features
    states = min(causal_work.MOST_STATES - 1, protein // (causal_work.RESIDUES_OF_STATE * num_features))
    gathered = protein if protein <= pieces.LONGEST_GATHERED["cpu"] else 0
    # Denominators, positions, a reference, states.
    numbers_of_a_protein = protein + gathered + num_features + states * num_features * (HEAD_DIM + 1)
    weights = 8 * 2 * num_features * HEAD_DIM
    assert kept <= weights + 8 * NUM_HEADS * -(-length // protein) * numbers_of_a_protein
    assert states * num_features * HEAD_DIM <= protein * HEAD_DIM / 4


@over_kinds
@pytest.mark.parametrize("largest", [1.0, 100.0], ids=["alike", "shrinking"])
def test_gradients_after_a_past_are_those_of_the_whole(
    kind: str, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of_one_tile(monkeypatch)
    attention, first, inputs = build(kind), 20, draw(120, largest=largest)
    whole = attention(*inputs, one_segment(120))[:, :, first:]
    wanted = torch.autograd.grad(whole.square().sum(), inputs)
    past = attention.initial_state(*inputs[::2])
    with torch.no_grad():
        for at_once in zip(*(x[:, :, :first].split(1, 2) for x in inputs), strict=True):
            _, past = attention.step(*at_once, past)
    rest = [x[:, :, first:].detach().requires_grad_() for x in inputs]
    feature_map = attention.feature_map(HEAD_DIM, torch.float64)
    output = attend_to_past(*rest, one_segment(100), feature_map, past=past, past_of={(0, 0): 0})
    torch.testing.assert_close(output, whole, atol=1e-9, rtol=1e-9)
    for one, other in zip(torch.autograd.grad(output.square().sum(), rest), wanted, strict=True):
        torch.testing.assert_close(one, other[:, :, first:], atol=1e-9, rtol=1e-9)


def bytes_of_tensors() -> int:
    gc.collect()
    tensors = (x for x in gc.get_objects() if type(x) is Tensor)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 300, 1000])
def test_blocks_are_of_whole_tiles_and_groups_of_neighbouring_blocks(length: int) -> None:
    ranges = pieces.tiled_ranges(length, 256, 64)
    assert [place for block in ranges for place in range(*block)] == list(range(length))
    assert all(stop - start <= 256 and start % 64 == 0 for start, stop in ranges)
    assert all((stop - start) % 64 == 0 or stop - start < 64 for start, stop in ranges)
    assert len(ranges) <= length // 256 + 2
