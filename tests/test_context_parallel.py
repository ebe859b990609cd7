"""Windows split over ranks: what several gloo processes compute together is what one computes alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NUM_RANKS = 4
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def split_attention(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """The largest error over ranks of each case of `split_attention_rank`, and its limit."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "split_attention_rank.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(NUM_RANKS), str(folder)], env=environment)
        for rank in range(NUM_RANKS)
    ]
    assert [rank.wait(timeout=600) for rank in ranks] == [0] * NUM_RANKS
    by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    return {case: tuple(max(found[case][i] for found in by_rank) for i in (0, 1)) for case in by_rank[0]}


@pytest.mark.parametrize(
    "kind", ["hyperbolic", "positive", "favor++", "scaled", "relu", "mirrored", "exp", "none", "model"]
)
def test_outputs_and_gradients_are_those_of_one_process(
    split_attention: dict[str, tuple[float, float]], kind: str
) -> None:
    cases = {case: limits for case, limits in split_attention.items() if f", {kind}, " in case}
    assert len(cases) >= 16
    assert {case: limits for case, limits in cases.items() if limits[0] > limits[1]} == {}
