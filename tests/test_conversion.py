"""Converted weights give what transformers gives: hidden states, logits, contacts; what cannot be is named."""

import copy
import itertools
import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from pretrained_oracles import (
    BERT_TOKENS,
    PROT_BERT_TOKENS,
    ROBERTA_TOKENS,
    bert,
    edit_config,
    esm,
    roberta,
)
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM, EsmModel, EsmTokenizer

from protformer.alphabet import CLS, EOS, MASK, PAD, TOKENS
from protformer.checkpoint import load_model, save_model
from protformer.cli import run
from protformer.config import ExactConfig, ModelConfig
from protformer.conversion.vocabulary import ALIASES
from protformer.corpus.fasta import SequenceRecord, read_fasta
from protformer.inference import batches
from protformer.inference.contacts import predict_contacts
from protformer.inference.embed import LengthLimit, LengthReport, embed
from protformer.inference.session import open_session

FASTA = "data/trembl_validation.fasta.gz"


@pytest.fixture(scope="module")
def proteins(request):
    """Real proteins of 20 to 50 residues, cut where they are longer."""
    records = itertools.islice(read_fasta(str(request.config.rootpath / FASTA)), 6)
    lengths = (50, 31, 20, 44, 27, 38)
    return [
        SequenceRecord(id=r.id, header=r.header, tokens=r.tokens[:n], line=r.line)
        for r, n in zip(records, lengths, strict=True)
    ]


def convert(source, out, *options):
    assert run(["convert", "--from", str(source), "--out", str(out), "--quiet", *options]) == 0
    return open_session(out, device="cpu", precision="fp32")


def framed(record, masked=()):
    tokens = torch.tensor([[CLS, *record.tokens, EOS]])
    tokens[0, [1 + column for column in masked]] = MASK
    return tokens


def in_their_order(tokens, vocabulary):
    """Our token numbers as those of another vocabulary; tokens that it lacks become its unknown one."""
    numbers = {ALIASES.get(token, token): number for number, token in enumerate(vocabulary)}
    return torch.tensor([numbers.get(token, numbers["<unk>"]) for token in TOKENS])[tokens]


def assert_equals(session, oracle, vocabulary, tokens):
    """Hidden states and logits of every token that both vocabularies have."""
    ours = session.model(tokens, torch.ones_like(tokens))
    with torch.no_grad():
        theirs = oracle(in_their_order(tokens, vocabulary), output_hidden_states=True)
    hidden = session.model.encoder(tokens, torch.ones_like(tokens)).hidden
    torch.testing.assert_close(hidden, theirs.hidden_states[-1], rtol=1e-4, atol=1e-4)
    known = [number for number, token in enumerate(TOKENS) if token in {ALIASES.get(t, t) for t in vocabulary}]
    columns = in_their_order(torch.tensor(known), vocabulary)
    torch.testing.assert_close(ours[..., known], theirs.logits[..., columns], rtol=1e-4, atol=1e-4)
    # Tokens that the original does not have take next to no probability from those it has.
    torch.testing.assert_close(
        ours.softmax(-1)[..., known], theirs.logits.softmax(-1)[..., columns], rtol=1e-4, atol=1e-6
    )


LAYOUTS = {
    "esm2": (esm, TOKENS, {}),
    "esm1b": (
        esm,
        TOKENS,
        {"position_embedding_type": "absolute", "emb_layer_norm_before": True, "layer_norm_eps": 1e-12},
    ),
    "esm without token dropout": (esm, TOKENS, {"token_dropout": False}),
    "bert of antibodies": (bert, BERT_TOKENS, {}),
    "prot_bert": (bert, PROT_BERT_TOKENS, {"tokens": PROT_BERT_TOKENS}),
    "roberta": (roberta, ROBERTA_TOKENS, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_conversion_gives_the_hidden_states_and_logits_of_the_original(tmp_path, proteins, layout):
    write, vocabulary, changes = LAYOUTS[layout]
    oracle = write(tmp_path / "theirs", **changes)
    session = convert(tmp_path / "theirs", tmp_path / "ours")
    with torch.inference_mode():
        for record in proteins[:3]:
            assert_equals(session, oracle, vocabulary, framed(record))
            assert_equals(session, oracle, vocabulary, framed(record, masked=(2, 3, 11)))


@pytest.fixture(scope="module")
def esm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("esm2")
    return folder, esm(folder / "theirs"), convert(folder / "theirs", folder / "ours")


@pytest.mark.parametrize(("batch_tokens", "packed"), [(1, ()), (10_000, ()), (10_000, ("cpu",))])
def test_embeddings_are_those_of_the_original_alone_padded_and_packed(
    esm2, proteins, batch_tokens, packed, monkeypatch
):
    monkeypatch.setattr(batches, "PACKED", packed)
    _, oracle, session = esm2
    limit, report = LengthLimit(), LengthReport()
    found = embed(session, proteins, per="residue", layer=2, limit=limit, report=report, batch_tokens=batch_tokens)
    for record, embedding in zip(proteins, found, strict=True):
        with torch.no_grad():
            theirs = oracle.esm(framed(record)).last_hidden_state[0, 1:-1].numpy()
        np.testing.assert_allclose(embedding.residue, theirs, rtol=1e-4, atol=1e-4)


def test_packed_proteins_have_the_hidden_states_of_the_original_also_where_they_differ_in_masks(esm2, proteins):
    _, oracle, session = esm2
    rows = [framed(proteins[0], masked=(4, 9)), framed(proteins[1]), framed(proteins[2], masked=range(8))]
    packed = torch.cat([*rows, torch.full((1, 5), PAD)], dim=1)
    numbers = [torch.full_like(row, number) for number, row in enumerate(rows, start=1)]
    segments = torch.cat([*numbers, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    with torch.inference_mode():
        hidden = session.model.encoder(packed, segments).hidden.split([row.shape[1] for row in rows] + [5], dim=1)
        for ours, row in zip(hidden, rows, strict=False):
            torch.testing.assert_close(ours, oracle.esm(row).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_contacts_are_those_of_the_originals_contact_head(esm2, proteins):
    _, oracle, session = esm2
    eager = EsmForMaskedLM(copy.deepcopy(oracle.config)).eval()
    eager.load_state_dict(oracle.state_dict())
    eager.set_attn_implementation("eager")
    for record in proteins[:3]:
        found = predict_contacts(session, (record,), method="attention", batch_tokens=1000).contacts
        with torch.no_grad():
            tokens = framed(record)
            theirs = eager.predict_contacts(tokens, torch.ones_like(tokens))[0].numpy()
        np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-4)
        assert 0 < found.min() < found.max() < 1


@pytest.mark.parametrize("rounding", ["float16", "bfloat16"])
def test_rotary_frequencies_that_were_rounded_stay_so(tmp_path, proteins, rounding):
    oracle = esm(tmp_path / "theirs")
    frequencies = oracle.esm.rotary_embeddings.inv_freq
    frequencies.copy_(frequencies.to(getattr(torch, rounding)).float())
    oracle.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join(TOKENS))
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    old = {f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq": frequencies.clone() for i in range(2)}
    save_file(tensors | old, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    session = convert(tmp_path / "theirs", tmp_path / "ours")
    assert session.model.config.rotary_rounding == rounding
    tokens = framed(proteins[0]).repeat(1, 40)  # as far as the rounding shows
    with torch.inference_mode():
        ours = session.model.encoder(tokens, torch.ones_like(tokens)).hidden
        torch.testing.assert_close(ours, oracle.esm(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_torch_file_and_shards_are_read_as_safetensors_are(tmp_path, proteins, esm2):
    folder, oracle, session = esm2
    tokens = framed(proteins[0])
    expected = session.model(tokens, torch.ones_like(tokens))
    tensors = load_file(folder / "theirs" / "model.safetensors")
    for name in ("torch", "shards"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "vocab.txt"):
            (tmp_path / name / file).write_text((folder / "theirs" / file).read_text())
    torch.save(tensors, tmp_path / "torch" / "pytorch_model.bin")
    oracle.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("torch", "shards"):
        again = convert(tmp_path / name, tmp_path / f"{name}_ours")
        assert torch.equal(again.model(tokens, torch.ones_like(tokens)), expected)


def test_a_checkpoint_without_an_lm_head_embeds_and_refuses_to_predict_residues(tmp_path, proteins, capsys, request):
    oracle = esm(tmp_path / "both")
    oracle.esm.save_pretrained(tmp_path / "theirs")
    session = convert(tmp_path / "theirs", tmp_path / "ours")
    with torch.inference_mode():
        tokens = framed(proteins[0])
        ours = session.model.encoder(tokens, torch.ones_like(tokens)).hidden
        torch.testing.assert_close(ours, oracle.esm(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)
    fasta = str(request.config.rootpath / FASTA)
    command = ["evaluate", "masked-lm", "--model", str(tmp_path / "ours"), "--fasta", fasta]
    assert run(command) == 1
    assert "error: evaluate masked-lm: this model has an untrained masked-LM head" in capsys.readouterr().err
    command = ["predict-contacts", "--model", str(tmp_path / "ours"), "--fasta", fasta, "--method", "jacobian"]
    assert run([*command, "--out", str(tmp_path / "maps")]) == 1
    assert "error: --method jacobian: this model has an untrained" in capsys.readouterr().err


def test_scoring_frames_a_protein_as_its_model_was_trained_and_asks_for_the_same_residues(tmp_path, proteins):
    from protformer.evaluation.masked_lm import IGNORE
    from protformer.inference.batches import masked_batches

    def batch(framing):
        config = ModelConfig(**SIZES_OURS, framing=framing, attention=ExactConfig())
        options = {"rate": 0.3, "training_masking": None, "max_tokens": 1000, "device": torch.device("cpu")}
        (found,) = masked_batches(proteins[:1], model=config, **options)
        return found

    without, framed_batch = batch("eos"), batch("cls_eos")
    assert framed_batch.inputs[0, 0] == CLS
    assert framed_batch.targets[0, 0] == IGNORE
    assert torch.equal(framed_batch.inputs[:, 1:], without.inputs)
    assert torch.equal(framed_batch.targets[:, 1:], without.targets)


SIZES_OURS = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "feed_forward_size": 48}


def test_a_protein_beyond_learned_positions_is_refused_by_name_and_embeds_in_windows(tmp_path, capsys):
    bert(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "long.fa").write_text(f">short\nMKVL\n>long one\n{'MKVLAG' * 10}\n")
    command = ["embed", "--model", str(tmp_path / "ours"), "--fasta", str(tmp_path / "long.fa"), "--quiet"]
    assert run([*command, "--out", str(tmp_path / "e.npy")]) == 1
    told = capsys.readouterr().err
    assert "error: record 'long' makes 62 tokens with the special ones" in told
    assert "--max-length 58 --on-long window" in told
    assert run([*command, "--out", str(tmp_path / "f.npy"), "--max-length", "58", "--on-long", "window"]) == 0
    capsys.readouterr()
    assert run(["evaluate", "masked-lm", *command[1:]]) == 1
    assert "error: record 'long' makes 62 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["favor", "clustered"])
def test_the_report_on_learned_positions_is_of_as_much_as_they_hold(tmp_path, capsys, attention):
    bert(tmp_path / "theirs")
    (tmp_path / "long.fa").write_text(f">short\nMKVL\n>long\n{'MKVLAG' * 10}\n")
    command = ["convert", "--from", str(tmp_path / "theirs"), "--attention", attention, "--num-proteins", "2"]
    assert run([*command, "--out", str(tmp_path / "a")]) == 0
    assert "2 x 58 random residues" in capsys.readouterr().out
    assert run([*command, "--out", str(tmp_path / "b"), "--fasta", str(tmp_path / "long.fa")]) == 0
    assert "58 residues of each at most" in " ".join(capsys.readouterr().out.split())


def test_describe_tells_which_heads_a_model_has(tmp_path, capsys):
    esm(tmp_path / "both").esm.save_pretrained(tmp_path / "encoder")
    for source, heads in {"both": ("trained", "yes"), "encoder": ("untrained", "yes")}.items():
        convert(tmp_path / source, tmp_path / f"our-{source}")
        capsys.readouterr()
        assert run(["describe", str(tmp_path / f"our-{source}"), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["lm_head"], facts["contact_head"]) == heads


def test_a_report_that_cannot_be_made_leaves_no_model(tmp_path, capsys, esm2):
    (tmp_path / "no.fa").write_text("no FASTA\n")
    command = ["convert", "--from", str(esm2[0] / "theirs"), "--out", str(tmp_path / "ours")]
    for fasta in ("none.fa", "no.fa"):
        assert run([*command, "--attention", "favor", "--fasta", str(tmp_path / fasta)]) == 1
        assert fasta in capsys.readouterr().err
        assert not (tmp_path / "ours").exists()
    assert run([*command, "--fasta", str(tmp_path / "none.fa")]) == 2
    assert "exact attention has none" in capsys.readouterr().err


@pytest.mark.parametrize("has_head", [True, False])
def test_contact_files_tell_probabilities_from_ranks(tmp_path, has_head, esm2):
    folder = esm2[0]
    model, description = load_model(folder / "ours", torch.device("cpu"))
    if not has_head:
        model.contact_head = None
        description = replace(description, model=replace(description.model, contact_head=False))
        model.config = description.model
    save_model(tmp_path / "model", model, description)
    (tmp_path / "a.fa").write_text(">a\nMKVLAAGIVGKLLENGS\n")
    command = ["predict-contacts", "--model", str(tmp_path / "model"), "--fasta", str(tmp_path / "a.fa"), "--quiet"]
    formats = [word for name in ("npz", "rr") for word in ("--format", name)]
    assert run([*command, "--out", str(tmp_path / "maps"), *formats]) == 0
    said = "are probabilities, of the model's contact head" if has_head else "rank the pairs and are no probabilities"
    assert f"; scores {said}\n" in (tmp_path / "maps" / "a.rr").read_text()
    with np.load(tmp_path / "maps" / "a.npz") as arrays:
        assert json.loads(str(arrays["provenance"]))["scores"] == said
        assert np.array_equal(arrays["contacts"], arrays["contacts"].T)


def test_favor_conversion_keeps_the_weights_and_reports_on_every_layer(tmp_path, capsys, request, esm2):
    folder, _, session = esm2
    fasta = str(request.config.rootpath / FASTA)
    command = ["convert", "--from", str(folder / "theirs"), "--out", str(tmp_path / "favor"), "--attention", "favor"]
    set_features = ["--set", "model.attention.num_features=64"]
    assert run([*command, *set_features, "--fasta", fasta, "--num-proteins", "1"]) == 0
    told = capsys.readouterr()
    assert "Readiness for FAVOR+, on the first 1 proteins" in told.out
    assert "64" in told.out
    favor = open_session(tmp_path / "favor", device="cpu", precision="fp32").model
    assert favor.config.attention.num_features == 64
    ours = dict(session.model.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in favor.named_parameters())
    generalized = [*command[:4], str(tmp_path / "generalized"), "--attention", "generalized"]
    assert run(generalized) == 0
    assert "no estimate of softmax attention" in capsys.readouterr().err
    assert run([*command[:4], str(tmp_path / "none"), "--set", "model.num_layers=3"]) == 1
    assert "only model.exact_layers and fields of model.attention" in capsys.readouterr().err
    clustered = [*command[:4], str(tmp_path / "clustered"), "--attention", "clustered", "--num-proteins", "1"]
    assert run([*clustered, "--set", "model.exact_layers=[1]"]) == 0
    assert "Distance from exact attention, on 1 x 512 random residues" in capsys.readouterr().out
    config = open_session(tmp_path / "clustered", device="cpu", precision="fp32").model.config
    assert (config.attention.kind, config.exact_layers) == ("clustered", (1,))
    wrong = [*clustered[:4], str(tmp_path / "wrong"), "--attention", "clustered"]
    assert run([*wrong, "--set", "model.exact_layers=[9]"]) == 1
    assert "model.exact_layers: [9] is not allowed" in capsys.readouterr().err


def test_export_is_loaded_by_transformers_with_equal_outputs_and_converts_back_exactly(tmp_path, esm2, proteins):
    folder, oracle, session = esm2
    out = tmp_path / "hf"
    assert run(["export", "--model", str(folder / "ours"), "--out", str(out), "--quiet"]) == 0
    again, report = EsmForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = EsmTokenizer.from_pretrained(out)
    tokens = tokenizer(proteins[0].sequence, return_tensors="pt")["input_ids"]
    assert torch.equal(tokens, framed(proteins[0]))
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, oracle(tokens).logits)
    ours = session.model(tokens, torch.ones_like(tokens))
    torch.testing.assert_close(again(tokens).logits, ours, rtol=1e-4, atol=1e-4)
    converted = convert(out, tmp_path / "back").model.state_dict()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in session.model.state_dict().items())
    card = (out / "README.md").read_text()
    assert "EsmForMaskedLM.from_pretrained" in card
    assert "theirs (ESM)" in card


def test_export_keeps_rounded_frequencies_and_a_missing_lm_head(tmp_path, proteins):
    oracle = esm(tmp_path / "both")
    oracle.esm.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("inv_freq"))
    tensors[name] = tensors[name].half().float()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    session = convert(tmp_path / "theirs", tmp_path / "ours")
    assert run(["export", "--model", str(tmp_path / "ours"), "--out", str(tmp_path / "hf"), "--quiet"]) == 0
    again = EsmModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    tokens = framed(proteins[0]).repeat(1, 40)
    with torch.inference_mode():
        ours = session.model.encoder(tokens, torch.ones_like(tokens)).hidden
        torch.testing.assert_close(ours, again(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_export_refuses_what_transformers_esm_cannot_compute_and_a_folder_in_use(tmp_path, esm2, capsys):
    folder, *_ = esm2
    bert(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "bert")
    assert run(["export", "--model", str(tmp_path / "bert"), "--out", str(tmp_path / "hf")]) == 1
    assert "error: model.norm is 'post': transformers' ESM" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert run(["export", "--model", str(folder / "ours"), "--out", str(tmp_path / "theirs")]) == 1
    assert "exists already" in capsys.readouterr().err


def drop(name):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


def add(name, *shape):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: torch.zeros(shape)}, folder / "model.safetensors")

    return damage


def change(**changes):
    return lambda folder: edit_config(folder, **changes)


def write(file, content):
    return lambda folder: (folder / file).write_text(content)


def remove(file):
    return lambda folder: (folder / file).unlink()


def untie(folder):
    add("lm_head.decoder.weight", 33, 32)(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("esm.encoder.layer.1.output.dense.bias"), "esm.encoder.layer.1.output.dense.bias is missing"),
        (add("esm.encoder.layer.1.adapter.weight", 3, 3), "1 tensors of the encoder have no place in the ESM layout"),
        (add("esm.encoder.layer.0.intermediate.dense.weight", 5, 32), "is (5, 32), expected (48, 32)"),
        (untie, "lm_head.decoder.weight is not tied to the embedding"),
        (change(model_type="t5"), "model_type 't5' is not known; expected one of esm, bert, roberta"),
        (change(model_type=None), "config.json has no model_type; add the one it is: esm, bert, roberta"),
        (change(hidden_act="relu"), "hidden_act 'relu' cannot be converted, only 'gelu'"),
        (change(position_embedding_type="relative_key"), "position_embedding_type 'relative_key' is not known"),
        (change(num_hidden_layers="two"), "num_hidden_layers is 'two', not a whole number"),
        (change(hidden_size=30), "model.hidden_size: 30 is not allowed"),
        (change(vocab_size=40), "vocab_size is 40, and esm.embeddings.word_embeddings.weight has 33 rows"),
        (write("vocab.txt", "\n".join(["<cls>", "<pad>", "AL", "GV"])), "it has 2 other tokens, such as 'AL', 'GV'"),
        (write("vocab.txt", "\n".join(TOKENS[:20])), "the vocabulary lacks <mask>, C, H, M, W"),
        (write("config.json", "{"), "config.json: not JSON"),
        (remove("config.json"), "no config.json"),
        (remove("model.safetensors"), "no weights here"),
        (write("model.safetensors", "nonsense"), "cannot be read as safetensors"),
    ],
)
def test_what_cannot_be_converted_is_one_line_that_names_it(tmp_path, esm2, capsys, damage, message):
    source = tmp_path / "theirs"
    source.mkdir()
    for file in (esm2[0] / "theirs").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    damage(source)
    capsys.readouterr()
    assert run(["convert", "--from", str(source), "--out", str(tmp_path / "ours")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "ours").exists()


def test_heads_that_are_left_out_are_named_and_not_those_that_are_kept(tmp_path, capsys):
    bert(tmp_path / "theirs")
    for name in ("cls.species.weight", "cls.chain.layers.0.weight", "classifier.weight"):
        add(name, 3, 32)(tmp_path / "theirs")
    assert run(["convert", "--from", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    told = capsys.readouterr().err
    assert "note: left out, as no part of the language model: classifier, cls.chain, cls.species\n" in told


def test_a_bert_without_a_vocabulary_is_refused(tmp_path, capsys):
    bert(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.txt").unlink()
    assert run(["convert", "--from", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 1
    assert "no vocabulary (vocab.txt, vocab.json or tokenizer.json)" in capsys.readouterr().err


def test_a_hub_id_needs_huggingface_hub_and_a_wrong_path_is_no_hub_id(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["convert", "--from", "no/such/folder", "--out", "ours"]) == 1
    assert "error: --from no/such/folder: neither a folder nor a hub id" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert run(["convert", "--from", "facebook/esm2_t6_8M_UR50D", "--out", "ours"]) == 1
    assert "downloading needs huggingface_hub" in capsys.readouterr().err


def test_whatever_the_hub_library_raises_is_one_line(capsys, tmp_path, monkeypatch):
    class Hub:
        def list_repo_files(self, hub_id):
            raise RuntimeError("no route\nto host")  # as of an HTTP library that is not known here

    library = types.SimpleNamespace(HfApi=Hub, snapshot_download=None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    assert run(["convert", "--from", "models/nope", "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert (
        "error: --from models/nope: there is no such folder, and it cannot be had from the hub (no route to" in message
    )
    assert message.count("\n") == 1
