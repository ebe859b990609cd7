"""The choice of attention in `config`: one frozen dataclass a kind, told apart by `kind`, with its defaults."""

from dataclasses import dataclass
from typing import Literal

from protformer.errors import ConfigError

GeneralizedFunction = Literal["relu", "elu_plus_one", "sigmoid", "exp", "abs", "gelu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FavorConfig:
    """FAVOR+ for the softmax kernel with positive random features (Choromanski et al. 2021, section 2.3)."""

    kind: Literal["favor"] = "favor"
    features: Literal["positive", "hyperbolic", "favor++"] = "hyperbolic"
    """`positive` is the paper's SM+; `hyperbolic` has each projection with both signs, which has less variance;
    `favor++` damps large projections as is best for the queries and keys that training has seen."""
    num_features: int = 256
    """m in the paper."""
    orthogonal: bool = True
    row_norms: Literal["chi", "sqrt_d"] = "sqrt_d"
    """Length of a projection row: that of a Gaussian vector (unbiased), or sqrt(head_dim) (SMREG, less variance)."""
    rescale: bool = False
    """Divide each channel of the keys, and multiply that of the queries, so that both have the size that training has
    seen of their product (SADERF): exact for the kernel, less variance where they differ."""
    covariance: Literal["identity", "diagonal"] = "identity"
    """`diagonal` learns a scale for each rotary pair of channels, and so the covariance of the features."""
    redraw_every_steps: int = 1000
    """0 keeps the first draw for good."""

    def __post_init__(self) -> None:
        _require_counts(self.num_features, self.redraw_every_steps)
        if self.features == "hyperbolic":
            _require_pairs(self.num_features, "hyperbolic features")
        if self.features == "favor++":
            allowed = "chi with model.attention.features favor++, whose damping depends on the lengths of rows"
            require(self.row_norms == "chi", "model.attention.row_norms", self.row_norms, allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneralizedConfig:
    """Generalized attention, phi(x) = f(W x) + epsilon (Choromanski et al. 2021, eq. 5 and appendix A.4)."""

    kind: Literal["generalized"] = "generalized"
    function: GeneralizedFunction = "relu"
    """Those of the paper's appendix D.3 whose features are not negative; gelu is raised by 0.17 to be of them."""
    projection: Literal["mirrored", "orthogonal", "iid", "none"] = "mirrored"
    """`mirrored`: orthogonal rows of one length, each with both signs: a fifth of the mean square error for relu, in
    less time, and less error for others (for abs, to which both signs are one, it is `orthogonal`). `orthogonal` is the
    paper's. `none` applies the function to the head vector itself, the released protein_lm's "deterministic" features.
    """
    num_features: int = 256
    """Unused without a projection: there are then head_dim features."""
    epsilon: float = 1e-3
    """Unused with exp, which is above zero by itself and is kept from overflowing by a factor that cancels."""
    redraw_every_steps: int = 1000

    def __post_init__(self) -> None:
        _require_counts(self.num_features, self.redraw_every_steps)
        if self.is_mirrored:
            _require_pairs(self.num_features, "mirrored projections")
        require(self.epsilon > 0, "model.attention.epsilon", self.epsilon, "above 0")

    @property
    def is_mirrored(self) -> bool:
        """Whether rows of the projection have both signs."""
        return self.projection == "mirrored" and self.function != "abs"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactConfig:
    """Softmax attention, computed exactly by torch's scaled_dot_product_attention: O(residue ** 2) time."""

    kind: Literal["exact"] = "exact"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusteredConfig:
    """Softmax attention to the keys of a few clusters, and to other clusters as wholes: O(residue ** 1.5) time."""

    kind: Literal["clustered"] = "clustered"
    clusters_per_query: int = 8
    """Clusters whose keys a query attends to one by one."""
    cluster_size: int = 8
    """About as many keys make a cluster; more in proteins of more than (2 cluster_size)^2 residues."""

    def __post_init__(self) -> None:
        require(
            self.clusters_per_query >= 1, "model.attention.clusters_per_query", self.clusters_per_query, "at least 1"
        )
        require(self.cluster_size >= 2, "model.attention.cluster_size", self.cluster_size, "at least 2")


AttentionConfig = FavorConfig | GeneralizedConfig | ExactConfig | ClusteredConfig


def require(holds: bool, path: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{path}: {value!r} is not allowed; it must be {allowed}")


def _require_counts(num_features: int, redraw_every_steps: int) -> None:
    require(num_features >= 1, "model.attention.num_features", num_features, "at least 1")
    require(redraw_every_steps >= 0, "model.attention.redraw_every_steps", redraw_every_steps, "0 (never) or more")


def _require_pairs(num_features: int, what: str) -> None:
    require(num_features % 2 == 0, "model.attention.num_features", num_features, f"even: {what} come in pairs")
