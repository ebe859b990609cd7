"""The encoder gives a protein the same result alone, padded or packed, in both directions and for every kind."""

import math

import pytest
import torch

from protformer.alphabet import EOS, FIRST_RESIDUE, LAST_RESIDUE, MASK, NUM_TOKENS, PAD
from protformer.config import ExactConfig, FavorConfig, GeneralizedConfig, ModelConfig, load_run_config
from protformer.lora_config import LoraConfig
from protformer.model import encoder
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model.rotary import (
    neighbours_of_halves,
    positions_in_segments,
    rotary_angles,
    rotate,
    rotate_neighbours,
    split_and_rotate,
)
from protformer.training.fine_tuning import add_lora

KINDS = [FavorConfig(num_features=16), GeneralizedConfig(num_features=16), ExactConfig()]


def make_model(attention, direction="bidirectional", **changes):
    torch.manual_seed(1)
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_size": 16, "feed_forward_size": 32}
    model = ProteinLanguageModel(ModelConfig(attention=attention, direction=direction, **(sizes | changes)), seed=3)
    # Weights as large as those of a trained model, so that positions and neighbours matter.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def protein(length, seed):
    generator = torch.Generator().manual_seed(seed)
    residues = torch.randint(FIRST_RESIDUE, LAST_RESIDUE + 1, (length,), generator=generator)
    return torch.cat([residues, torch.tensor([EOS])])


@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
@pytest.mark.parametrize("attention", KINDS, ids=lambda a: a.kind)
def test_a_protein_gives_the_same_logits_alone_padded_and_packed(attention, direction):
    model = make_model(attention, direction)
    first, second = protein(40, 1), protein(7, 2)
    alone = [model(p[None], torch.ones_like(p[None]))[0] for p in (first, second)]
    padding = torch.full((9,), PAD)
    row = torch.cat([first, second, padding])[None]
    segments = torch.cat([torch.ones_like(first), torch.full_like(second, 2), torch.zeros_like(padding)])[None]
    packed = model(row, segments)[0]
    torch.testing.assert_close(packed[: len(first)], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[len(first) : len(first) + len(second)], alone[1], rtol=1e-4, atol=1e-4)


def test_normalised_queries_and_keys_bound_the_logits_and_keep_positions_relative():
    model = make_model(ExactConfig(), qk_norm=True)
    block = model.encoder.blocks[0]
    with torch.no_grad():
        block.query_key_value.weight.mul_(100)
    x = torch.randn(1, 6, 16).expand(2, -1, -1)
    positions = torch.stack([torch.arange(6), torch.arange(50, 56)])
    q, k, _ = block.queries_keys_values(x, rotary_angles(positions, 8))
    logits = q @ k.transpose(-1, -2) / math.sqrt(8)
    largest = block.query_norm.weight.abs().max() * block.key_norm.weight.abs().max() * math.sqrt(8)
    assert logits.abs().max() <= largest * 1.001
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert not make_model(ExactConfig()).state_dict().keys() & {"encoder.blocks.0.query_norm.weight"}


@pytest.mark.parametrize("attention", KINDS, ids=lambda a: a.kind)
def test_chained_proteins_of_one_segment_do_see_each_other(attention):
    model = make_model(attention)
    row = torch.cat([protein(20, 1), protein(20, 2)])[None]
    changed = row.clone()
    changed[0, 30] = MASK
    one = torch.ones_like(row)
    assert (model(row, one)[0, :20] - model(changed, one)[0, :20]).abs().max() > 1e-4


@pytest.mark.parametrize("attention", KINDS, ids=lambda a: a.kind)
def test_a_unidirectional_model_sees_no_later_residue(attention):
    model = make_model(attention, "unidirectional")
    row = protein(50, 1)[None]
    changed = row.clone()
    changed[0, 30:] = MASK
    one = torch.ones_like(row)
    assert torch.equal(model(row, one)[0, :30], model(changed, one)[0, :30])


@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
@pytest.mark.parametrize("attention", KINDS, ids=lambda a: a.kind)
def test_attention_maps_of_every_layer_are_rows_of_weights(attention, direction):
    model = make_model(attention, direction)
    row = protein(12, 1)[None]
    maps = list(model.encoder.attention_maps(row, torch.ones_like(row)))
    assert len(maps) == 2
    for weights in maps:
        assert weights.shape == (1, 2, 13, 13)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 13))


def test_fewer_layers_give_the_states_that_all_layers_pass_through():
    model = make_model(ExactConfig())
    row = protein(12, 1)[None]
    one = torch.ones_like(row)
    torch.testing.assert_close(model.encoder(row, one, num_layers=0).hidden, model.encoder.embedding(row))
    half = model.encoder(row, one, num_layers=1).hidden
    angles = rotary_angles(positions_in_segments(one), 8)
    torch.testing.assert_close(
        model.encoder.final_norm(model.encoder.blocks[1](half, angles, one)), model.encoder(row, one).hidden
    )


def test_positions_start_anew_in_each_segment():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 3, 3, 3, 3]])
    assert positions_in_segments(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]


def test_rotation_is_esm2s_half_split_convention_and_depends_on_differences_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8).unbind(0)

    def product(i, j):
        turned = [rotate(x[None], *rotary_angles(torch.tensor([[p]]), 8)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(3, 10), product(1003, 1010), rtol=1e-3, atol=1e-4)
    # Channels c and c + 4 are a pair; the first pair turns by one radian a position.
    x = torch.zeros(1, 1, 1, 8)
    x[..., 0] = 1.0
    turned = rotate(x, *rotary_angles(torch.tensor([[2]]), 8))[0, 0, 0]
    torch.testing.assert_close(turned[[0, 4]], torch.tensor([math.cos(2.0), math.sin(2.0)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_splitting_and_rotating_at_once_gives_values_and_gradients_of_doing_so_apart(dtype):
    torch.manual_seed(0)
    projected = torch.randn(2, 7, 3, 2, 8, dtype=dtype, requires_grad=True)
    turn = rotary_angles(torch.stack([torch.arange(7), torch.arange(40, 47)]), 8)
    q, k, v = projected.permute(2, 0, 3, 1, 4)
    apart = [rotate(q, *turn), rotate(k, *turn), v]
    weights = torch.randn(3, 2, 2, 7, 8, dtype=dtype)
    results = []
    for outputs in (apart, split_and_rotate(projected, *turn)):
        (gradient,) = torch.autograd.grad([*outputs], projected, [*weights])
        results.append([*outputs, gradient])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


def test_rotating_neighbours_is_rotating_halves_in_another_order_of_channels():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 8)
    turn = rotary_angles(torch.stack([torch.arange(7), torch.arange(40, 47)]), 8)
    expected = rotate(x.transpose(1, 2), *turn).transpose(1, 2).flatten(2)
    order = neighbours_of_halves(3, 8)
    assert order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    found = x.flatten(2)[..., order].unflatten(-1, (3, 8))
    rotate_neighbours(found, *turn)
    torch.testing.assert_close(found.flatten(2), expected[..., order])


@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
@pytest.mark.parametrize("attention", KINDS, ids=lambda a: a.kind)
@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "lora"])
def test_states_are_the_same_in_inference_mode(attention, direction, is_adapted, monkeypatch):
    model = make_model(attention, direction)
    if is_adapted:
        pytest.importorskip("peft")
        add_lora(model, LoraConfig(rank=2, alpha=4, targets=["query_key_value"]))
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter)
    row = torch.stack([protein(30, 1), torch.cat([protein(20, 2), protein(9, 3)])])
    segments = torch.ones_like(row)
    segments[1, 21:] = 2
    expected = model.encoder(row, segments).hidden
    turned = []
    monkeypatch.setattr(encoder, "rotate_neighbours", lambda x, *turn: turned.append(rotate_neighbours(x, *turn)))
    with torch.inference_mode():
        found = model.encoder(row, segments).hidden
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
    # Only exact attention does not care for the order of channels, and adapters are not reordered.
    assert len(turned) == (2 if attention.kind == "exact" and not is_adapted else 0)


@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
@pytest.mark.parametrize("attention", KINDS, ids=lambda a: a.kind)
def test_states_of_wanted_positions_and_their_gradients_are_those_of_the_whole_pass(attention, direction):
    model = make_model(attention, direction)
    row = torch.stack([protein(30, 1), protein(30, 2)])
    one, wanted = torch.ones_like(row), torch.zeros_like(row, dtype=torch.bool)
    wanted[0, [3, 20]] = wanted[1, 11] = True
    results = []
    for states in (model.encoder(row, one).hidden[wanted], model.encoder.states_at(row, one, wanted)):
        gradients = torch.autograd.grad(states.square().sum(), [*model.encoder.parameters()])
        results.append([states, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder.states_at(row, one, wanted), results[0][0])
        assert model.encoder.states_at(row, one, torch.zeros_like(wanted)).shape == (0, 16)


def test_dropout_acts_in_training_only():
    model = make_model(ExactConfig(), dropout=0.5)
    row = protein(12, 1)[None]
    one = torch.ones_like(row)
    assert torch.equal(model(row, one), model(row, one))
    model.train()
    assert not torch.equal(model(row, one), model(row, one))


@pytest.mark.parametrize(
    ("name", "millions"),
    # 4 d^2 + 2 d d_ff a layer, 33 d tokens, d^2 of the head; biases and norms add less than 1 %.
    [("tiny", None), ("small", 7.5), ("base", 33.5), ("paper-single", 75.9), ("paper-concat", 19.2)],
)
def test_built_in_configurations_have_the_promised_number_of_parameters(name, millions):
    config = load_run_config(name).model
    with torch.device("meta"):
        model = ProteinLanguageModel(config, seed=0)
    found = sum(parameter.numel() for parameter in model.parameters())
    d, ff = config.hidden_size, config.feed_forward_size
    matrices = config.num_layers * (4 * d * d + 2 * d * ff) + NUM_TOKENS * d + d * d
    assert matrices < found < 1.02 * matrices
    if millions is not None:
        assert abs(found / 1e6 - millions) < 0.05 * millions


def test_a_model_that_starts_from_counts_predicts_their_frequencies_before_it_knows_anything():
    model = make_model(ExactConfig())
    counts = list(range(NUM_TOKENS))
    model.start_from_counts(counts)
    with torch.no_grad():
        model.encoder.embedding.weight.zero_()
        probabilities = model(protein(5, 1)[None], torch.ones(1, 6, dtype=torch.int64)).softmax(-1)[0, 0]
    expected = (torch.tensor(counts) + 1.0) / (sum(counts) + NUM_TOKENS)
    torch.testing.assert_close(probabilities, expected)


def test_a_new_model_keeps_the_scale_of_what_it_gets_at_any_width():
    for size in (64, 256):
        torch.manual_seed(0)
        config = ModelConfig(
            num_layers=6, num_heads=4, hidden_size=size, feed_forward_size=4 * size, attention=ExactConfig()
        )
        model = ProteinLanguageModel(config, seed=0).eval()
        row = protein(200, 1)[None]
        one = torch.ones_like(row)
        with torch.no_grad():
            spread = model.encoder(row, one, num_layers=5).hidden.std()
            logits = model(row, one)
        assert 0.1 < spread < 3
        assert 0.3 < logits.std() < 3


@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
def test_blocks_along_the_residues_change_nothing_without_autograd(monkeypatch, direction):
    model = make_model(FavorConfig(num_features=16), direction)
    row = torch.cat([protein(20, 1), protein(26, 2)]).expand(2, -1)
    segments = torch.ones_like(row)
    whole = model(row, segments)
    blocks = []
    monkeypatch.setattr(encoder, "BLOCK_TOKENS", 20)  # 10 residues of each of the 2 rows; the last block has 8
    norm = model.encoder.blocks[0].feed_forward_norm
    norm.register_forward_hook(lambda module, arguments, output: blocks.append(output.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(model(row, segments), whole, rtol=1e-5, atol=1e-5)
    assert blocks == [10, 10, 10, 10, 8]
