"""Compiled layers give what plain ones give, and break into no parts; in a process of its own, as users run it."""

import os
import shutil
import subprocess
import sys

import pytest
from test_training import arguments
from test_training import fasta as fasta  # the module's fixture

# Parts are compiled with fullgraph=True: a graph break anywhere but at the attention is an error.
COMPARE = """
import torch
from protformer.config import GeneralizedConfig, ModelConfig
from protformer.model.encoder import Encoder, initialize_weights

config = ModelConfig(num_layers=2, num_heads=2, hidden_size=32, feed_forward_size=64,
                     attention=GeneralizedConfig(num_features=16))
plain, compiled = Encoder(config, seed=0), Encoder(config, seed=0)
initialize_weights(plain, num_layers=2)
compiled.load_state_dict(plain.state_dict())
compiled.compile_layers()
tokens = torch.randint(4, 24, (2, 40))
results = []
for encoder in (plain, compiled):
    hidden = encoder(tokens, torch.ones_like(tokens)).hidden
    results.append([hidden, *torch.autograd.grad(hidden.square().mean(), [*encoder.parameters()])])
for expected, found in zip(*results, strict=True):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
assert compiled.state_dict().keys() == plain.state_dict().keys()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_layers_have_no_graph_breaks_and_give_the_plain_numbers():
    finished = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_compiling_without_a_compiler_is_one_line(fasta, tmp_path):
    command = [
        sys.executable,
        "-m",
        "protformer",
        *arguments(fasta, tmp_path / "run"),
        "--set",
        "training.compile=true",
    ]
    environment = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 1
    assert not (tmp_path / "run").exists()
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("error: training.compile: torch.compile does not work on this machine: ")
