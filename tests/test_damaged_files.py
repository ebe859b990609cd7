"""`describe` tells damage in one line, whatever the library that meets it raises."""

import random

import pytest
from small_model import write_model

from protformer.cli import run
from protformer.config import load_run_config
from protformer.errors import InputError
from protformer.inference.describe import describe

TIMES = 150


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each kind, by its suffix."""
    folder = tmp_path_factory.mktemp("files")
    model = write_model(folder / "model", load_run_config("tiny").model.attention)
    fasta = folder / "a.fa"
    fasta.write_text(">a\nMKVLAAGIVGKLLEN\n")
    common = ["--model", str(model), "--fasta", str(fasta), "--quiet"]
    for suffix in ("h5", "npy", "parquet", "pt"):
        assert run(["embed", *common, "--out", str(folder / f"a.{suffix}")]) == 0
    assert run(["predict-contacts", *common, "--out", str(folder)]) == 0
    return {path.suffix: path for path in folder.glob("a.*")}


def damaged(content, seed):
    """Cut off, or with a few bytes changed."""
    draw = random.Random(seed)
    if draw.random() < 0.2:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.choice((1, 2, 5, 50))):
        changed[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(changed)


def is_told(path):
    message = None
    try:
        describe(path)
    except InputError as error:
        message = str(error)
    assert message is None or (message.startswith(f"{path}: ") and len(message.splitlines()) == 1)
    return message is not None


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".parquet", ".pt"])
def test_damage_of_any_byte_is_told(files, tmp_path, suffix):
    content, path = files[suffix].read_bytes(), tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert not is_told(path)
    told = 0
    for seed in range(TIMES):
        path.write_bytes(damaged(content, seed))
        told += is_told(path)
    assert told > TIMES / 4


def test_damage_of_an_h5_is_told(files, tmp_path):
    """In chosen places: a few others make the HDF5 library loop for ever."""
    content, path = files[".h5"].read_bytes(), tmp_path / "x.h5"
    for wrong in (content[:100], content[: len(content) // 2], content.replace(b'{"model"', b'{]model"')):
        path.write_bytes(wrong)
        assert is_told(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", b""),
        ("status.json", b"{"),
        ("status.json", b"[]"),
        ("status.json", b'{"step": 1}'),
        ("metrics.csv", b"step,tokens\n\xff"),
        ("metrics.csv", b"steps\n1\n"),
        ("metrics.csv", b"step,tokens\n1,2,3\n1,x\n"),
        ("validation.csv", b"step,set\n1,a\n"),
        ("config.yaml", b"model: ["),
    ],
)
def test_damage_of_a_run_folder_is_told(tmp_path, name, content):
    (tmp_path / "config.yaml").write_text("model: {num_layers: 1}\n")
    (tmp_path / "stores.json").write_text("{}")
    (tmp_path / "metrics.csv").write_text("step,tokens\n1,50\n")
    assert describe(tmp_path)["state"] == "not started"
    (tmp_path / name).write_bytes(content)
    assert is_told(tmp_path)
