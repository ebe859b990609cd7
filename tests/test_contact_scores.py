"""Contact scores are those of the formulas, written here as loops over residues and amino acids."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protformer.inference.contact_scores import (
    ContactMap,
    apc,
    contacts_from_attention,
    contacts_from_jacobian,
    symmetrize,
    unit_scale,
)


def random_maps(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


def apc_by_loops(scores):
    length = len(scores)
    total = sum(scores[i, j] for i in range(length) for j in range(length))
    corrected = np.empty_like(scores)
    for i in range(length):
        for j in range(length):
            row = sum(scores[i, k] for k in range(length))
            column = sum(scores[k, j] for k in range(length))
            corrected[i, j] = scores[i, j] - row * column / total
    return corrected


def symmetrize_by_loops(scores):
    length = len(scores)
    return np.array([[scores[i, j] + scores[j, i] for j in range(length)] for i in range(length)])


def centred_by_loops(jacobian):
    """Without the mean over i, then over a, j and b, each taken where the others are held fixed."""
    centred = jacobian.copy()
    for axis in range(4):
        lines = np.moveaxis(centred, axis, -1)
        for place in np.ndindex(lines.shape[:-1]):
            lines[place] -= sum(lines[place]) / lines.shape[-1]
    return centred


def jacobian_contacts_by_loops(jacobian):
    length = len(jacobian)
    centred = centred_by_loops(jacobian)
    norms = np.zeros((length, length))
    for i in range(length):
        for j in range(length):
            if i != j:
                block = [(centred[i, a, j, b] + centred[j, b, i, a]) / 2 for a in range(20) for b in range(20)]
                norms[i, j] = sum(value**2 for value in block) ** 0.5
    return apc_by_loops(norms)


def unit_scale_by_loops(scores):
    length = len(scores)
    pairs = [(scores[i, j] + scores[j, i]) / 2 for i in range(length) for j in range(i)]
    scaled = np.zeros((length, length))
    for i in range(length):
        for j in range(length):
            if i != j:
                mean = (scores[i, j] + scores[j, i]) / 2
                scaled[i, j] = (mean - min(pairs)) / (max(pairs) - min(pairs))
    return scaled


@pytest.mark.parametrize("length", [1, 2, 7])
def test_apc_subtracts_the_product_of_row_and_column_over_the_total(length):
    maps = random_maps(3, length, length)
    expected = np.stack([apc_by_loops(scores) for scores in maps.numpy()])
    np.testing.assert_allclose(apc(maps).numpy(), expected, atol=1e-12)


def test_each_map_of_a_stack_is_corrected_by_itself():
    maps = random_maps(2, 3, 5, 5)
    np.testing.assert_allclose(apc(maps)[1, 2].numpy(), apc(maps[1, 2]).numpy(), atol=1e-12)


def test_apc_leaves_nothing_of_a_map_that_is_an_outer_product():
    background = random_maps(6)
    scores = background[:, None] * background[None, :]
    np.testing.assert_allclose(apc(scores).numpy(), np.zeros((6, 6)), atol=1e-12)


@pytest.mark.parametrize("scores", [torch.zeros(4, 4), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])])
def test_apc_returns_a_map_that_sums_to_zero_as_it_is(scores):
    assert torch.equal(apc(scores), scores)


def test_symmetrize_adds_the_transpose_of_each_map():
    maps = random_maps(2, 5, 5)
    expected = np.stack([symmetrize_by_loops(scores) for scores in maps.numpy()])
    np.testing.assert_allclose(symmetrize(maps).numpy(), expected, atol=1e-12)


def test_attention_contacts_are_the_mean_of_corrected_symmetric_maps():
    weights = random_maps(4, 6, 6)
    expected = np.mean([apc_by_loops(symmetrize_by_loops(scores)) for scores in weights.numpy()], axis=0)
    np.testing.assert_allclose(contacts_from_attention(weights).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("length", [2, 4])
def test_jacobian_contacts_are_corrected_norms_of_centred_symmetric_blocks(length):
    jacobian = random_maps(length, 20, length, 20) - 0.3
    expected = jacobian_contacts_by_loops(jacobian.numpy())
    np.testing.assert_allclose(contacts_from_jacobian(jacobian).numpy(), expected, atol=1e-10)


def test_a_jacobian_that_depends_on_one_end_of_a_pair_only_holds_no_contact():
    jacobian = random_maps(5, 20, 1, 1).expand(5, 20, 5, 20) + random_maps(1, 1, 5, 20, seed=1)
    np.testing.assert_allclose(contacts_from_jacobian(jacobian).numpy(), np.zeros((5, 5)), atol=1e-12)


def test_the_jacobian_given_is_not_changed():
    jacobian = random_maps(3, 20, 3, 20)
    before = jacobian.clone()
    contacts_from_jacobian(jacobian)
    assert torch.equal(jacobian, before)


@pytest.mark.parametrize("length", [3, 8])
def test_unit_scale_stretches_the_mean_of_both_directions_of_each_pair_to_0_and_1(length):
    scores = random_maps(length, length) * 7 - 3
    np.testing.assert_allclose(unit_scale(scores).numpy(), unit_scale_by_loops(scores.numpy()), atol=1e-6)


@given(st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6]))
def test_unit_scale_is_symmetric_within_0_and_1_and_keeps_the_order_of_pairs(length, seed, size):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(((rng.random((length, length)) - 0.5) * size).astype(np.float32))
    scaled = unit_scale(scores)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, scaled.T)
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    assert not scaled.diagonal().any()
    rows, columns = np.triu_indices(length, k=1)
    order = np.argsort(((scores + scores.T) / 2)[rows, columns].numpy())
    assert (np.diff(scaled[rows, columns].numpy()[order]) >= 0).all()


def test_the_diagonal_does_not_count_in_the_scale():
    scores = torch.tensor([[900.0, 1.0, 2.0], [1.0, -900.0, 3.0], [2.0, 3.0, 900.0]])
    assert unit_scale(scores).tolist() == [[0.0, 0.0, 0.5], [0.0, 0.0, 1.0], [0.5, 1.0, 0.0]]


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_a_map_without_any_difference_scales_to_zero(length, value):
    assert torch.equal(unit_scale(torch.full((length, length), value)), torch.zeros(length, length))


def test_an_only_pair_has_nothing_to_be_ranked_against_and_is_zero():
    assert torch.equal(unit_scale(random_maps(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_protein_of_one_residue_has_one_zero(value):
    attention = contacts_from_attention(torch.full((2, 1, 1), value))
    jacobian = contacts_from_jacobian(torch.full((1, 20, 1, 20), value))
    for scores in (attention, jacobian):
        assert scores.tolist() == [[0.0]]
        assert unit_scale(scores).tolist() == [[0.0]]


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_maps_that_are_the_same_everywhere_give_no_contact_and_no_nan(value):
    attention = contacts_from_attention(torch.full((3, 5, 5), value))
    jacobian = contacts_from_jacobian(torch.full((5, 20, 5, 20), value))
    np.testing.assert_allclose(attention.numpy(), np.zeros((5, 5)), atol=1e-6)
    np.testing.assert_allclose(jacobian.numpy(), np.zeros((5, 5)), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "chain_lengths", "chain_ids", "told"),
    [
        (4, (5,), ("a",), "contacts are"),
        (5, (2, 2), ("a", "b"), "do not make up"),
        (5, (2, 3), ("a",), "do not make up"),
    ],
)
def test_a_contact_map_whose_parts_disagree_is_refused(size, chain_lengths, chain_ids, told):
    contacts = np.zeros((size, size), dtype=np.float32)
    with pytest.raises(ValueError, match=told):
        ContactMap(id="a", contacts=contacts, sequence="MKVLA", chain_lengths=chain_lengths, chain_ids=chain_ids)
