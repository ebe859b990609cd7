"""How many of the strongest predicted contacts are contacts in the structure.

In: scores of all pairs of residues of a chain, and where its C-betas are. Out: precisions by range. A contact is a pair
of C-betas less than 8 angstrom apart. Ranges are of the distance along the sequence: short 6 to 11, medium 12 to 23,
long 24 and more. P@L is the precision of the L strongest pairs of a range, with L the chain's residues (P@L/2 and P@L/5
of as many); of all pairs if they are fewer. These are the definitions of CASP and of Rao et al. 2021.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32

CONTACT_ANGSTROM = 8.0
RANGES: dict[str, tuple[int, int | None]] = {"long": (24, None), "medium": (12, 23), "short": (6, 11)}
"""Smallest and largest separation along the sequence."""
SHARES = {"P@L": 1, "P@L/2": 2, "P@L/5": 5}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainPrecision:
    """Figures of one chain in one range."""

    precisions: dict[str, float]
    """By the names of `SHARES`."""
    random: float
    """Share of contacts among all pairs of the range: what a random ranking gets."""


def contact_precision(
    scores: Float[np.ndarray, "residue residue"], c_beta: Float32[np.ndarray, "residue 3"]
) -> dict[str, ChainPrecision]:
    """By range; a range without a pair of resolved residues is left out."""
    length = len(scores)
    is_contact, is_resolved = _contacts(c_beta)
    i, j = np.triu_indices(length, 1)
    found: dict[str, ChainPrecision] = {}
    for name, (smallest, largest) in RANGES.items():
        inside = (j - i >= smallest) & is_resolved[i, j]
        if largest is not None:
            inside &= j - i <= largest
        if not inside.any():
            continue
        pairs = i[inside], j[inside]
        ranked = is_contact[pairs][np.argsort(-scores[pairs], kind="stable")]
        found[name] = ChainPrecision(
            precisions={share: float(ranked[: max(1, length // divisor)].mean()) for share, divisor in SHARES.items()},
            random=float(ranked.mean()),
        )
    return found


def mean_precision(chains: Iterable[dict[str, ChainPrecision]]) -> dict[str, dict[str, float | None]]:
    """Means over the chains that have the range, under the names that scripts rely on; None where no chain has it."""
    listed = list(chains)
    means: dict[str, dict[str, float | None]] = {}
    for name in RANGES:
        having = [chain[name] for chain in listed if name in chain]
        means[name] = {share: _mean([chain.precisions[share] for chain in having]) for share in SHARES} | {
            "random_P@L": _mean([chain.random for chain in having])
        }
    return means


def _mean(figures: list[float]) -> float | None:
    return float(np.mean(figures)) if figures else None


def _contacts(
    c_beta: Float32[np.ndarray, "residue 3"],
) -> tuple[Bool[np.ndarray, "residue residue"], Bool[np.ndarray, "residue residue"]]:
    """Which pairs are in contact, and which are resolved."""
    places = c_beta.astype(np.float64)
    squared = np.square(places[:, None] - places[None]).sum(axis=-1)
    return squared < CONTACT_ANGSTROM**2, np.isfinite(squared)
