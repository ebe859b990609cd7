"""Chains of known structure are read from each form, and precision is that of its definition, counted by loops."""

import gzip
import json

import numpy as np
import pytest
import torch
from small_model import write_model

from protformer.cli import run
from protformer.config import ExactConfig
from protformer.corpus.structures import read_chains
from protformer.errors import InputError
from protformer.evaluation.contacts import contact_precision, mean_precision

ATOM = "{record:<6}{serial:>5}  {atom:<3} {residue:>3} {chain}{number:>4}    {x:8.3f}{y:8.3f}{z:8.3f}" + (
    "  1.00  0.00          {element:>2}"
)


def pdb(*chains, model=1):
    """Residues as (name, atoms); atoms along x, 3.8 angstrom a residue, C-beta 1.5 above."""
    lines = [f"MODEL     {model}"]
    for chain, residues in chains:
        for number, (name, atoms) in enumerate(residues, start=1):
            for atom in atoms:
                record = "HETATM" if name in ("MSE", "HOH", "CA") else "ATOM"
                place = {"x": 3.8 * number, "y": 1.5 * (atom == "CB"), "z": 0.0}
                element = "O" if name == "HOH" else atom[:1]
                names = {"record": record, "serial": 1, "atom": atom, "residue": name, "chain": chain}
                lines.append(ATOM.format(**names, **place, number=number, element=element))
    return "\n".join([*lines, "ENDMDL", "END", ""])


CHAIN = [("MET", ("N", "CA", "CB")), ("GLY", ("CA",)), ("MSE", ("CA", "CB")), ("LEU", ("CA",)), ("HOH", ("O",))]


def test_a_pdb_file_gives_its_residues_with_the_c_alpha_where_there_is_no_c_beta(tmp_path):
    file = tmp_path / "1abc.pdb.gz"
    file.write_bytes(gzip.compress(pdb(("A", CHAIN), ("B", CHAIN), ("C", CHAIN[:2])).encode()))
    chains = list(read_chains(tmp_path))
    assert [chain.record.id for chain in chains] == ["1abc_A", "1abc_C"]  # B is the same as A
    assert chains[0].record.sequence == "MGML"
    expected = [[3.8, 1.5, 0], [7.6, 0, 0], [11.4, 1.5, 0], [15.2, 0, 0]]
    np.testing.assert_allclose(chains[0].c_beta, expected, atol=1e-3)


def test_an_mmcif_file_gives_what_the_same_pdb_file_gives(tmp_path):
    from Bio.PDB.mmcifio import MMCIFIO
    from Bio.PDB.PDBParser import PDBParser

    (tmp_path / "a.pdb").write_text(pdb(("A", CHAIN[:4])))
    writer = MMCIFIO()
    writer.set_structure(PDBParser(QUIET=True).get_structure("a", str(tmp_path / "a.pdb")))
    writer.save(str(tmp_path / "b.cif"))
    first, second = read_chains(tmp_path)
    assert first.record.sequence == second.record.sequence == "MGML"
    np.testing.assert_allclose(first.c_beta, second.c_beta)


def test_json_lines_give_a_chain_a_line_and_nan_where_nothing_is_resolved(tmp_path):
    file = tmp_path / "chains.jsonl.gz"
    lines = [{"id": "x", "seq": "MKV", "cb": [[0, 0, 0], None, [1, 2, 3]]}, {"id": "y", "seq": "A", "cb": [[0, 0, 1]]}]
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    first, second = read_chains(file)
    assert (first.record.id, first.record.sequence, second.record.id) == ("x", "MKV", "y")
    assert np.isnan(first.c_beta).any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1: not a chain with id, seq and cb"),
        ("a.jsonl", '{"id": "x", "seq": "MK"}', "not a chain with id, seq and cb (no 'cb')"),
        ("a.jsonl", '{"id": "x", "seq": "MK", "cb": [[0, 0, 0]]}', "line 1: 'x' has 2 residues and 1 C-betas"),
        ("a.jsonl", '{"id": "x", "seq": "M1", "cb": [[0,0,0],[0,0,0]]}', "line 1: 'x' has no sequence of residue"),
        ("a.jsonl", "\n", "no protein chain here"),
        ("a.pdb", "nothing", "no protein chain here"),
        ("a.txt", "nothing", "no protein chain here"),
    ],
)
def test_what_is_no_structure_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        list(read_chains(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def precision_by_loops(scores, places, smallest, largest, count):
    pairs = []
    for i in range(len(scores)):
        for j in range(i + smallest, min(len(scores), i + largest + 1)):
            if np.isfinite(places[i]).all() and np.isfinite(places[j]).all():
                pairs.append((-scores[i, j], i, j))
    best = sorted(pairs)[:count]
    near = [sum((places[i] - places[j]) ** 2) ** 0.5 < 8 for _, i, j in best]
    return sum(near) / len(near), sum(sum((places[i] - places[j]) ** 2) ** 0.5 < 8 for _, i, j in pairs) / len(pairs)


def test_precision_is_the_share_of_contacts_among_the_strongest_pairs_of_a_range():
    rng = np.random.default_rng(0)
    length = 53
    places = np.cumsum(rng.normal(size=(length, 3)) * 2.5, axis=0).astype(np.float32)
    places[[5, 30]] = np.nan
    scores = rng.random((length, length))
    found = contact_precision(scores + scores.T, places)
    for name, (smallest, largest) in {"short": (6, 11), "medium": (12, 23), "long": (24, 999)}.items():
        for share, count in {"P@L": 53, "P@L/2": 26, "P@L/5": 10}.items():
            expected, random = precision_by_loops(scores + scores.T, places, smallest, largest, count)
            assert found[name].precisions[share] == pytest.approx(expected)
            assert found[name].random == pytest.approx(random)


def test_means_are_over_the_chains_that_have_the_range():
    places = np.zeros((30, 3), dtype=np.float32)
    long = contact_precision(np.zeros((30, 30)), places)
    short = contact_precision(np.zeros((10, 10)), places[:10])
    assert set(short) == {"short"}
    means = mean_precision([long, short])
    assert set(means) == {"long", "medium", "short"}
    assert means["long"] == {"P@L": 1.0, "P@L/2": 1.0, "P@L/5": 1.0, "random_P@L": 1.0}
    none = dict.fromkeys(means["long"])
    assert mean_precision([short]) == {"long": none, "medium": none, "short": means["short"]}


def test_evaluate_contacts_prints_each_range_as_table_and_json(tmp_path, capsys):
    model = write_model(tmp_path / "model", ExactConfig())
    rng = np.random.default_rng(0)
    chains = [
        {"id": str(n), "seq": "MKVLAG" * 6, "cb": np.cumsum(rng.normal(size=(36, 3)), 0).tolist()} for n in range(3)
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, chains)))
    command = ["evaluate", "contacts", "--model", str(model), "--structures", str(tmp_path / "s.jsonl"), "--quiet"]
    assert run([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_chains"] == 3
    assert set(figures) == {"long", "medium", "short", "num_chains"}
    assert set(figures["long"]) == {"P@L", "P@L/2", "P@L/5", "random_P@L"}
    assert run(command) == 0
    assert "num_chains 3" in capsys.readouterr().out
    short = chains[0] | {"seq": "MKVLAG", "cb": chains[0]["cb"][:6]}
    (tmp_path / "s.jsonl").write_text(json.dumps(short))
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["long"] == dict.fromkeys(figures["long"])
    assert run(command) == 0
    assert f"long    {'-':>12}" in capsys.readouterr().out


def test_a_contact_head_is_a_logistic_regression_on_corrected_maps():
    from protformer.inference.contact_scores import apc, symmetrize
    from protformer.model.contact_head import ContactHead

    torch.manual_seed(0)
    head = ContactHead(num_layers=2, num_heads=3)
    head.weight.copy_(torch.randn(2, 3))
    head.bias.fill_(-1.0)
    maps = torch.rand(2, 3, 5, 5)
    expected = torch.full((5, 5), -1.0)
    for layer in range(2):
        for number in range(3):
            expected = expected + head.weight[layer, number] * apc(symmetrize(maps[layer, number]))
    torch.testing.assert_close(head(iter(maps)), expected.sigmoid())
    assert not any(parameter.requires_grad for parameter in head.parameters())
