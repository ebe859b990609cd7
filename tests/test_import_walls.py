"""What may be imported and used where: the walls that keep start-up fast and each concern in one place.

Three kinds of check: a fresh interpreter tells which modules really get loaded, import-linter follows the
imports, and the syntax tree of each file tells which names it uses. Each checker is also shown a breach.
"""

import ast
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from protformer.cli import cli
from protformer.config import parse_duration

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "protformer"
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

SLOW_TO_LOAD = {"torch", "lightning", "Bio", "pyfaidx", "matplotlib"}

OWNERS = {
    "torch.cuda": ("device.py",),
    "torch.backends": ("device.py",),
    "torch.save": ("checkpoint.py",),
    "torch.load": ("checkpoint.py",),
    "yaml": ("config.py",),
    "rich": ("cli/", "training/callbacks.py"),
}
"""A dotted name, and the only files (or folders) that may use it or what is under it."""

ENVIRONMENT = ("os.environ", "os.environb", "os.getenv", "os.putenv")
DEBUG_SWITCH = "PROTFORMER_DEBUG"

NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc"}


def command_paths(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """() for the program itself, then every command and subcommand."""
    paths = [path]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            paths += command_paths(command.get_command(context, name), (*path, name))
    return paths


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import protformer", SLOW_TO_LOAD | {"numpy", "yaml", "rich", "click"}) == set()


@pytest.mark.parametrize("command", command_paths(cli), ids=" ".join)
def test_help_loads_nothing_heavy(command: tuple[str, ...]) -> None:
    arguments = ["protformer", *command, "--help"]
    assert loaded_by(f"sys.argv = {arguments}\nfrom protformer.cli import main\nmain()", SLOW_TO_LOAD) == set()


@pytest.mark.parametrize(
    "command",
    [
        "train --fasta a.fa --out {} --config tiney",
        "train --fasta a.fa --out {} --set model.atention.kind=exact",
        "train --fasta a.fa --out {}/old",
        "embed --model {} --fasta a.fa --out e.csv",
        "embed --model {} --fasta a.fa --out e.h5",
        "describe {}/none",
    ],
)
def test_a_mistake_is_told_before_anything_heavy_is_loaded(command: str, tmp_path: Path) -> None:
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "last.ckpt").touch()
    code = f"from protformer.cli import run\nassert run({command.format(tmp_path).split()}) == 1"
    assert loaded_by(code, SLOW_TO_LOAD) == set()


def test_corpus_and_configuration_never_load_torch() -> None:
    lower = import_of("corpus", "config", "alphabet", "errors")
    assert loaded_by(lower, {"torch", "lightning", "matplotlib"}) == set()


def test_inference_and_evaluation_never_load_lightning() -> None:
    without_training = import_of("inference", "evaluation", "checkpoint", "model", "attention", "device")
    assert loaded_by(without_training, {"lightning", "pytorch_lightning"}) == set()


def test_a_heavy_import_is_noticed_even_after_output_and_exit() -> None:
    assert loaded_by("print('usage')\nimport rich.table\nsys.exit(0)", {"rich", "yaml"}) == {"rich"}


def loaded_by(code: str, watched: set[str]) -> set[str]:
    """Which of the watched modules a fresh interpreter holds once it has run the code and exited with 0."""
    report = f"print('', *({watched!r} & set(sys.modules)), sep='\\n')"
    script = f"import atexit, sys\natexit.register(lambda: {report})\n{code}\n"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return watched & set(finished.stdout.splitlines())


def import_of(*packages: str) -> str:
    """Code that imports every module of these packages, or these modules."""
    parts = tuple(f"{package}/" for package in packages) + tuple(f"{package}.py" for package in packages)
    modules = [
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in SOURCES
        if path.startswith(parts)
    ]
    assert modules, packages
    return "\n".join(f"import protformer.{module}" for module in modules)


def test_import_contracts_hold() -> None:
    finished = lint_imports(ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("path", "planted"),
    [
        ("corpus/planted.py", "import torch"),
        ("corpus/planted.py", "def late():\n    import protformer.device"),
        ("attention/planted.py", "from protformer.training import fit"),
        ("attention/planted.py", "from protformer.corpus import fasta"),
        ("inference/planted.py", "import lightning"),
        ("cli/planted.py", "import Bio.SeqIO"),
        ("alphabet.py", "import protformer.config"),
        ("a_layer_nobody_declared.py", ""),
    ],
)
def test_import_contracts_notice_a_breach(tmp_path: Path, path: str, planted: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "protformer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "protformer" / path).open("a", encoding="utf-8") as file:
        file.write(f"{planted}\n")
    finished = lint_imports(tmp_path)
    assert finished.returncode != 0
    module = f"protformer.{path.removesuffix('.py').replace('/', '.')}"
    assert module in "".join(finished.stdout.split())


def lint_imports(folder: Path) -> "subprocess.CompletedProcess[str]":
    script = Path(sysconfig.get_path("scripts")) / "lint-imports"
    return subprocess.run([script, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_each_concern_stays_with_its_owner() -> None:
    found = {path: breaches((PACKAGE / path).read_text(encoding="utf-8"), path) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("path", "source", "breach"),
    [
        ("model/a.py", "import torch\ntorch.cuda.is_available()", "line 2: torch.cuda.is_available"),
        ("model/a.py", "import torch as t\nt.backends.mps", "line 2: torch.backends.mps"),
        ("model/a.py", "import torch.cuda", "line 1: torch.cuda"),
        ("model/a.py", "from torch import cuda", "line 1: torch.cuda"),
        ("model/a.py", "from torch.cuda import is_available", "line 1: torch.cuda.is_available"),
        ("training/fit.py", "import torch\ntorch.load(f, weights_only=True)", "line 2: torch.load"),
        ("checkpoint.py", "import torch\ntorch.load(f)", "line 2: torch.load without weights_only=True"),
        ("training/fit.py", "trainer.fit(m, weights_only=False)", "line 1: weights_only is not True"),
        ("cli/train.py", "def run():\n    import yaml", "line 2: yaml"),
        ("inference/a.py", "from rich.progress import track", "line 1: rich.progress.track"),
        ("training/fit.py", "from os import environ", "line 1: os.environ"),
        ("training/fit.py", f"import os\nos.environ['{DEBUG_SWITCH}']", "line 2: os.environ"),
        ("cli/a.py", "import os\nos.environ.get('HOME')", "line 2: os.environ"),
        ("cli/a.py", "import os\nos.getenv(name)", "line 2: os.getenv"),
    ],
)
def test_a_name_used_outside_its_owner_is_noticed(path: str, source: str, breach: str) -> None:
    assert breach in breaches(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("device.py", "import os, torch\ntorch.cuda.is_available()\nos.environ['OMP_NUM_THREADS']"),
        ("checkpoint.py", "import torch\ntorch.load(f, weights_only=True)"),
        ("cli/__init__.py", f"import os\nos.environ.get('{DEBUG_SWITCH}')"),
        ("training/callbacks.py", "from rich.progress import Progress"),
        ("model/a.py", "def cuda(torch_like):\n    return torch_like.cuda"),
    ],
)
def test_an_owner_may_use_what_it_owns(path: str, source: str) -> None:
    assert breaches(source, path) == []


def breaches(source: str, path: str) -> list[str]:
    """Each use of a name outside the files that own it, as `line N: dotted.name`."""
    tree = ast.parse(source)
    found = []
    for node, name in dotted_uses(tree):
        owners = next((files for owned, files in OWNERS.items() if is_under(name, owned)), None)
        if owners is not None and not path.startswith(owners):
            found.append(f"line {node.lineno}: {name}")
    if path != "device.py":
        allowed = debug_switch_reads(tree) if path.startswith("cli/") else set()
        found += [
            f"line {node.lineno}: {name}"
            for node, name in dotted_uses(tree)
            if name.startswith(ENVIRONMENT) and node.lineno not in allowed
        ]
    return [*found, *unsafe_loads(tree)]


def dotted_uses(tree: ast.AST) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Every imported module, imported name and attribute of one, by its full dotted name."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                local = item.asname or item.name.split(".")[0]
                aliases[local] = item.name if item.asname else local
                yield node, item.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for item in node.names:
                aliases[item.asname or item.name] = f"{node.module}.{item.name}"
                yield node, f"{node.module}.{item.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *attributes = ast.unparse(node).split(".")
            if root in aliases:
                yield node, ".".join([aliases[root], *attributes])


def debug_switch_reads(tree: ast.AST) -> set[int]:
    """Lines of `os.environ.get("PROTFORMER_DEBUG")`, the one variable that the command line reads."""
    return {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "os.environ.get"
        and ast.unparse(node.args[0]) == repr(DEBUG_SWITCH)
    }


def unsafe_loads(tree: ast.AST) -> Iterator[str]:
    """Calls that could unpickle code: `weights_only` other than True, or `torch.load` without it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.get("weights_only", "True") != "True":
                yield f"line {node.lineno}: weights_only is not True"
            elif ast.unparse(node.func) == "torch.load" and "weights_only" not in given:
                yield f"line {node.lineno}: torch.load without weights_only=True"


def is_under(name: str, owned: str) -> bool:
    return name == owned or name.startswith(f"{owned}.")


def test_modules_are_short_and_named_for_what_they_hold() -> None:
    too_long = {path for path in SOURCES if len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) > 400}
    vague = {path for path in SOURCES if Path(path).stem in NAMES_THAT_SAY_NOTHING or "_v2" in path}
    assert (too_long, vague) == (set(), set())


def test_annotations_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeError, match="parse_duration"):
        parse_duration(3, "training.max_time")  # type: ignore[arg-type]
