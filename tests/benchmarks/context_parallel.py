"""One window over 1, 2 and 4 processes: time, memory and what travels, of a forward and backward pass.

Run as `python tests/benchmarks/context_parallel.py LENGTH`; each process has one thread. Prints for each number of
processes the seconds (median of three), the largest peak memory of a process above what it held before, and the
residues a second; and what a layer sends, which does not depend on the length.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from protformer.attention.sequence_group import SequenceGroup
from protformer.config import GeneralizedConfig, ModelConfig
from protformer.device import memory_bytes
from protformer.model.masked_lm_head import ProteinLanguageModel

CONFIG = ModelConfig(
    num_layers=4, num_heads=4, hidden_size=256, feed_forward_size=1024, attention=GeneralizedConfig(num_features=128)
)


def main(length: int) -> None:
    for num_ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, str(length), folder, str(num_ranks)]
            ranks = [
                subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(num_ranks)
            ]
            lines = [rank.communicate()[0] for rank in ranks]
        seconds, peaks = zip(*((float(x) for x in line.split()) for line in lines), strict=True)
        print(
            f"{num_ranks} processes: {max(seconds):.2f} s, {max(peaks):.2f} GB, {length / max(seconds):,.0f} residues/s"
        )
    numbers = CONFIG.num_heads * 128 * (CONFIG.head_dim + 1)
    print(f"{numbers * 4 / 1e3:.0f} kB a layer each way, whatever the length")


def work(length: int, folder: str, num_ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    torch.manual_seed(0)
    model = ProteinLanguageModel(CONFIG, seed=0)
    model.encoder.split_over(SequenceGroup(dist.group.WORLD) if num_ranks > 1 else None)
    tokens = torch.randint(4, 24, (1, length // num_ranks))
    asked = torch.rand(tokens.shape) < 0.15
    before, seconds = memory_bytes(torch.device("cpu"))[0], []
    for _ in range(3):
        dist.barrier()
        start = time.monotonic()
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens, torch.ones_like(tokens), asked), tokens[asked]).backward()
        seconds.append(time.monotonic() - start)
    print(statistics.median(seconds), (memory_bytes(torch.device("cpu"))[1] - before) / 1e9)


if __name__ == "__main__":
    numbers = [int(word) if word.isdigit() else word for word in sys.argv[1:]]
    main(*numbers) if len(numbers) == 1 else work(*numbers)
