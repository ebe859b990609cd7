"""Clustered attention against exact attention by length: `python tests/benchmarks/clustered_cost.py 1024 4096 16384`.

20 heads of 16 channels, as in ESM-2 8M, one thread, forward pass. Processor time, medians of three alternating repeats,
so that other work on the machine counts little; keys is what a query looks at one by one, and clusters as wholes.
"""

import sys
import time
from statistics import median

import torch

from protformer.attention import build_attention
from protformer.config import ClusteredConfig, ExactConfig
from protformer.device import keep_freed_memory

REPEATS, NUM_HEADS, HEAD_DIM = 3, 20, 16


@torch.inference_mode()
def main(lengths: list[int]) -> None:
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))
    sizes = {"head_dim": HEAD_DIM, "num_heads": NUM_HEADS, "causal": False, "seed": 0, "layer": 0}
    config = ClusteredConfig()
    kinds = {"clustered": build_attention(config, **sizes), "exact": build_attention(ExactConfig(), **sizes)}
    print(f"{'residues':>8}{'keys':>6}{'clusters':>10}{'clustered s':>13}{'exact s':>9}{'ratio':>7}")
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(1, NUM_HEADS, length, HEAD_DIM, generator=generator) for _ in range(3))
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(REPEATS):
            for kind, attention in kinds.items():
                start = time.process_time()
                attention(2 * q, k, v, torch.ones(1, length, dtype=torch.int64))
                seconds[kind].append(time.process_time() - start)
        found = {kind: median(values) for kind, values in seconds.items()}
        clusters = kinds["clustered"].num_clusters(length)
        keys = config.clusters_per_query * length // clusters
        print(
            f"{length:8}{keys:6}{clusters:10}{found['clustered']:13.3f}{found['exact']:9.3f}"
            f"{found['exact'] / found['clustered']:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
