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


def favor_weights(
    q: Tensor,
    k: Tensor,
    segments: Tensor,
    *,
    causal: bool,
    projection: Tensor,
    features: str = "positive",
    moments: Tensor | None = None,
    rescale: bool = False,
    covariance_root: Tensor | None = None,
) -> Tensor:
    """phi(q) . phi(k), normalised over k; phi as in Choromanski et al. 2021, lemma 1 (SM+), on vectors times
    d^-1/4.

    The dot products are taken as a log-sum-exp over features, so that they hold for vectors of any length.
    `moments` are the means of q, k, q^2 and k^2 by head and channel; `covariance_root` has one
    number for channels c and c + d / 2 together.
    """
    q, k = q.double(), k.double()
    if covariance_root is not None:
        root = torch.cat((covariance_root, covariance_root), dim=-1).double()
        q, k = q * root, k * root
    psi = torch.ones(q.shape[1], q.shape[3], dtype=torch.float64)
    if rescale:
        # Likhosherstov et al. 2023: Psi_l = (sum k_l^2 / sum q_l^2)^(1/4).
        psi = (moments[3].double() / moments[2].double()) ** 0.25
        q, k = q * psi[:, None], k / psi[:, None]
    if features == "hyperbolic":
        projection = torch.cat((projection, -projection))
    damping = best_damping(*moments.double(), psi) if features == "favor++" else 0.0
    log_q, log_k = (_log_softmax_features(x, projection, damping) for x in (q, k))
    rows = [torch.logsumexp(log_q[:, :, i, None, :] + log_k, dim=-1) for i in range(q.shape[2])]
    return _normalize_logarithms(torch.stack(rows, dim=2), _visible(segments, causal))


def best_damping(q: Tensor, k: Tensor, q_square: Tensor, k_square: Tensor, psi: Tensor) -> float:
    """A of FAVOR++ (Likhosherstov et al. 2022, theorem 3), for moments by head and channel."""
    p = float((psi**2 * q_square + k_square / psi**2 + 2 * q * k).mean() / math.sqrt(q.shape[-1]))
    return (1 - 2 * p - math.sqrt((2 * p + 1) ** 2 + 8 * p)) / 16


def generalized_weights(
    q: Tensor,
    k: Tensor,
    segments: Tensor,
    *,
    causal: bool,
    projection: Tensor | None,
    epsilon: float,
    function: str,
    mirrored: bool = False,
) -> Tensor:
    """phi(q) . phi(k), normalised over k; phi(x) = f(W x) + epsilon (Choromanski et al. 2021, eq. 5, appendix D.3).

    With a projection, x is the vector times d^-1/4; without, it is the vector itself. exp is taken as a log-sum-exp.
    A mirrored projection has every row with both signs.
    """
    if mirrored:
        projection = torch.cat((projection, -projection))
    products_q, products_k = (_products(x, projection) for x in (q, k))
    if function == "exp":
        rows = [torch.logsumexp(products_q[:, :, i, None, :] + products_k, dim=-1) for i in range(q.shape[2])]
        return _normalize_logarithms(torch.stack(rows, dim=2), _visible(segments, causal))
    phi_q, phi_k = (FUNCTIONS[function](x) + epsilon for x in (products_q, products_k))
    kernel = (phi_q @ phi_k.transpose(-1, -2)) * _visible(segments, causal)
    total = kernel.sum(dim=-1, keepdim=True)
    return kernel / torch.where(total > 0, total, 1.0)


def clustered_weights(
    q: Tensor,
    k: Tensor,
    segments: Tensor,
    *,
    clusters_per_query: int,
    cluster_size: int,
    log_mass: Tensor,
) -> Tensor:
    """softmax over the keys of opened clusters and over the estimates of the other clusters, one a key.

    Segment by segment and head by head, as the docstring of the kind has it.
    """
    q, k = q.double() / math.sqrt(q.shape[-1]), k.double()
    weights = torch.zeros(*q.shape[:2], q.shape[2], q.shape[2], dtype=torch.float64)
    for row, head in ((row, head) for row in range(q.shape[0]) for head in range(q.shape[1])):
        for segment in set(segments[row].tolist()) - {0}:
            here = torch.nonzero(segments[row] == segment).flatten()
            queries, keys = q[row, head, here], k[row, head, here]
            logits = queries @ keys.T
            size = max(cluster_size, math.sqrt(len(here)) / 2)
            height = max(0, math.ceil(math.log2(len(here) / size)))
            if 2**height > clusters_per_query:
                clusters = halved(keys.detach(), torch.arange(len(here)), height)
                estimates = torch.stack([queries @ keys[cluster].mean(dim=0) for cluster in clusters], dim=1)
                sizes = torch.tensor([len(cluster) for cluster in clusters])
                opened = (estimates + sizes.double().log()).topk(clusters_per_query, dim=1).indices
                for number, cluster in enumerate(clusters):
                    is_opened = (opened == number).any(dim=1, keepdim=True)
                    estimate = estimates[:, number, None] + log_mass[head].double()
                    logits = logits.index_copy(1, cluster, torch.where(is_opened, logits[:, cluster], estimate))
            weights[row, head, here[:, None], here] = logits.softmax(dim=1)
    return weights


def halved(keys: Tensor, members: Tensor, height: int) -> list[Tensor]:
    """Leaves of the balanced tree: members sorted along the axis that eight power iterations give, and halved."""
    if height == 0:
        return [members]
    centred = keys[members] - keys[members].mean(dim=0)
    covariance = centred.T @ centred
    axis = covariance[:, covariance.diagonal().argmax()]
    for _ in range(8):
        axis = covariance @ (axis / axis.norm())
    members = members[(centred @ axis).argsort(stable=True)]
    middle = (len(members) + 1) // 2
    return halved(keys, members[:middle], height - 1) + halved(keys, members[middle:], height - 1)


FUNCTIONS = {
    "relu": torch.relu,
    "elu_plus_one": lambda x: torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "abs": torch.abs,
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2 + 0.17,
}


def relu_kernel(q: Tensor, k: Tensor) -> Tensor:
    """E[relu(w . q) relu(w . k)] over w of N(0, I), up to a factor (Cho and Saul 2009, eq. 6)."""
    norms = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).unsqueeze(-2)
    cosines = (q @ k.transpose(-1, -2) / norms).clamp(-1, 1)
    angles = cosines.acos()
    return norms * (angles.sin() + (math.pi - angles) * cosines) / math.pi


def softmax_kernel_estimates(x: Tensor, y: Tensor, projection: Tensor) -> Tensor:
    """phi_r(x) phi_r(y) m for each row r of W: estimates of exp(x . y), for single vectors x and y."""
    return torch.exp(projection @ x - x @ x / 2) * torch.exp(projection @ y - y @ y / 2)


def damped_kernel_estimates(x: Tensor, y: Tensor, projection: Tensor, damping: float) -> Tensor:
    """The same by FAVOR++ (Likhosherstov et al. 2022, eq. 6): D exp(A |w|^2 + B w . x - |x|^2 / 2) for both."""
    d, b = x.shape[0], math.sqrt(1 - 4 * damping)
    constant = (1 - 4 * damping) ** (d / 4)
    squares = damping * (projection * projection).sum(-1)
    phi_x, phi_y = (constant * torch.exp(squares + b * projection @ z - z @ z / 2) for z in (x, y))
    return phi_x * phi_y


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


def _log_softmax_features(x: Tensor, projection: Tensor, damping: float = 0.0) -> Tensor:
    num_features, head_dim = projection.shape
    x, projection = x.double() * head_dim**-0.25, projection.double()
    products = math.sqrt(1 - 4 * damping) * x @ projection.T + damping * (projection * projection).sum(-1)
    return products - (x * x).sum(-1, keepdim=True) / 2 - math.log(num_features) / 2


def _products(x: Tensor, projection: Tensor | None) -> Tensor:
    x = x.double()
    return x if projection is None else x * x.shape[-1] ** -0.25 @ projection.double().T
