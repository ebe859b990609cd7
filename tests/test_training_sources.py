"""Training on weighted sources, clusters and pairs: told what was done, resumed bit for bit, refused in one line."""

import json

import numpy as np
import pytest
from small_runs import arguments, assert_same_run, fails_with, metrics, weights
from small_stores import write_fasta

from protformer.cli import run
from protformer.inference.describe import describe

# A machine for tests may have fewer cores than workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

LENGTHS = [int(length) for length in np.random.default_rng(0).integers(5, 150, 80)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_fasta(folder / "a.fa", LENGTHS, seed=0)
    write_fasta(folder / "b.fa", LENGTHS[:20], seed=1, names=[f"q{i}" for i in range(20)])
    (folder / "clusters.tsv").write_text("".join(f"p{i // 5 * 5}\tp{i}\n" for i in range(60)))
    (folder / "pairs.tsv").write_text("".join(f"p{i}\tp{i + 40}\t{int(i % 4 > 0)}\n" for i in range(40)))
    return folder


def told(capsys):
    captured = capsys.readouterr()
    return captured.err + captured.out


def train(folder, out, *extra, **changes):
    command = arguments(folder / "a.fa", out, *extra, **changes)
    command.remove("--quiet")
    return command


CASES = {
    "weights": (["--fasta", "b.fa"], {"data__source_weights": "[1, 2]"}, "held out for validation"),
    "clusters": (["--clusters", "clusters.tsv"], {}, "proteins that the table does not list are clusters of their own"),
    "isolated clusters": (
        ["--clusters", "clusters.tsv"],
        {"data__packing": "isolate"},
        "are longer than a row of 64 tokens: a random crop in each epoch",
    ),
    "pairs": (["--pairs", "pairs.tsv"], {"data__max_residues": 128}, "with a held-out protein"),
    "isolated pairs": (
        ["--pairs", "pairs.tsv"],
        {"data__packing": "isolate", "data__on_long": "skip", "data__max_residues": 128},
        "are longer than a row of 128 tokens and are left out",
    ),
    "spans and workers": ([], {"data__masking__span_mean_length": 3, "data__num_workers": 2}, "held out"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_says_what_it_draws_from_and_resumes_bit_for_bit(folder, tmp_path, capsys, case):
    words, changes, line = CASES[case]
    extra = [str(folder / word) if "." in word else word for word in words]
    assert run(train(folder, tmp_path / "whole", *extra, training__max_steps=4, **changes)) == 0
    messages = told(capsys)
    assert line in messages
    assert "% full)" in messages
    assert run(train(folder, tmp_path / "parts", *extra, "--max-steps", 1, training__max_steps=4, **changes)) == 0
    assert run([*train(folder, tmp_path / "parts", *extra, training__max_steps=4, **changes), "--resume"]) == 0
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert metrics(tmp_path / "whole")[-1] == metrics(tmp_path / "parts")[-1]
    filled = describe(tmp_path / "whole")["fill_rate"]
    assert f"rows {filled:.1%} full)" in messages


def test_the_number_of_workers_changes_nothing_and_may_change_on_a_resume(folder, tmp_path):
    runs = [tmp_path / str(number) for number in (0, 2)]
    for number, out in zip((0, 2), runs, strict=True):
        assert run(train(folder, out, "--max-steps", 2, data__num_workers=number)) == 0
    assert_same_run(*runs)
    assert run([*train(folder, runs[0], "--max-steps", 3, data__num_workers=1), "--resume"]) == 0


def test_prepared_stores_may_be_several(folder, tmp_path):
    for name in ("a", "b"):
        assert run(["prepare", "--fasta", str(folder / f"{name}.fa"), "--out", str(tmp_path / name), "--quiet"]) == 0
    out = tmp_path / "run"
    command = train(tmp_path, out, "--fasta", tmp_path / "b", "--val-fasta", tmp_path / "b", "--max-steps", 1)
    command[command.index(str(tmp_path / "a.fa"))] = str(tmp_path / "a")
    assert run(command) == 0
    assert len(json.loads((out / "stores.json").read_text())["train"]) == 2
    assert run([*command, "--resume", "--max-steps", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ([], {"data__source_weights": "[1, 2]"}, "data.source_weights: 2 weights for 1 --fasta"),
        ([], {"data__source_weights": "[0]"}, "data.source_weights[0]: 0.0 is not allowed; it must be above 0"),
        (["--clusters", "clusters.tsv", "--pairs", "pairs.tsv"], {}, "--clusters and --pairs"),
        (
            ["--fasta", "b.fa", "--clusters", "clusters.tsv"],
            {"data__source_weights": "[1, 2]"},
            "--clusters: goes with one token store",
        ),
        (["--pairs", "pairs.tsv"], {"data__on_long": "windows"}, "would part the proteins of a pair"),
        (["--pairs", "-"], {}, "--pairs: must be a file"),
        (["--clusters", "missing.tsv"], {}, "missing.tsv: no such file"),
        (["--pairs", "a.fa"], {}, "a.fa: line 1: expected 2 or 3 columns"),
        (["--pairs", "pairs.tsv"], {"data__on_long": "skip"}, "no pair fits"),
        ([], {"data__on_long": "skip", "data__packing": "isolate", "data__max_residues": 8}, None),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(folder, tmp_path, capsys, words, changes, message):
    extra = [str(folder / word) if "." in word else word for word in words]
    out = tmp_path / "run"
    if message is None:
        assert run(train(folder, out, "--max-steps", 1, **changes)) == 0
        return
    if message == "no pair fits":
        (tmp_path / "pairs.tsv").write_text("p0\tp0\n")
        message, extra = "every pair is longer than data.max_residues", ["--pairs", str(tmp_path / "pairs.tsv")]
        changes = changes | {"data__max_residues": 8, "data__validation_fraction": 0}
    assert message in fails_with(capsys, train(folder, out, *extra, **changes))
    assert not out.exists()


def test_a_resume_knows_its_tables_again(folder, tmp_path, capsys):
    out, table = tmp_path / "run", tmp_path / "clusters.tsv"
    table.write_text((folder / "clusters.tsv").read_text())
    assert run(train(folder, out, "--clusters", table, "--max-steps", 1)) == 0
    assert run([*train(folder, out, "--max-steps", 2), "--resume"]) == 0
    table.write_text("p0\tp1\n")
    command = [*train(folder, out, "--clusters", table), "--resume"]
    assert "is not the table that the run began with" in fails_with(capsys, command)
    command = [*train(folder, out, "--pairs", folder / "pairs.tsv"), "--resume"]
    assert "the run began without --pairs" in fails_with(capsys, command)
