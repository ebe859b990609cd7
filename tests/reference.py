"""Attention written down as the papers define it: float64, O(residue ** 2), one formula a line, no concern
for speed.

Oracles for the fast code; imports nothing from protformer. Every function takes q and k of shape (batch,
head, residue, head_dim) and gives the normalised matrix (batch, head, residue, residue), zero wherever a
residue does not see another.
"""

import math

import torch
from torch import Tensor


def attend(weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v.double()


def exact_weights(q: Tensor, k: Tensor, segments: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) (Vaswani et al. 2017, eq. 1)."""
    logits = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return _normalize_logarithms(logits, _visible(segments, causal))


def favor_weights(q: Tensor, k: Tensor, segments: Tensor, *, causal: bool, projection: Tensor) -> Tensor:
    """phi(q) . phi(k), normalised over k; phi as in Choromanski et al. 2021, lemma 1 (SM+), on vectors times
    d^-1/4.

    The dot products are taken as a log-sum-exp over features, so that they hold for vectors of any length.
    """
    log_q, log_k = _log_softmax_features(q, projection), _log_softmax_features(k, projection)
    rows = [torch.logsumexp(log_q[:, :, i, None, :] + log_k, dim=-1) for i in range(q.shape[2])]
    return _normalize_logarithms(torch.stack(rows, dim=2), _visible(segments, causal))


def generalized_weights(
    q: Tensor, k: Tensor, segments: Tensor, *, causal: bool, projection: Tensor | None, epsilon: float
) -> Tensor:
    """phi(q) . phi(k), normalised over k; phi(x) = relu(W x) + epsilon (Choromanski et al. 2021, eq. 5, f =
    relu).

    With a projection, x is the vector times d^-1/4; without, it is the vector itself.
    """
    phi_q, phi_k = (_relu_features(x, projection, epsilon) for x in (q, k))
    kernel = (phi_q @ phi_k.transpose(-1, -2)) * _visible(segments, causal)
    total = kernel.sum(dim=-1, keepdim=True)
    return kernel / torch.where(total > 0, total, 1.0)


def softmax_kernel_estimates(x: Tensor, y: Tensor, projection: Tensor) -> Tensor:
    """phi_r(x) phi_r(y) m for each row r of W: estimates of exp(x . y), for single vectors x and y."""
    return torch.exp(projection @ x - x @ x / 2) * torch.exp(projection @ y - y @ y / 2)


def _visible(segments: Tensor, causal: bool) -> Tensor:
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] != 0)
    past = torch.ones(length, length, dtype=torch.bool).tril()
    return (same & past if causal else same)[:, None]


def _normalize_logarithms(logarithms: Tensor, visible: Tensor) -> Tensor:
    """softmax over what is visible; rows that see nothing are zero."""
    sees_something = visible.any(dim=-1, keepdim=True)
    safe = torch.where(visible | ~sees_something, logarithms, -torch.inf)
    return torch.where(visible, torch.softmax(safe, dim=-1), 0.0)


def _log_softmax_features(x: Tensor, projection: Tensor) -> Tensor:
    num_features, head_dim = projection.shape
    x = x.double() * head_dim**-0.25
    return x @ projection.double().T - (x * x).sum(-1, keepdim=True) / 2 - math.log(num_features) / 2


def _relu_features(x: Tensor, projection: Tensor | None, epsilon: float) -> Tensor:
    x = x.double()
    if projection is not None:
        x = x * x.shape[-1] ** -0.25 @ projection.double().T
    return torch.relu(x) + epsilon
