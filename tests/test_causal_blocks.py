"""Causal attention over many blocks: what is kept of them for the backward pass, and what is had from that."""

import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
@pytest.mark.parametrize("most_states", [2, 3, 16])
@pytest.mark.parametrize("length", [1, 17, 300])
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
def test_pieces_of_one_and_of_several_proteins_keep_states_side_by_side(kind: str) -> None:
    """Proteins of 100 residues are gathered, three together, and one of 150 is by itself; all have two blocks."""
    attention, lengths = build(kind), [100, 100, 150, 100]
    inputs = draw(sum(lengths))
    segments = torch.arange(1, 5).repeat_interleave(torch.tensor(lengths))[None]
    packed = torch.autograd.grad(attention(*inputs, segments).square().sum(), inputs)
    for protein in zip(*(x.split(lengths, 2) for x in (*inputs, *packed)), strict=True):
        alone = attention(*protein[:3], one_segment(protein[0].shape[2])).square().sum()
        for one, other in zip(torch.autograd.grad(alone, protein[:3]), protein[3:], strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@over_kinds
@pytest.mark.parametrize("protein", [100 * TILE, 5 * TILE, 10], ids=["one protein", "some proteins", "many proteins"])
def test_what_waits_for_the_backward_pass_is_some_states_and_few_numbers_a_residue(
    kind: str, protein: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of_one_tile(monkeypatch)
    attention, length = build(kind), 100 * TILE
    inputs, segments = draw(length), torch.arange(length)[None] // protein + 1
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = attention(*inputs, segments)
    numbers = sum(x.numel() for x in saved)
    numbers -= sum(x.numel() for x in (*inputs, output)) + NUM_HEADS * length  # one number a query
    num_features = attention.feature_map(HEAD_DIM, torch.float64).plain.num_features
    num_proteins, state = -(-length // protein), NUM_HEADS * num_features * (HEAD_DIM + 1)
    assert numbers <= num_proteins * (causal_work.MOST_STATES - 1) * state
    assert numbers <= inputs[2].numel() / 4 * (HEAD_DIM + 1) / HEAD_DIM
    assert (numbers > 0) == (protein >= 5 * TILE)


@over_kinds
def test_nothing_else_outlives_the_forward_pass_or_the_backward_pass(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved for autograd is dropped after the backward pass, and by activation checkpointing."""
    blocks_of_one_tile(monkeypatch)
    attention, inputs, segments = build(kind), draw(20 * TILE), one_segment(20 * TILE)
    state = 8 * NUM_HEADS * NUM_FEATURES * (HEAD_DIM + 1)
    known = bytes_of_tensors()
    output = checkpoint(attention, *inputs, segments, use_reentrant=False)
    assert bytes_of_tensors() - known - output.untyped_storage().nbytes() < 4 * state  # the generator's state is 5 kB
    output.sum().backward()
    gradients = sum(x.untyped_storage().nbytes() for x in inputs)
    assert bytes_of_tensors() - known - output.untyped_storage().nbytes() - gradients < 4 * state

    known = bytes_of_tensors()
    output = attention(*inputs, segments)
    output.sum().backward()
    assert bytes_of_tensors() - known - output.untyped_storage().nbytes() < 2 * state


@over_kinds
def test_without_gradients_no_state_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of_one_tile(monkeypatch)
    kept, forward = [], causal_work.CausalWork.forward

    def spy(*arguments: Any, keep_states: bool) -> Any:
        found = forward(*arguments, keep_states=keep_states)
        kept.append(len(found[1]))
        return found

    monkeypatch.setattr(causal_work.CausalWork, "forward", spy)
    attention, inputs, segments = build(kind), draw(20 * TILE), one_segment(20 * TILE)
    attention(*inputs, segments)
    attention(*(x.detach() for x in inputs), segments)
    assert kept == [causal_work.MOST_STATES - 1, 0]


@over_kinds
def test_the_backward_pass_holds_no_more_states_at_once_however_many_blocks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of_one_tile(monkeypatch)
    monkeypatch.setattr(causal_work, "MOST_STATES", 4)
    held, differentiate, next_state = [], causal_work.CausalWork._differentiate, causal_work.CausalWork._next_state
    states: list[weakref.ref[Tensor]] = []

    def spy_next(*arguments: Any) -> Any:
        states.append(weakref.ref(found := next_state(*arguments)))
        return found

    def spy(*arguments: Any) -> Any:
        held.append(sum(state() is not None for state in states))
        return differentiate(*arguments)

    monkeypatch.setattr(causal_work.CausalWork, "_next_state", spy_next)
    monkeypatch.setattr(causal_work.CausalWork, "_differentiate", spy)
    inputs = draw(16 * 4 * 64)
    build(kind)(*inputs, one_segment(16 * 4 * 64)).sum().backward()
    assert len(held) == 4 * 64
    assert 4 <= max(held) <= 3 * 4  # 64 blocks of a group: three times four


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


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300, 1000])
@pytest.mark.parametrize("least", [1, 200, 2000])
def test_blocks_are_of_whole_tiles_and_groups_of_neighbouring_blocks(length: int, least: int) -> None:
    ranges = pieces.tiled_ranges(length, 128, 64)
    assert [place for block in ranges for place in range(*block)] == list(range(length))
    assert all(stop - start <= 128 and start % 64 == 0 for start, stop in ranges)
    assert all((stop - start) % 64 == 0 or stop - start < 64 for start, stop in ranges)
    assert len(ranges) <= length // 128 + 2

    groups = causal_work._groups(ranges, least)
    assert [number for group in groups.values() for number in group] == list(range(len(ranges)))
    assert all(group[0] == first for first, group in groups.items())
    assert len(groups) <= min(causal_work.MOST_STATES, -(-length // least))
    firsts = [ranges[first][0] for first in groups]
    assert all(after - before < least + 128 for before, after in pairwise([*firsts, length]) if length <= 16 * least)
