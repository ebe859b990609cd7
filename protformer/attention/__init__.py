"""The attention kinds and how one is built from its configuration: a new kind is one file and one line here."""

from protformer.attention.clustered import ClusteredAttention
from protformer.attention.exact import ExactAttention
from protformer.attention.favor import FavorAttention
from protformer.attention.generalized import GeneralizedAttention
from protformer.attention.interface import Attention
from protformer.config import AttentionConfig

ATTENTION_KINDS: dict[str, type[Attention]] = {
    "favor": FavorAttention,
    "generalized": GeneralizedAttention,
    "clustered": ClusteredAttention,
    "exact": ExactAttention,
}


def build_attention(
    config: AttentionConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
) -> Attention:
    """The attention of one layer; `seed` and `layer` (and no global state) decide its random features."""
    kind = ATTENTION_KINDS[config.kind]
    return kind(config, head_dim=head_dim, num_heads=num_heads, causal=causal, seed=seed, layer=layer)
