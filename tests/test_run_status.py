"""`describe` tells how far a run is, from files alone; one process at a time trains in a run folder."""

import json
import re
import subprocess
import sys
import time

import pytest
from small_runs import arguments, fails_with, write_proteins
from test_import_walls import loaded_by

from protformer.cli import run
from protformer.run_status import RunStatus, is_running, read_status, write_status
from protformer.training import callbacks

SMALL = {"model__num_layers": 1, "model__attention": "{kind: exact}", "training__max_steps": 4}
HOLD = """
import sys, pathlib
from protformer.run_status import sole_process
with sole_process(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fasta = write_proteins(folder / "proteins.fa")
    assert run(arguments(fasta, folder / "run", **SMALL)) == 0
    return fasta, folder / "run"


def described(out, capsys):
    capsys.readouterr()
    assert run(["describe", str(out), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def another_process(finished):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(finished[1])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_finished_run_is_described_as_such(finished, capsys):
    facts = described(finished[1], capsys)
    assert (facts["state"], facts["step"], facts["checkpoint_step"]) == ("finished", "4 of 4", 4)
    assert facts["residues_seen"] > 0
    assert facts["skipped_steps"] == 0
    assert 0 <= facts["seconds_since_checkpoint"] <= facts["seconds_since_update"] + 60
    assert facts["validation_validation"].startswith("step 4: perplexity ")


def test_a_run_in_progress_is_described_with_the_time_left(finished, capsys, another_process):
    status = read_status(finished[1])
    assert status is not None
    now = time.time()
    going_on = {
        "step": 2,
        "seconds_left": 100.0,
        "updated": now - 10,
        "checkpoint_step": 1,
        "checkpoint_time": now - 60,
    }
    written = {name: getattr(status, name) for name in RunStatus.__dataclass_fields__}
    write_status(finished[1], RunStatus(**(written | going_on)))
    facts = described(finished[1], capsys)
    assert (facts["state"], facts["step"], facts["checkpoint_step"]) == ("running", "2 of 4", 1)
    assert facts["seconds_left"] == pytest.approx(90, abs=3)
    assert facts["seconds_since_checkpoint"] == pytest.approx(60, abs=3)
    another_process.kill()
    another_process.wait()
    facts = described(finished[1], capsys)
    assert facts["state"] == "stopped"
    assert "seconds_left" not in facts
    write_status(finished[1], status)


def test_a_second_process_is_refused_until_the_first_is_dead(finished, capsys, another_process):
    fasta, out = finished
    assert is_running(out)
    message = fails_with(capsys, [*arguments(fasta, out, **SMALL), "--resume"])
    assert f"another process is training here (process {another_process.pid} on " in message
    another_process.kill()
    another_process.wait()
    assert not is_running(out)
    assert run([*arguments(fasta, out, **SMALL), "--resume"]) == 0


def test_describing_a_run_loads_no_torch(finished):
    arguments = ["protformer", "describe", str(finished[1])]
    code = f"sys.argv = {arguments}\nfrom protformer.cli import main\nmain()"
    assert loaded_by(code, {"torch", "lightning", "matplotlib"}) == set()


def test_a_run_away_from_a_terminal_tells_its_rate_its_loss_and_the_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(callbacks, "PLAIN_LINE_SECONDS", 0.0)
    fasta = write_proteins(tmp_path / "proteins.fa")
    loud = [word for word in arguments(fasta, tmp_path / "run", **SMALL) if word != "--quiet"]
    assert run([*loud, "--max-steps", "3"]) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all(re.search(r" [\d,]+ residues/s  loss \d\.\d{4}  \d+ min \d\d s left$", line) for line in lines)
    assert re.search(r"^0:00:\d\d of training in all, [\d,]+ residues/s in this sitting, ", printed.out, re.MULTILINE)
    assert " GB of memory, 0 steps skipped" in printed.out
    assert run([*loud, "--resume", "--max-steps", "2"]) == 0
    assert " of training in all, no step was left to make in this sitting, " in capsys.readouterr().out


def test_values_stand_in_one_column_however_long_a_name_is(monkeypatch, capsys, tmp_path):
    facts = {
        "kind": "run",
        "validation_of_a_family_with_a_long_name": "step 4",
        "notes": ["two words", "three more words"],
    }
    monkeypatch.setattr("protformer.inference.describe.describe", lambda path: facts)
    assert run(["describe", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.index(value) for line, value in zip(lines, ["run", "step 4", "two", "three"], strict=True)]
    assert len(set(found)) == 1
