"""Every command of the README runs, in order, in a copy of the data; every option it names exists.

Two things differ from a reader's run: `pip install` is left out (the tests run in an installed environment, and
`.ci/run` makes it with that line), and `train` stops after three steps with little validation. Blocks marked `sh` need
what a test machine has not (Docker, a download of torch).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    """Single commands in the order of the page: lines joined at a backslash, then parted at &&."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [part.strip() for line in lines for part in line.split(" && ")]


def test_the_readme_begins_with_the_install_and_the_main_job_in_one_line_and_the_tests_in_the_next():
    first, second = (block.strip() for block in blocks("bash")[:2])
    assert first.startswith('pip install -e ".[dev]" && protformer train ')
    assert "\n" not in first
    assert second == "pytest -n 2"
    assert "step pytest -n 2" in (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[dev]"' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path):
    shutil.copytree(
        ROOT / "data", tmp_path / "data", ignore=lambda folder, names: {n for n in names if n.endswith(".png")}
    )
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for command in commands():
        if command.startswith(("pip install", "pytest")):
            continue
        if command.startswith("protformer train"):
            command += " --max-steps 3 --set data.max_validation_residues=5000"  # noqa: PLW2901
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        ran += 1
    assert ran >= 8


@pytest.mark.slow
def test_the_python_of_the_readme_runs_on_what_its_commands_wrote(tmp_path):
    from small_model import write_model

    from protformer.cli import run
    from protformer.config import load_run_config

    write_model(tmp_path / "runs" / "first" / "model", load_run_config("tiny").model.attention)
    fasta = str(ROOT / "data" / "trembl_validation.fasta.gz")
    out = tmp_path / "runs" / "first"
    protein = "tr|A0A151ZSF0|A0A151ZSF0_9MYCE"
    model = ["--model", str(out), "--fasta", fasta, "--quiet"]
    assert run(["embed", *model, "--out", str(out / "validation.h5")]) == 0
    assert run(["predict-contacts", *model, "--ids", protein, "--out", str(out / "contacts")]) == 0
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_option_that_the_readme_names_exists():
    from click.testing import CliRunner

    from protformer.cli import COMMANDS, cli

    helps = "".join(
        CliRunner().invoke(cli, [*words, "--help"]).output
        for words in (
            [],
            *([name] for name in COMMANDS),
            ["evaluate", "masked-lm"],
            ["evaluate", "contacts"],
            ["benchmark", "attention"],
            ["data", "stats"],
            ["data", "dedup"],
        )
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"^```sh\n.*?^```", "", README, flags=re.M | re.S)))
    assert named - set(re.findall(r"--[a-z][a-z-]+", helps)) == set()


def test_every_picture_of_the_readme_is_there():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert [name for name in pictures if not (ROOT / name).is_file()] == []
    if (ROOT / ".git").exists():
        command = ["git", "check-ignore", "--no-index", *pictures]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1, "git ignores one of them"
