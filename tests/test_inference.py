"""Embeddings and contacts are of whole proteins, independent of company, and in the order of the input."""

import itertools
import json
import shutil
import threading
import time
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from small_model import write_model

from protformer import device
from protformer.alphabet import EOS, STANDARD_RESIDUES, TOKENS
from protformer.attention import head_shares, linear
from protformer.cli import run
from protformer.config import ExactConfig, FavorConfig
from protformer.corpus.fasta import SequenceRecord, read_fasta
from protformer.errors import ConfigError, InputError
from protformer.inference import batches, contact_maps
from protformer.inference.batches import BATCHES_IN_CHUNK
from protformer.inference.contacts import predict_contacts
from protformer.inference.embed import LengthLimit, LengthReport, embed, resolve_layer
from protformer.inference.hdf5_embeddings import escape_id
from protformer.inference.session import open_session

LENGTHS = [30, 7, 64, 1, 90, 30]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "favor", FavorConfig(num_features=8))


@pytest.fixture(scope="module")
def session(model):
    return open_session(model, device="cpu", precision="auto")


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "proteins.fa"
    lines = [f">p/{i} words\n{''.join(rng.choice(list(STANDARD_RESIDUES), n))}\n" for i, n in enumerate(LENGTHS)]
    path.write_text("".join(lines))
    return path


def embeddings(session, records, *, limit=None, batch_tokens=1000, layer=2, report=None):
    return list(
        embed(
            session,
            records,
            per="both",
            layer=layer,
            limit=limit or LengthLimit(),
            report=report or LengthReport(),
            batch_tokens=batch_tokens,
        )
    )


def naive_states(session, record):
    tokens = torch.tensor([[*record.tokens, EOS]])
    with torch.no_grad():
        return session.model.encoder(tokens, torch.ones_like(tokens)).hidden[0, :-1].numpy()


@pytest.mark.parametrize("packed", [("cpu",), ()], ids=["packed", "padded"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_embeddings_are_those_of_each_protein_alone_in_input_order(session, fasta, batch_tokens, packed, monkeypatch):
    monkeypatch.setattr(batches, "PACKED", packed)
    records = list(read_fasta(fasta))
    found = embeddings(session, records, batch_tokens=batch_tokens)
    assert [(e.id, e.length) for e in found] == [(r.id, len(r)) for r in records]
    for embedding, record in zip(found, records, strict=True):
        expected = naive_states(session, record)
        np.testing.assert_allclose(embedding.residue, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(embedding.protein, expected.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_batches_on_a_cpu_hold_at_most_as_many_tokens_as_stay_in_the_caches(session):
    assert shapes(session, [99] * 60, 1000) == [(1, 1000)] * 6
    assert shapes(session, [99] * 60, 16_384) == [(1, 2000)] * 3


def test_proteins_share_a_row_on_cpus_and_are_padded_elsewhere(session, monkeypatch):
    assert shapes(session, [10, 3, 90, 9], 24) == [(1, 91), (1, 21), (1, 4)]
    monkeypatch.setattr(batches, "PACKED", ())
    assert shapes(session, [10, 3, 90, 9], 24) == [(1, 91), (2, 11), (1, 4)]
    assert shapes(session, [10, 3, 90, 9], 33) == [(1, 91), (3, 11)]


def shapes(session, lengths, max_tokens):
    records = [SequenceRecord(id=str(n), header="", tokens=bytes([5] * n), line=1) for n in lengths]
    config, device = session.model.config, session.device
    found = batches.length_sorted_batches(records, max_tokens=max_tokens, model=config, device=device)
    return [tuple(batch.tokens.shape) for batch in found]


def test_batches_go_to_threads_and_give_the_same(session, fasta):
    records = list(read_fasta(fasta))
    expected = embeddings(session, records, batch_tokens=10)
    before, taken = torch.get_num_threads(), {}
    meeting = threading.Barrier(3, timeout=30)  # nobody begins unless all three are there

    def begin(*_):
        if threading.get_ident() not in taken:
            taken[threading.get_ident()] = torch.get_num_threads()
            meeting.wait()

    hook = session.model.encoder.register_forward_pre_hook(begin)
    torch.set_num_threads(3)
    try:
        found = embeddings(session, records * 20, batch_tokens=128)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
        hook.remove()
    assert list(taken.values()) == [1, 1, 1]
    assert len(found) == 20 * len(expected)
    for embedding, alone in zip(found, expected * 20, strict=True):
        np.testing.assert_allclose(embedding.residue, alone.residue, rtol=1e-4, atol=1e-5)


def test_batches_at_once_share_their_heads_among_the_threads_of_each(session, fasta, monkeypatch):
    records, shares = list(read_fasta(fasta)), []
    expected = embeddings(session, records, batch_tokens=10)

    def in_threads(tasks):
        shares.append((len(tasks), torch.get_num_threads()))
        return device.in_threads(tasks)

    monkeypatch.setattr(linear, "in_threads", in_threads)
    monkeypatch.setattr(head_shares, "LEAST_FEATURES", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = embeddings(session, records, batch_tokens=140)
    finally:
        torch.set_num_threads(before)
    assert shares == [(2, 2)] * 4  # two batches, two layers
    for embedding, alone in zip(found, expected, strict=True):
        np.testing.assert_allclose(embedding.residue, alone.residue, rtol=1e-4, atol=1e-5)


def test_an_error_in_one_batch_ends_the_others_and_reaches_the_caller(session, fasta):
    records, taken, numbers = list(read_fasta(fasta)) * 20, [], itertools.count()

    def fail_at_third(*_):
        number = next(numbers)  # each is given to one thread alone
        taken.append(number)
        if number == 2:
            raise MemoryError("no room")
        if number > 2:
            time.sleep(0.2)  # the one that failed has time to end the others

    hook = session.model.encoder.register_forward_pre_hook(fail_at_third)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match="no room"):
            embeddings(session, records, batch_tokens=128)
    finally:
        torch.set_num_threads(before)
        hook.remove()
    assert len(taken) < 10  # of 36; the other thread may have been at one already


def test_proteins_that_exceed_a_batch_have_all_threads_for_themselves(session, fasta):
    records, taken = list(read_fasta(fasta)), []
    hook = session.model.encoder.register_forward_pre_hook(
        lambda _, inputs: taken.append((inputs[0].numel(), torch.get_num_threads()))
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        embeddings(session, records, batch_tokens=40)
    finally:
        torch.set_num_threads(before)
        hook.remove()
    assert [threads for tokens, threads in taken if tokens > 40] == [2, 2]
    assert {threads for tokens, threads in taken if tokens <= 40} == {1}


@pytest.mark.parametrize(("kind", "precise"), [(ExactConfig(), True), (FavorConfig(num_features=8), False)])
def test_in_bf16_on_cpus_sharp_attention_stays_in_float32(tmp_path, fasta, kind, precise):
    path = write_model(tmp_path / "m", kind)
    in_float32, in_bf16 = (open_session(path, device="cpu", precision=name) for name in ("fp32", "bf16"))
    tokens = torch.tensor([[*list(read_fasta(fasta))[2].tokens, EOS]])
    inputs = (tokens, torch.ones_like(tokens))
    seen = {}
    block = in_bf16.model.encoder.blocks[0]
    for name in ("attention", "attention_output", "feed_forward_input", "feed_forward_output"):
        of_name = partial(lambda name, _module, _inputs, output: seen.update({name: output.dtype}), name)
        getattr(block, name).register_forward_hook(of_name)
    with torch.inference_mode():
        expected = next(in_float32.model.encoder.attention_inputs(*inputs))
        with in_bf16.autocast():
            found = next(in_bf16.model.encoder.attention_inputs(*inputs))
            in_bf16.model.encoder(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) == precise
    of_attention = torch.float32 if precise else torch.bfloat16
    assert seen["attention"] == seen["attention_output"] == of_attention
    assert seen["feed_forward_input"] == seen["feed_forward_output"] == torch.bfloat16
    assert torch.is_autocast_enabled("cpu") is False
    with in_bf16.autocast():  # training and its gradients are as ever, and so is validation
        found = [*block.queries_keys_values(torch.ones(1, 3, 16, requires_grad=True), None)]
        with torch.no_grad():
            found += block.queries_keys_values(torch.ones(1, 3, 16), None)
    assert {x.dtype for x in found} == {torch.bfloat16}


def test_a_unidirectional_model_embeds_each_residue_from_those_before_and_itself(tmp_path, fasta):
    session = open_session(write_model(tmp_path / "m", ExactConfig(), "unidirectional"), device="cpu", precision="auto")
    records = list(read_fasta(fasta))
    whole = embeddings(session, records[2:3])[0].residue
    part = embeddings(session, [type(records[2])(id="x", header="x", line=1, tokens=records[2].tokens[:20])])[0].residue
    assert whole.shape == (64, 16)
    np.testing.assert_allclose(part, whole[:20], rtol=1e-4, atol=1e-5)
    assert not np.allclose(whole[5], embeddings(session, records[4:5])[0].residue[5])


def test_a_long_protein_is_refused_cut_skipped_or_windowed_as_asked_and_counted(session, fasta):
    records = list(read_fasta(fasta))
    with pytest.raises(InputError, match=r"record 'p/2' \(line 5\) has 64 residues, above --max-length 40"):
        embeddings(session, records, limit=LengthLimit(max_length=40))
    report = LengthReport()
    cut = embeddings(session, records, limit=LengthLimit(max_length=40, on_long="truncate"), report=report)
    assert [e.truncated for e in cut] == [False, False, True, False, True, False]
    assert [len(e.residue) for e in cut] == [30, 7, 40, 1, 40, 30]
    assert [e.length for e in cut] == LENGTHS
    assert report.summary() == "proteins above --max-length: 2 truncated"
    skipped = embeddings(session, records, limit=LengthLimit(max_length=40, on_long="skip"))
    assert [e.id for e in skipped] == ["p/0", "p/1", "p/3", "p/5"]
    windowed = embeddings(session, records, limit=LengthLimit(max_length=40, on_long="window"))
    assert [len(e.residue) for e in windowed] == LENGTHS
    # 64 residues in windows of 40 from 0, 20 and 24: residue 10 is in the first only, residue 30 in all three.
    record = records[2]
    pieces = [
        naive_states(session, type(record)(id="x", header="x", line=1, tokens=record.tokens[s : s + 40]))
        for s in (0, 20, 24)
    ]
    np.testing.assert_allclose(windowed[2].residue[10], pieces[0][10], rtol=1e-4, atol=1e-5)
    mean = (pieces[0][30] + pieces[1][10] + pieces[2][6]) / 3
    np.testing.assert_allclose(windowed[2].residue[30], mean, rtol=1e-4, atol=1e-5)


def test_layers_count_from_both_ends():
    assert [resolve_layer(layer, 6) for layer in (0, 6, -1, -7, 3)] == [0, 6, 6, 0, 3]
    for layer in (7, -8):
        with pytest.raises(ConfigError, match=f"--layer {layer}: this model has layers 0"):
            resolve_layer(layer, 6)


def naive_apc_mean(maps):
    total = np.zeros_like(maps[0])
    for single in maps:
        s = single + single.T
        total += s - s.sum(1, keepdims=True) * s.sum(0, keepdims=True) / s.sum()
    return total / len(maps)


def ranks(matrix):
    upper = matrix[np.triu_indices(len(matrix), 1)]
    return np.argsort(np.argsort(upper))


def test_contacts_rank_pairs_by_the_mean_of_symmetrised_apc_corrected_heads(session, fasta):
    record = next(read_fasta(fasta))
    tokens = torch.tensor([[*record.tokens, EOS]])
    with torch.no_grad():
        layers = list(session.model.encoder.attention_maps(tokens, torch.ones_like(tokens)))
    maps = [head[:-1, :-1].double().numpy() for layer in layers for head in layer[0]]
    contact_map = predict_contacts(session, (record,), method="attention", batch_tokens=1000)
    assert contact_map.contacts.dtype == np.float32
    assert (contact_map.contacts == contact_map.contacts.T).all()
    assert contact_map.contacts.min() == 0.0
    assert contact_map.contacts.max() == 1.0
    assert (np.abs(ranks(contact_map.contacts) - ranks(naive_apc_mean(maps))) <= 2).all()


def test_the_jacobian_is_that_of_single_exchanges_one_at_a_time(session, fasta):
    record = list(read_fasta(fasta))[1]
    amino_acids = [TOKENS.index(letter) for letter in STANDARD_RESIDUES]

    def logits(tokens):
        row = torch.tensor([[*tokens, EOS]])
        with torch.no_grad():
            return session.model(row, torch.ones_like(row))[0, :-1][:, amino_acids].double().numpy()

    length = len(record)
    jacobian = np.zeros((length, 20, length, 20))
    for i in range(length):
        for a, token in enumerate(amino_acids):
            changed = bytearray(record.tokens)
            changed[i] = token
            jacobian[i, a] = logits(changed) - logits(record.tokens)
    for axis in range(4):
        jacobian -= jacobian.mean(axis=axis, keepdims=True)
    jacobian = (jacobian + jacobian.transpose(2, 3, 0, 1)) / 2
    norms = np.sqrt((jacobian**2).sum(axis=(1, 3)))
    np.fill_diagonal(norms, 0)
    scores = norms - norms.sum(1, keepdims=True) * norms.sum(0, keepdims=True) / norms.sum()
    off = ~np.eye(length, dtype=bool)
    expected = (scores - scores[off].min()) / (scores[off].max() - scores[off].min())
    for batch_tokens in (1, 10_000):
        found = predict_contacts(session, (record,), method="jacobian", batch_tokens=batch_tokens).contacts
        np.testing.assert_allclose(found[off], expected[off], atol=2e-3)


def test_a_pair_is_one_row_in_which_the_chains_see_each_other(session, fasta):
    records = list(read_fasta(fasta))
    pair = predict_contacts(session, (records[0], records[1]), method="attention", batch_tokens=1000)
    assert pair.chain_lengths == (30, 7)
    assert pair.sequence == records[0].sequence + records[1].sequence
    assert pair.contacts.shape == (37, 37)
    tokens = torch.tensor([[*records[0].tokens, EOS, *records[1].tokens, EOS]])
    with torch.no_grad():
        layers = list(session.model.encoder.attention_maps(tokens, torch.ones_like(tokens)))
    columns = [*range(30), *range(31, 38)]
    maps = [head[columns][:, columns].double().numpy() for layer in layers for head in layer[0]]
    assert (np.abs(ranks(pair.contacts) - ranks(naive_apc_mean(maps))) <= 2).all()


def test_a_single_residue_has_a_map_of_one_zero(session, fasta):
    single = list(read_fasta(fasta))[3]
    assert predict_contacts(session, (single,), method="attention", batch_tokens=10).contacts.tolist() == [[0.0]]


def test_embed_writes_one_dataset_an_id_and_resumes_where_it_stopped(model, fasta, tmp_path, capsys):
    out = tmp_path / "e.h5"
    command = ["embed", "--model", str(model), "--fasta", str(fasta), "--out", str(out), "--per", "both", "--quiet"]
    assert run(command) == 0
    with h5py.File(out) as file:
        assert file["residue"]["p%2F2"].shape == (64, 16)
        assert file["protein"]["p%2F2"].shape == (16,)
        np.testing.assert_allclose(
            file["residue"]["p%2F2"][()].mean(0), file["protein"]["p%2F2"][()], rtol=1e-3, atol=1e-5
        )
    assert run(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert run([*command, "--resume"]) == 0
    assert "0 proteins embedded (6 were there already)" in capsys.readouterr().out


def test_a_token_store_gives_what_its_fasta_gives(model, fasta, tmp_path, capsys):
    store = tmp_path / "store"
    assert run(["prepare", "--fasta", str(fasta), "--out", str(store), "-q"]) == 0
    vectors = {}
    for name, source in (("store", store), ("fasta", fasta)):
        out = tmp_path / f"{name}.h5"
        assert run(["embed", "--model", str(model), "--fasta", str(source), "--out", str(out), "-q"]) == 0
        with h5py.File(out) as file:
            ids = file["%index"]["id"].asstr()[:].tolist()
            vectors[name] = (ids, [file[escape_id(each)][()].tolist() for each in ids])
    assert vectors["store"] == vectors["fasta"]
    command = ["predict-contacts", "--model", str(model), "--fasta", str(store), "--out", str(tmp_path / "maps"), "-q"]
    assert run([*command, "--ids", "p/1"]) == 0
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["p%2F1.npz"]
    twice = tmp_path / "twice.fa"
    twice.write_text(">a\nMKV\n>a\nMKL\n")
    assert run(["prepare", "--fasta", str(twice), "--out", str(tmp_path / "twice"), "-q"]) == 0
    capsys.readouterr()
    command = ["embed", "--model", str(model), "--fasta", str(tmp_path / "twice"), "-q"]
    assert run([*command, "--out", str(tmp_path / "twice.h5")]) == 1
    assert "duplicate id" in capsys.readouterr().err
    assert run([*command, "--out", str(tmp_path / "twice.h5"), "--on-duplicate", "suffix"]) == 0


def test_predict_contacts_of_pairs_writes_the_block_between_the_chains(model, fasta, tmp_path, capsys):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("p/0\tp/1\t1\n")
    command = [
        "predict-contacts",
        "--model",
        str(model),
        "--fasta",
        str(fasta),
        "--out",
        str(tmp_path / "c"),
        "--quiet",
    ]
    assert run([*command, "--pairs", str(pairs), "--plot", "--format", "npz", "--format", "csv"]) == 0
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [f"p%2F0__p%2F1.{s}" for s in ("csv", "npz", "png")]
    with np.load(tmp_path / "c" / "p%2F0__p%2F1.npz") as arrays:
        assert np.array_equal(arrays["inter_chain"], arrays["contacts"][:30, 30:])
        assert arrays["chain_lengths"].tolist() == [30, 7]
    pairs.write_text("p/0\tnobody\n")
    assert run([*command[:-3], "--out", str(tmp_path / "d"), "--pairs", str(pairs)]) == 1
    assert "nobody" in capsys.readouterr().err


def test_resuming_with_another_sequence_under_an_id_is_refused(model, tmp_path, capsys):
    fasta, out = tmp_path / "p.fa", tmp_path / "e.h5"
    command = ["embed", "--model", str(model), "--fasta", str(fasta), "--out", str(out), "-q"]
    fasta.write_text(">a\nMKVLA\n>b\nMKV\n")
    assert run(command) == 0
    fasta.write_text(">a\nMKVLW\n>b\nMKV\n>c\nMK\n")  # of the same length
    assert run([*command, "--resume"]) == 1
    assert "'a' is in the file with another sequence" in capsys.readouterr().err
    fasta.write_text(">b\nMKV\n>c\nMK\n")
    assert run([*command, "--resume"]) == 0
    assert "1 proteins embedded (2 were there already)" in capsys.readouterr().out


def test_embeddings_come_long_before_all_proteins_are_read(session):
    taken = []

    def records():
        for number in range(1000):
            taken.append(number)
            yield SequenceRecord(id=f"p{number}", header="", tokens=bytes([5] * 10), line=1)

    found = embed(
        session, records(), per="protein", layer=1, limit=LengthLimit(), report=LengthReport(), batch_tokens=20
    )
    next(found)
    assert 2 * BATCHES_IN_CHUNK <= len(taken) < 3 * BATCHES_IN_CHUNK


def test_contact_maps_go_on_where_ctrl_c_stopped_them(model, fasta, tmp_path, capsys, monkeypatch):
    command = ["predict-contacts", "--model", str(model), "--fasta", str(fasta), "--out", str(tmp_path / "maps"), "-q"]
    computed = []

    def stops_at_the_third(session, chains, **options):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(chains[0].id)
        return predict_contacts(session, chains, **options)

    monkeypatch.setattr(contact_maps, "predict_contacts", stops_at_the_third)
    assert run(command) == 130
    assert "interrupted; 2 contact maps are in" in capsys.readouterr().err
    monkeypatch.setattr(contact_maps, "predict_contacts", predict_contacts)
    assert run(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert run([*command, "--resume"]) == 0
    assert "4 contact maps (2 were there already)" in capsys.readouterr().out


def test_contact_maps_that_were_made_otherwise_are_not_kept(model, fasta, tmp_path, capsys):
    command = ["predict-contacts", "--fasta", str(fasta), "--out", str(tmp_path / "maps"), "--resume", "--model"]
    assert run([*command, str(model)]) == 0
    with np.load(tmp_path / "maps" / "p%2F0.npz") as arrays:
        found = json.loads(str(arrays["provenance"]))
    assert (found["model"], found["method"], found["precision"]) == ("favor", "attention", "float32")
    moved = shutil.copytree(model, tmp_path / "moved")
    other = write_model(tmp_path / "other", ExactConfig())
    assert run([*command, str(moved)]) == 0
    capsys.readouterr()
    for options, told in (
        ([str(other)], "was made by model favor with weights_sha256 "),
        ([str(model), "--method", "jacobian"], "with method attention, not jacobian"),
        ([str(model), "--precision", "bf16"], "with precision float32, not bfloat16"),
    ):
        assert run([*command, *options]) == 1
        assert told in capsys.readouterr().err


def test_a_map_that_memory_does_not_hold_is_told_in_one_line(model, fasta, tmp_path, capsys, monkeypatch):
    def asks_for_too_much(session, chains, **options):
        return torch.zeros(1 << 28)  # 1 GiB, which would be granted

    monkeypatch.setattr(device, "_available_bytes", lambda: 1 << 20)
    monkeypatch.setattr(contact_maps, "predict_contacts", asks_for_too_much)
    command = ["predict-contacts", "--model", str(model), "--fasta", str(fasta), "--out", str(tmp_path / "maps"), "-q"]
    assert run(command) == 1
    assert "p/0: a map of 30 residues takes more memory than there is; it grows" in capsys.readouterr().err
