"""The files under configs/cluster: they parse, and every option and field that they name exists."""

import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from protformer.cli import cli
from protformer.config import load_run_config

FOLDER = Path(__file__).parents[1] / "configs" / "cluster"
SCRIPTS = ("slurm.sbatch", "torchrun.sh", "docker.sh")


def pod() -> dict[str, object]:
    _, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def scripts() -> dict[str, str]:
    texts = {name: (FOLDER / name).read_text() for name in SCRIPTS}
    (texts["kubernetes.yaml"],) = pod()["args"]
    return texts


def words(text: str) -> list[str]:
    """Those of the command that trains, with lines joined."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    (line,) = (line for line in lines if re.search(r"(protformer|^) train ", " ".join(line.split())))
    return shlex.split(line)


def test_all_files_are_looked_at() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*SCRIPTS, "kubernetes.yaml"}


@pytest.mark.parametrize("name", scripts())
def test_scripts_are_sound_shell(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", scripts())
def test_every_option_and_field_exists(name: str) -> None:
    command = words(scripts()[name])
    ours = command[command.index("train") + 1 :]
    known = set(re.findall(r"--[a-z][a-z-]+", CliRunner().invoke(cli, ["train", "--help"]).output))
    assert {word for word in ours if word.startswith("--")} <= known
    load_run_config("base", tuple(value for option, value in pairwise(ours) if option == "--set"))
    if "torchrun" in command:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(command[command.index("torchrun") + 1 :])
        assert (parsed.module, parsed.training_script) == (True, "protformer")


def test_pods_find_the_service_and_mount_what_they_read() -> None:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    template = job["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:29500" in scripts()["kubernetes.yaml"]
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod()["volumeMounts"]}
    assert volumes == mounts.keys()
    assert {"/data", "/runs"} <= set(mounts.values())


def test_a_job_that_saved_is_requeued_ahead_of_its_time_limit() -> None:
    text = (FOLDER / "slurm.sbatch").read_text()
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", text, re.M)
    assert re.search(r'if \[ "\$code" -eq 130 \]; then\s+scontrol requeue', text)
