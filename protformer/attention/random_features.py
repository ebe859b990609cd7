"""The random projection behind random-feature attention: how it is drawn, stored and drawn again.

In: counts, a convention for the rows and (seed, layer, redraw count). Out: W of shape (feature, head_dim),
float32. Algorithm: Choromanski et al. 2021, section 2.4; our `num_features` is their m, our `head_dim` their
d. Blocks of d rows are orthogonal matrices, and each row is given its own length.

An orthogonal block must be uniform over all orthogonal matrices (Haar), or the kernel estimate is biased
however many features there are. QR of a Gaussian matrix alone is not: LAPACK's Householder signs make Q lean.
Multiplying each column of Q by the sign of R's diagonal repairs it (Mezzadri 2007, "How to generate random
matrices from the classical compact groups").
"""

import hashlib
import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Projection = Float[Tensor, "feature head_dim"]


def draw_projection(
    num_features: int,
    head_dim: int,
    *,
    orthogonal: bool,
    row_norms: Literal["chi", "sqrt_d"],
    generator: torch.Generator,
) -> Projection:
    """Draw W on the CPU: directions uniform on the sphere, times lengths.

    `chi` lengths are those of fresh Gaussian vectors, so that every row by itself is N(0, I) and the softmax
    kernel is estimated without bias. `sqrt_d` gives all rows the length sqrt(head_dim): the regularized
    softmax kernel SMREG (Choromanski et al. 2021, theorem 1), which has less variance and is a lower bound of
    the softmax kernel.
    """
    draw = haar_directions if orthogonal else gaussian_directions
    directions: Tensor = draw(num_features, head_dim, generator)
    if row_norms == "sqrt_d":
        return directions.mul(math.sqrt(head_dim)).float()
    gaussian = torch.randn(num_features, head_dim, dtype=torch.float64, generator=generator)
    lengths: Tensor = gaussian.square().sum(dim=1, keepdim=True).sqrt()
    return (directions * lengths).float()


def haar_directions(num_rows: int, head_dim: int, generator: torch.Generator) -> Float[Tensor, "row head_dim"]:
    """Unit rows in float64, mutually orthogonal within each block of head_dim rows; the last block is cut short."""
    num_blocks = -(-num_rows // head_dim)
    gaussian = torch.randn(num_blocks, head_dim, head_dim, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    haar: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return haar.flatten(0, 1)[:num_rows]


def gaussian_directions(num_rows: int, head_dim: int, generator: torch.Generator) -> Float[Tensor, "row head_dim"]:
    """Independent unit rows in float64."""
    gaussian = torch.randn(num_rows, head_dim, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(gaussian, dim=1)


def trigonometric_features(
    x: Float[Tensor, "... head_dim"], projection: Projection
) -> Float[Tensor, "... two_features"]:
    """SM-trig (Choromanski et al. 2021, eq. 7), unbiased like positive features, but of either sign.

    For comparison only: where the kernel is small, its estimate has a variance that no attention survives.
    """
    angles = x @ projection.T
    factor = (x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(projection))
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * factor


def projection_generator(seed: int, layer: int, redraw_count: int) -> torch.Generator:
    """A generator on the CPU that these three numbers decide, equally on every rank and platform.

    They are hashed because torch's generator gives related streams for some related seeds, and sums such as
    seed + layer would make layer 1 of seed 0 equal to layer 0 of seed 1.
    """
    digest = hashlib.blake2b(f"protformer {seed} {layer} {redraw_count}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


class RandomFeatures(nn.Module):
    """One layer's projection, in the state dict, with the schedule on which it is drawn again.

    All heads share one projection, as in the paper's released code: its draws cost and store num_heads times
    less, the product with it is a single matrix product, and heads differ by their learned query and key
    projections anyway.

    The projection is a function of (seed, layer, step // redraw_every_steps) alone. Ranks therefore agree
    without a broadcast, a resumed run draws what the uninterrupted one would have drawn, and because only the
    training loop calls `redraw`, neither evaluation nor the recomputation of activation checkpointing changes
    it.
    """

    projection: Tensor
    redraw_count: Tensor

    def __init__(
        self,
        num_features: int,
        head_dim: int,
        *,
        orthogonal: bool,
        row_norms: Literal["chi", "sqrt_d"],
        redraw_every_steps: int,
        seed: int,
        layer: int,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.head_dim = head_dim
        self.orthogonal = orthogonal
        self.row_norms: Literal["chi", "sqrt_d"] = row_norms
        self.redraw_every_steps = redraw_every_steps
        self.seed = seed
        self.layer = layer
        self.register_buffer("projection", self._draw(redraw_count=0))
        self.register_buffer("redraw_count", torch.zeros((), dtype=torch.int64))

    def redraw(self, step: int) -> None:
        """Bring the projection to what belongs to `step` optimizer steps done; does nothing if it is there already."""
        if self.redraw_every_steps == 0:
            return
        count = step // self.redraw_every_steps
        if count != int(self.redraw_count):
            self.projection.copy_(self._draw(count))
            self.redraw_count.fill_(count)

    def _draw(self, redraw_count: int) -> Projection:
        return draw_projection(
            self.num_features,
            self.head_dim,
            orthogonal=self.orthogonal,
            row_norms=self.row_norms,
            generator=projection_generator(self.seed, self.layer, redraw_count),
        )
