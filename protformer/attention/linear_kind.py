"""What the kinds with a feature map share: everything but the map."""

from abc import abstractmethod
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from protformer.attention.block_work import Values, compute_dtype
from protformer.attention.causal import attend_to_past
from protformer.attention.feature_maps import FeatureMap
from protformer.attention.interface import Attention, AttentionWeights, Heads, Segments
from protformer.attention.linear import attend_to_all
from protformer.attention.linear_across_ranks import attend_to_all_across_ranks, attend_to_past_across_ranks
from protformer.attention.past import Past, attend_one_step, no_past
from protformer.attention.random_features import RandomFeatures
from protformer.attention.sequence_group import SequenceGroup
from protformer.attention.weights import weights_by_identity


class LinearAttention(Attention):
    """Attention with weights phi(q) . phi(k), in linear time."""

    random_features: RandomFeatures | None

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.group: SequenceGroup | None = None
        """The ranks over which windows are split."""

    @abstractmethod
    def feature_map(self, head_dim: int, dtype: torch.dtype) -> FeatureMap:
        """phi, with the projection as it is now."""

    def prepare(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        """What becomes of queries and keys before phi; nothing, unless a kind has other wishes."""
        return q, k

    def forward(self, q: Heads, k: Heads, v: Heads, segments: Segments) -> Heads:
        return self._attend(q, k, v, segments)

    def weights(self, q: Heads, k: Heads, segments: Segments) -> AttentionWeights:
        return weights_by_identity(partial(self._attend, plain=True), q, k, segments)

    def split_over(self, group: SequenceGroup | None) -> None:
        self.group = group

    def redraw(self, step: int) -> None:
        if self.random_features is not None:
            self.random_features.redraw(step)

    def initial_state(self, q: Heads, v: Values) -> Past:
        """What a causal model remembers before the first residue; of the tensors, only sizes and dtypes matter."""
        return no_past(q, v, self.feature_map(q.shape[-1], compute_dtype(q, v)).plain)

    def step(
        self,
        q: Float[Tensor, "batch head 1 head_dim"],
        k: Float[Tensor, "batch head 1 head_dim"],
        v: Float[Tensor, "batch head 1 value_dim"],
        state: Past,
    ) -> tuple[Float[Tensor, "batch head 1 value_dim"], Past]:
        """What `forward` gives for the next residue of a protein, and the state after it, in constant time."""
        q, k = self.prepare(q, k)
        return attend_one_step(q, k, v, state, self.feature_map(q.shape[-1], compute_dtype(q, k, v)).plain)

    def _attend(self, q: Heads, k: Heads, v: Values, segments: Segments, *, plain: bool = False) -> Values:
        """`plain` features are never negative, so that no rounding makes a weight negative."""
        q, k = self.prepare(q, k)
        feature_map = self.feature_map(q.shape[-1], compute_dtype(q, k, v))
        if self.group is not None:
            attend_across = attend_to_past_across_ranks if self.causal else attend_to_all_across_ranks
            return attend_across(q, k, v, segments, feature_map.plain, self.group)
        attend = attend_to_past if self.causal else attend_to_all
        return attend(q, k, v, segments, feature_map.plain if plain else feature_map)
