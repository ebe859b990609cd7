"""On CPUs, threads share out the heads, and each works off its own from the first block to the last.

Blocks are small, so that they stay in a core's cache, and a pass over a long sequence has thousands of operations on
them. Were each operation shared out among the threads, as torch does by itself, all threads would meet at the end of
each: that costs a fifth of the time where nothing else runs, and nine tenths of it where another process takes one of
the cores, as every meeting then waits for the operating system.
"""

import math

from protformer.attention.interface import Heads
from protformer.device import num_threads

LEAST_FEATURES = 2**20
"""Features of a thread's heads below which handing out work is not worth its while."""


def head_shares(q: Heads, *, num_features: int) -> list[slice]:
    """Heads that are worked on together; one share where threads would not help. `num_features` are those of a head."""
    batch, num_heads, num_residues, _ = q.shape
    affordable = batch * num_heads * num_residues * num_features // LEAST_FEATURES
    num_shares = max(1, min(num_threads(q.device), num_heads, affordable))
    size = math.ceil(num_heads / num_shares)
    return [slice(start, min(start + size, num_heads)) for start in range(0, num_heads, size)]


def largest_share(shares: list[slice]) -> int:
    """Heads in it."""
    return int(shares[0].stop)
