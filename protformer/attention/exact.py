"""Exact softmax attention by torch's fused kernels: the yardstick for the linear kinds.

Time is O(residue ** 2) within each segment; memory is linear wherever torch has a fused kernel.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protformer.attention.interface import Attention, AttentionWeights, Heads, Segments
from protformer.attention.segments import runs, visible_pairs
from protformer.config import ExactConfig


class ExactAttention(Attention):
    """softmax(q k^T / sqrt(head_dim)) v; has neither parameters nor features, so seed and layer do not matter."""

    any_channel_order = True
    is_sharp = True

    def __init__(
        self, config: ExactConfig, *, head_dim: int, num_heads: int, causal: bool, seed: int, layer: int
    ) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Heads, k: Heads, v: Heads, segments: Segments) -> Heads:
        q, k = q.to(v.dtype), k.to(v.dtype)
        largest = segments.amax(dim=1, keepdim=True)
        if bool((segments == segments[:, :1]).all() & (segments > 0).all()):
            return self._attend(q, k, v)
        if not self.causal and bool(((segments == 0) | (segments == largest)).all()):
            return _attend_without_padding_keys(q, k, v, segments)
        rows = zip(segments, q.split(1), k.split(1), v.split(1), strict=True)
        attended = [self._attend_by_segment(*row).transpose(1, 2) for row in rows]
        return (attended[0] if len(attended) == 1 else torch.cat(attended)).transpose(1, 2)

    def weights(self, q: Heads, k: Heads, segments: Segments) -> AttentionWeights:
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            logits = (q.to(dtype) / math.sqrt(q.shape[-1])) @ k.to(dtype).transpose(-1, -2)
        visible = visible_pairs(segments, causal=self.causal)
        # A row of -inf alone (padding) would give NaN; any finite row will do there, as it is zeroed.
        sees_any = visible.any(dim=-1, keepdim=True)
        return logits.masked_fill(~visible & sees_any, -torch.inf).softmax(-1).masked_fill(~visible, 0)

    def _attend(self, q: Heads, k: Heads, v: Heads) -> Heads:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).to(v.dtype)

    def _attend_by_segment(
        self,
        segments: Int[Tensor, " residue"],
        q: Float[Tensor, "1 head residue head_dim"],
        k: Float[Tensor, "1 head residue head_dim"],
        v: Float[Tensor, "1 head residue head_dim"],
    ) -> Float[Tensor, "1 head residue head_dim"]:
        ids, lengths = zip(*runs(segments), strict=True)
        parts = zip(ids, q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
        attended = [self._attend(q, k, v) if id_ else torch.zeros_like(v) for id_, q, k, v in parts]
        # Joined in the order in which torch's kernels write on CPUs, and in which the heads of a residue are joined.
        return torch.cat([part.transpose(1, 2) for part in attended], dim=1).transpose(1, 2)


def _attend_without_padding_keys(q: Heads, k: Heads, v: Heads, segments: Segments) -> Heads:
    is_residue = segments > 0
    # With no key allowed some of torch's kernels give NaN; a row of nothing but padding is zeroed below instead.
    allowed = is_residue | ~is_residue.any(dim=1, keepdim=True)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None, None, :]).to(v.dtype)
    return attended.masked_fill(~is_residue[:, None, :, None], 0)
