"""What scripts may rely on: exit codes, streams, one line for a mistake, help that answers."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
from small_model import write_model

from protformer import __version__
from protformer.cli import COMMANDS, run
from protformer.config import load_run_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "favor", load_run_config("tiny").model.attention)


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "proteins.fa"
    path.write_text("".join(f">p{i}\n{'MKVLACDEFG' * 9}\n" for i in range(4)))
    return path


def error_line(capsys, command, code=1):
    assert run([str(word) for word in command]) == code
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["evaluate", "masked-lm"]], ids=" ".join)
def test_every_command_explains_itself(capsys, command):
    assert run([*command, "--help"]) == 0
    assert "Usage: protformer" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    assert run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [["nonsense"], ["train"], ["embed", "--per", "atom"], ["train", "--fasta", "x", "--out", "y", "--max-steps", "0"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(capsys, command):
    assert run(command) == 2
    assert "Error: " in capsys.readouterr().err


def test_a_missing_input_is_a_users_error_not_wrong_usage(capsys, model, tmp_path):
    out = tmp_path / "e.h5"
    line = error_line(capsys, ["embed", "--model", model, "--fasta", tmp_path / "none.fa", "--out", out, "--quiet"])
    assert "none.fa" in line
    assert not out.exists()


def test_a_missing_model_is_told_before_sequences_are_read(capsys, tmp_path):
    for command in (
        ["embed", "--out", tmp_path / "e.h5"],
        ["predict-contacts", "--out", tmp_path / "c"],
        ["evaluate", "masked-lm"],
    ):
        line = error_line(capsys, [*command, "--model", tmp_path / "none", "--fasta", tmp_path / "none.fa", "--quiet"])
        assert "no such model folder" in line


@pytest.mark.parametrize("name", ["e.txt", "e", "no/such/folder/e.h5"])
def test_an_output_that_cannot_be_written_is_told_before_the_model_runs(capsys, model, fasta, tmp_path, name):
    line = error_line(capsys, ["embed", "--model", model, "--fasta", fasta, "--out", tmp_path / name, "--quiet"])
    assert "suffix" in line or "does not exist" in line


def test_a_duplicate_id_is_an_error_until_told_what_to_do(capsys, model, tmp_path):
    fasta = tmp_path / "twice.fa"
    fasta.write_text(">a\nMKV\n>a\nMKL\n")
    command = ["embed", "--model", model, "--fasta", fasta, "--quiet"]
    assert "'a'" in error_line(capsys, [*command, "--out", tmp_path / "e.h5"])
    for choice, count in (("suffix", 2), ("first", 1)):
        out = tmp_path / f"{choice}.h5"
        assert run([str(w) for w in (*command, "--out", out, "--on-duplicate", choice)]) == 0
        assert f"{count} proteins embedded" in capsys.readouterr().out


def test_an_input_error_before_the_first_protein_leaves_no_file(capsys, model, tmp_path):
    fasta, out = tmp_path / "twice.fa", tmp_path / "e.h5"
    fasta.write_text(">a\nMKV\n>a\nMKL\n")
    command = ["embed", "--model", model, "--fasta", fasta, "--out", out, "--quiet"]
    assert "kept" not in error_line(capsys, command)
    assert [path.name for path in tmp_path.iterdir()] == ["twice.fa"]
    assert run([str(word) for word in (*command, "--on-duplicate", "suffix")]) == 0


def test_changed_letters_are_counted_once_on_stderr(capsys, model, tmp_path):
    fasta = tmp_path / "odd.fa"
    fasta.write_text(">a\nmkJv*\n>b\nM-K.L\n")
    out = tmp_path / "e.h5"
    assert run(["embed", "--model", str(model), "--fasta", str(fasta), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("J read as X") == 1
    assert "2 gap characters removed" in captured.err
    assert "2 proteins embedded" in captured.out


def test_standard_input_is_a_fasta_file(capsys, model, fasta, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(fasta.read_bytes())))
    out = tmp_path / "e.h5"
    assert run(["embed", "--model", str(model), "--fasta", "-", "--out", str(out), "--quiet"]) == 0
    assert "4 proteins embedded" in capsys.readouterr().out


def test_evaluate_prints_one_json_object_with_the_promised_names(capsys, model, fasta):
    command = ["evaluate", "masked-lm", "--model", str(model), "--fasta", str(fasta), "--json", "--quiet"]
    assert run(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"perplexity", "accuracy", "num_masked", "unigram_perplexity", "unigram_accuracy"} <= figures.keys()
    assert run([*command, "--masking", "bert"]) == 0
    assert {"copying_perplexity", "copying_accuracy"} <= json.loads(capsys.readouterr().out).keys()


def test_a_unidirectional_model_is_evaluated_on_every_residue_and_masks_nothing(capsys, fasta, tmp_path):
    model = write_model(tmp_path / "m", load_run_config("tiny").model.attention, "unidirectional")
    command = ["evaluate", "masked-lm", "--model", str(model), "--fasta", str(fasta), "--json", "--quiet"]
    assert run(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_masked"] == 4 * 90
    assert figures["task"] == "next residues"
    assert "masks nothing" in error_line(capsys, [*command, "--masking", "bert"])


def test_describe_knows_every_kind_of_file_that_protformer_makes(capsys, model, fasta, tmp_path):
    assert run(["prepare", "--fasta", str(fasta), "--out", str(tmp_path / "store"), "--quiet"]) == 0
    for suffix in ("h5", "npy", "parquet", "pt"):
        out = str(tmp_path / f"e.{suffix}")
        assert run(["embed", "--model", str(model), "--fasta", str(fasta), "--out", out, "--quiet"]) == 0
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("p2\tp1\n")
    command = ["predict-contacts", "--model", model, "--fasta", fasta, "--pairs", pairs, "--out", tmp_path, "--format"]
    assert run([str(word) for word in (*command, "npz", "--format", "rr", "--quiet")]) == 0
    capsys.readouterr()
    kinds = {}
    files = (*(f"e.{suffix}" for suffix in ("h5", "npy", "parquet", "pt")), "p2__p1.npz")
    for path in (tmp_path / "store", model, *(tmp_path / name for name in files)):
        assert run(["describe", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        kinds[facts["kind"]] = facts
    assert set(kinds) == {
        "token store", "model", "embeddings (h5)", "embeddings (npy)", "embeddings (parquet)", "embeddings (pt)",
        "contact map",
    }  # fmt: skip
    contacts = kinds["contact map"]
    assert (contacts["residues"], contacts["chain_ids"], contacts["chain_lengths"]) == (180, ["p2", "p1"], [90, 90])
    assert (contacts["method"], contacts["written_with"]) == ("attention", ["npz", "rr"])
    assert contacts["weights_sha256"] == kinds["embeddings (h5)"]["model"]["weights_sha256"]
    assert kinds["token store"]["residues"] == 360
    assert kinds["embeddings (h5)"]["proteins"] == 4


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x89HDF\r\n"])
@pytest.mark.parametrize("suffix", ["h5", "npy", "npz", "parquet", "pt", "txt"])
def test_describe_refuses_what_it_does_not_know(capsys, tmp_path, suffix, content):
    path = tmp_path / f"e.{suffix}"
    path.write_bytes(content)
    assert f"e.{suffix}" in error_line(capsys, ["describe", path])


def test_contacts_can_be_limited_to_some_proteins(capsys, model, fasta, tmp_path):
    out = tmp_path / "c"
    command = ["predict-contacts", "--model", model, "--fasta", fasta, "--quiet"]
    assert run([str(w) for w in (*command, "--out", out, "--ids", "p2", "--ids", "p1")]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["p1.npz", "p2.npz"]
    capsys.readouterr()
    assert "'p9'" in error_line(capsys, [*command, "--out", tmp_path / "d", "--ids", "p9"])


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_contacts_need_a_folder(capsys, model, fasta, tmp_path, out):
    (tmp_path / "file").write_text("mine")
    command = ["predict-contacts", "--model", model, "--fasta", fasta, "--out", tmp_path / out, "--quiet"]
    assert f"{out}: is a file, or below one; choose another --out" in error_line(capsys, command)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_protein_that_is_not_there_leaves_no_folder(capsys, model, fasta, tmp_path):
    out = tmp_path / "maps"
    command = ["predict-contacts", "--model", model, "--fasta", fasta, "--out", out, "--quiet", "--ids", "p1"]
    assert "--ids 'P12345': no such record" in error_line(capsys, [*command, "--ids", "P12345"])
    assert not out.exists()


def test_debug_mode_shows_the_traceback(model, tmp_path):
    command = [sys.executable, "-m", "protformer", "describe", str(tmp_path / "none")]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (plain.returncode, plain.stderr) == (1, f"error: {tmp_path / 'none'}: no such file or folder\n")
    debug = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PROTFORMER_DEBUG": "1"}
    )
    assert "Traceback" in debug.stderr
    assert debug.returncode == 1


def test_sigterm_is_an_interruption_told_in_one_line():
    """The command waits for its input when the signal comes."""
    command = [sys.executable, "-m", "protformer", "data", "stats", "--fasta", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b">a\n" + b"MKV\n" * 200_000)  # all but a pipe's buffer of it was read when this returns
        process.stdin.flush()
        time.sleep(1.0)  # the rest is read too, and the command waits for more
        process.terminate()
        process.wait(timeout=60)
        assert process.stderr.read().strip() == b"error: interrupted"
    assert process.returncode == 130


def test_a_reader_that_leaves_early_is_no_error(model):
    command = f"{sys.executable} -m protformer describe {model} | head -n 0"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
