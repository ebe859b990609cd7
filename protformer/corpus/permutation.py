"""A keyed permutation of 0..n-1, computed point by point: no list of n numbers anywhere.

In: n, seed, epoch. Out: the place that index i is sent to. A balanced Feistel network over the next even number of
bits is a bijection for any round function; values that fall at n or above are sent through again until they fall
below ("cycle walking", Black and Rogaway 2002), fewer than 4 rounds on average. Time O(1) an index, memory O(1).
"""

ROUNDS = 4
_MIX_A, _MIX_B, _WORD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, (1 << 64) - 1


def permute(index: int, n: int, *, seed: int, epoch: int) -> int:
    """Where `index` (0 <= index < n) goes in the permutation of this seed and epoch."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        index = _feistel(index, half_bits, seed, epoch)
        if index < n:
            return index


def _feistel(index: int, half_bits: int, seed: int, epoch: int) -> int:
    half_mask = (1 << half_bits) - 1
    left, right = index >> half_bits, index & half_mask
    for round_number in range(ROUNDS):
        key = _mix(_mix(seed * ROUNDS + round_number) + epoch)
        left, right = right, left ^ (_mix(right + key) & half_mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """Spread 64 bits over 64 bits (the finalizer of splitmix64, Steele et al. 2014, one round of it)."""
    value = (value + _MIX_A) & _WORD
    value = (value ^ (value >> 30)) * _MIX_B & _WORD
    return value ^ (value >> 27)
