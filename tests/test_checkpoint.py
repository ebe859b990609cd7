"""A model folder gives back the very model, and refuses whatever it cannot be sure of in one line."""

import json
import pickle

import pytest
import torch

from protformer.alphabet import NUM_TOKENS
from protformer.checkpoint import _load_safetensors, load_model, load_tensors, save_model, save_tensors
from protformer.config import ExactConfig, FavorConfig, GeneralizedConfig, ModelConfig
from protformer.errors import InputError, ModelFolderError
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import ModelDescription, find_model_folder, read_description

CPU = torch.device("cpu")


def make(folder, attention=None, **changes):
    config = ModelConfig(
        num_layers=2,
        num_heads=2,
        hidden_size=16,
        feed_forward_size=24,
        attention=attention or FavorConfig(num_features=8),
    )
    torch.manual_seed(2)
    model = ProteinLanguageModel(config, seed=5)
    model.encoder.redraw_features(2500)
    description = ModelDescription(model=config, residue_counts=list(range(NUM_TOKENS)), **changes)
    save_model(folder, model, description)
    return model.eval(), description


@pytest.mark.parametrize(
    "attention", [FavorConfig(num_features=8), GeneralizedConfig(), ExactConfig()], ids=lambda a: a.kind
)
def test_a_saved_model_comes_back_with_equal_weights_features_and_description(tmp_path, attention):
    model, description = make(tmp_path / "model", attention, packing="isolate")
    again, description_again = load_model(tmp_path / "model", CPU)
    assert description_again == description
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.randint(4, 24, (2, 30))
    assert torch.equal(model(tokens, torch.ones_like(tokens)), again(tokens, torch.ones_like(tokens)))


def test_a_run_folder_stands_for_the_model_inside(tmp_path):
    make(tmp_path / "run" / "model")
    assert find_model_folder(tmp_path / "run") == tmp_path / "run" / "model"
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_whoever_may_read_the_description_may_read_the_weights(tmp_path):
    make(tmp_path / "model")
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1


def test_weights_that_cannot_be_opened_are_told_in_the_words_of_the_system(tmp_path):
    make(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ModelFolderError, match="directory"):
        _load_safetensors(weights, CPU)


def test_the_card_names_what_a_finder_of_the_folder_wants_to_know(tmp_path):
    make(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "favor attention" in card
    assert "2 layers" in card


def break_alphabet(folder):
    edit(folder, alphabet_fingerprint="0123")


def break_version(folder):
    edit(folder, format_version=99)


def break_json(folder):
    (folder / "config.json").write_text("{")


def break_field(folder):
    edit(folder, colour="blue")


def break_sizes(folder):
    tree = json.loads((folder / "config.json").read_text())
    tree["model"]["feed_forward_size"] = 48
    (folder / "config.json").write_text(json.dumps(tree))


def break_weights(folder):
    (folder / "model.safetensors").write_bytes(b"nonsense")


def break_counts(folder):
    edit(folder, residue_counts=[1, 2])


def replace_by_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))


def other_json(folder):
    (folder / "config.json").write_text('{"architectures": ["EsmForMaskedLM"]}')


def edit(folder, **changes):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_alphabet, "made with another alphabet"),
        (break_version, "format 99 is newer than this program reads"),
        (break_json, "not JSON"),
        (break_field, "colour: no such field"),
        (break_sizes, "does not fit config.json"),
        (break_weights, "cannot be read as safetensors"),
        (break_counts, "residue_counts has 2 numbers"),
        (replace_by_pickle, "cannot be read as safetensors"),
        (other_json, "not the description of a protformer model"),
    ],
)
def test_a_folder_that_cannot_be_trusted_is_refused_in_one_line(tmp_path, damage, message):
    make(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ModelFolderError) as caught:
        load_model(tmp_path / "model", CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(ModelFolderError, match="no such model folder"):
        read_description(tmp_path / "none")
    with pytest.raises(ModelFolderError, match=r"no model here \(expected config.json and model.safetensors"):
        read_description(tmp_path)


def test_unigram_frequencies_are_of_residues_only_and_none_is_zero(tmp_path):
    _, description = make(tmp_path / "model")
    frequencies = torch.tensor(description.unigram_frequencies)
    assert float(frequencies.sum()) == pytest.approx(1.0)
    assert (frequencies[4:29] > 0).all()
    assert frequencies[:4].sum() == frequencies[29:].sum() == 0
    assert float(frequencies[10]) == pytest.approx((10 + 1) / sum(range(5, 30)))


def test_tensors_are_read_without_unpickling_objects(tmp_path):
    save_tensors({"a": torch.ones(2)}, tmp_path / "good.pt")
    assert torch.equal(load_tensors(tmp_path / "good.pt")["a"], torch.ones(2))
    torch.save({"a": ModelConfig()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="not unpickled, or is damaged"):
        load_tensors(tmp_path / "bad.pt")
