"""The encoder: token embedding, blocks of attention and a GELU feed-forward, LayerNorms, rotary positions.

In: tokens and segments of a batch of rows. Out: hidden states. The kind of attention is a plug
(`protformer.attention`); projections, rotary positions and dropout live here once for all kinds. The time is linear
in the length for linear kinds. Without autograd, everything but attention works in blocks along the residues, so that
nothing as wide as the feed-forward is ever as long as the row: a row of a million residues needs little more than its
states, queries, keys and values. So do layers that are computed again in the backward pass (activation checkpointing:
Chen et al. 2016), of which only the inputs are kept.

Source: pre-LN Transformer (Xiong et al. 2020), as in ESM-2 and in the released protein_lm; rotary positions (Su et
al. 2021) instead of the paper's learned absolute ones, so that no longest length is built in; optional normalisation of
queries and keys (Henry et al. 2020, with RMSNorm). For the weights of others, `ModelConfig` has the choices of ESM-1b,
ESM-2 and BERT: post-LN, learned positions, a norm of the embedding, token dropout.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protformer.alphabet import NUM_TOKENS, PAD
from protformer.attention import build_attention
from protformer.attention.sequence_group import SequenceGroup
from protformer.config import ModelConfig
from protformer.errors import ConfigError, InputError
from protformer.model.rotary import (
    neighbours_of_halves,
    positions_in_segments,
    rotary_angles,
    rotate,
    rotate_neighbours,
    split_and_rotate,
)
from protformer.model.token_dropout import scale_visible

Angles = tuple[Tensor, Tensor] | None
"""Cosine and sine of rotary positions; None where positions are learned."""

Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])

BLOCK_TOKENS = 16_384
"""Tokens (rows times residues) of a block: large enough for full speed of the matrix products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderOutput:
    """What the encoder gives for a batch of rows."""

    hidden: Float[Tensor, "batch residue channel"]
    """Hidden states; those of all layers went through the final LayerNorm."""


class Encoder(nn.Module):
    """A stack of attention and feed-forward blocks over rows of tokens."""

    def __init__(self, config: ModelConfig, *, seed: int) -> None:
        """`seed` decides the random features of linear attention, not the weights (those follow torch's generator)."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(NUM_TOKENS, config.hidden_size, padding_idx=PAD)
        learned = config.max_positions
        self.position_embedding = None if learned is None else nn.Embedding(learned, config.hidden_size)
        self.embedding_norm = _layer_norm(config) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer=layer, seed=seed) for layer in range(config.num_layers))
        self.final_norm = _layer_norm(config) if config.norm == "pre" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.group: SequenceGroup | None = None

    def forward(
        self,
        tokens: Int[Tensor, "batch residue"],
        segments: Int[Tensor, "batch residue"],
        *,
        num_layers: int | None = None,
    ) -> EncoderOutput:
        """Hidden states after `num_layers` blocks (default all; fewer blocks are not followed by the final norm)."""
        depth = self.config.num_layers if num_layers is None else num_layers
        x, angles = self._embed(tokens, segments)
        for block in list(self.blocks)[:depth]:
            x = block(x, angles, segments)
        return EncoderOutput(hidden=self.final_norm(x) if depth == self.config.num_layers else x)

    def states_at(
        self,
        tokens: Int[Tensor, "batch residue"],
        segments: Int[Tensor, "batch residue"],
        wanted: Bool[Tensor, "batch residue"],
    ) -> Float[Tensor, "place channel"]:
        """Hidden states of the wanted positions, row by row; the last layer's feed-forward works for no others."""
        x, angles = self._embed(tokens, segments)
        for block in list(self.blocks)[:-1]:
            x = block(x, angles, segments)
        states: Tensor = self.final_norm(self.blocks[-1](x, angles, segments, wanted=wanted))
        return states

    def attention_maps(
        self, tokens: Int[Tensor, "batch residue"], segments: Int[Tensor, "batch residue"]
    ) -> Iterator[Float[Tensor, "batch head residue residue"]]:
        """The attention matrices of each layer in turn: O(residue ** 2) memory, for one layer at a time."""
        for block, x, angles in self.layer_inputs(tokens, segments):
            q, k, _ = block.queries_keys_values(x, angles, any_order=block.attention.any_channel_order)
            yield block.attention.weights(q, k, segments)

    def attention_inputs(
        self, tokens: Int[Tensor, "batch residue"], segments: Int[Tensor, "batch residue"]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of each layer in turn, as the attention gets them."""
        for block, x, angles in self.layer_inputs(tokens, segments):
            yield block.queries_keys_values(x, angles)

    def layer_inputs(
        self, tokens: Int[Tensor, "batch residue"], segments: Int[Tensor, "batch residue"]
    ) -> Iterator[tuple["Block", Tensor, Angles]]:
        """Each layer in turn, with what it gets."""
        x, angles = self._embed(tokens, segments)
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block, x, angles
            x = block(x, angles, segments)

    def recompute_in_backward(self) -> None:
        """Keep only what enters each layer, and compute the rest again for the gradients (activation checkpointing)."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recomputes = True

    def compile_layers(self) -> None:
        """Let torch compile all of each layer but its attention, which works in blocks and threads of its own."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile_parts()

    def redraw_features(self, step: int) -> None:
        """Let every layer draw new random features if its schedule says so after `step` optimizer steps."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.redraw(step)

    def split_over(self, group: SequenceGroup | None) -> None:
        """From now on, rows are slices of windows whose other slices are on the other ranks of a group; None ends it.

        Raises ConfigError if the kind of attention, or token dropout, cannot do this.
        """
        if group is not None and self.config.token_dropout:
            raise ConfigError("model.token_dropout: counts the masked tokens of whole rows, and rows are to be split")
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.split_over(group)
        self.group = group

    def _embed(self, tokens: Tensor, segments: Tensor) -> tuple[Tensor, Angles]:
        positions = positions_in_segments(segments)
        if self.group is not None:
            window = self.group.window(segments)
            positions = positions + torch.where(window.came_before > 0, window.offsets[:, None], 0)
        x = self.embedding(tokens)
        if self.config.token_dropout:
            x = scale_visible(x, tokens, segments)
        if self.position_embedding is None:
            angles: Angles = rotary_angles(positions, self.config.head_dim, self.config.rotary_rounding)
        else:
            angles = None
            x = x + self.position_embedding(self._within_limit(positions, segments))
        return self.dropout(self.embedding_norm(x)), angles

    def _within_limit(self, positions: Tensor, segments: Tensor) -> Tensor:
        """Positions, those of padding replaced by 0. Raises InputError if one has no learned embedding."""
        limit = self.config.max_positions
        assert limit is not None
        positions = torch.where(segments > 0, positions, 0)
        if (self.group is not None or positions.shape[1] > limit) and int(positions.max()) >= limit:
            raise InputError(
                f"a row of {int(positions.max()) + 1:,} tokens, special ones included: this model has learned positions"
                f" for {limit:,} at most"
            )
        return positions


class Block(nn.Module):
    """x + Attention(LN(x)), then x + FeedForward(LN(x)); post-LN: LN(x + Attention(x)), LN(x + FeedForward(x))."""

    def __init__(self, config: ModelConfig, *, layer: int, seed: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.is_pre_norm = config.norm == "pre"
        self.attention_norm = _layer_norm(config)
        self.query_key_value = nn.Linear(size, 3 * size)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(config.head_dim) if config.qk_norm else nn.Identity() for _ in ("query", "key")
        )
        self.attention = build_attention(
            config.attention_of(layer),
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            causal=config.direction == "unidirectional",
            seed=seed,
            layer=layer,
        )
        self.attention_output = nn.Linear(size, size)
        self.feed_forward_norm = _layer_norm(config)
        self.feed_forward_input = nn.Linear(size, config.feed_forward_size)
        self.feed_forward_output = nn.Linear(config.feed_forward_size, size)
        self.dropout = nn.Dropout(config.dropout)
        self.recomputes = False
        """Whether the backward pass computes the block again, from nothing but its input, instead of keeping all."""

    def compile_parts(self) -> None:
        """Let torch compile what comes before and behind the attention."""
        for name in ("_project", "_after_attention"):
            setattr(self, name, torch.compile(getattr(self, name), fullgraph=True))

    def forward(
        self,
        x: Float[Tensor, "batch residue channel"],
        angles: Angles,
        segments: Int[Tensor, "batch residue"],
        *,
        wanted: Bool[Tensor, "batch residue"] | None = None,
    ) -> Float[Tensor, "*place channel"]:
        """The new states, of all positions or of the wanted ones."""
        computed: Tensor
        if self.recomputes and torch.is_grad_enabled():
            computed = self._recomputed(self._compute, x, angles, segments, wanted)
        else:
            computed = self._compute(x, angles, segments, wanted)
        return computed

    def _compute(
        self, x: Tensor, angles: Angles, segments: Tensor, wanted: Tensor | None
    ) -> Float[Tensor, "*place channel"]:
        q, k, v = self.queries_keys_values(x, angles, any_order=self.attention.any_channel_order)
        with self._attention_precision(x):
            attended = self.attention(q, k, v, segments).transpose(1, 2)
        if wanted is None:
            return self._finish(x, attended)
        return self._finish(x[wanted].unsqueeze(0), attended[wanted].unsqueeze(0)).squeeze(0)

    def _finish(
        self, x: Float[Tensor, "batch residue channel"], attended: Float[Tensor, "batch residue head head_dim"]
    ) -> Float[Tensor, "batch residue channel"]:
        def finish(part: slice) -> tuple[Tensor]:
            return (self._after_attention(x[:, part], attended[:, part].flatten(2)),)

        if self.recomputes and torch.is_grad_enabled():
            # Of what is as wide as the feed-forward, the backward pass then holds one block at a time.
            parts = [self._recomputed(finish, part)[0] for part in block_slices(x)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        (finished,) = in_blocks(finish, x, dim=1)
        return finished

    def _recomputed(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=self.dropout.p > 0)

    def queries_keys_values(
        self, x: Float[Tensor, "batch residue channel"], angles: Angles, *, any_order: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (batch, head, residue, head_dim); the former two rotated by their angles.

        With `any_order` the channels of queries and keys may come in another order, the same for both.
        """
        with self._attention_precision(x):
            in_pairs = any_order and angles is not None and self._turns_pairs_faster(x)

            def project(part: slice) -> tuple[Tensor, Tensor, Tensor]:
                turn = None if angles is None else (angles[0][:, :, part], angles[1][:, :, part])
                return self._project_in_pairs(x[:, part], turn) if in_pairs else self._project(x[:, part], turn)

            return in_blocks(project, x, dim=2)

    def _attention_precision(self, x: Tensor) -> AbstractContextManager[object]:
        """Sharp attention and its projections are in float32 in bf16 inference on CPUs.

        Embeddings of ESM-2 8M are then 2.5 times closer to those in float32, for 2 to 5 % of the speed; with 640 and
        1,280 channels, where projections are more of the work, for 15 and 21 % (Zen 4, proteins of up to 1,000).
        """
        if torch.compiler.is_compiling() or not (
            self.attention.is_sharp
            and torch.is_inference_mode_enabled()
            and x.device.type == "cpu"
            and x.dtype == torch.float32
        ):
            return nullcontext()
        return torch.autocast("cpu", enabled=False)

    def _project(self, x: Float[Tensor, "batch residue channel"], angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        projected = self.query_key_value(self.attention_norm(x) if self.is_pre_norm else x)
        projected = projected.unflatten(-1, (3, self.num_heads, -1))
        if angles is not None and isinstance(self.query_norm, nn.Identity) and not torch.compiler.is_compiling():
            return split_and_rotate(projected, *angles)
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q), self.key_norm(k)
        return (q, k, v) if angles is None else (rotate(q, *angles), rotate(k, *angles), v)

    def _turns_pairs_faster(self, x: Tensor) -> bool:
        """Where `_project_in_pairs` is for: float32 inference on CPUs. Training, validation included, has one path."""
        return (
            torch.is_inference_mode_enabled()
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and isinstance(self.query_norm, nn.Identity)
            and type(self.query_key_value) is nn.Linear  # an adapter has weights of its own
        )

    def _project_in_pairs(
        self, x: Float[Tensor, "batch residue channel"], angles: Angles
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_project`, with the channels of a rotary pair side by side: turned in their place, and never copied.

        What is reordered is the weight, which is smaller than what comes of it.
        """
        assert angles is not None
        size = x.shape[-1]
        order = torch.arange(3 * size)
        order[: 2 * size] = neighbours_of_halves(2 * self.num_heads, size // self.num_heads)
        weight, bias = self.query_key_value.weight[order], self.query_key_value.bias[order]
        projected = F.linear(self.attention_norm(x) if self.is_pre_norm else x, weight, bias)
        heads = projected.unflatten(-1, (3 * self.num_heads, -1))
        rotate_neighbours(heads[:, :, : 2 * self.num_heads], *angles)
        q, k, v = heads.transpose(1, 2).chunk(3, dim=1)
        return q, k, v

    def _after_attention(
        self, x: Float[Tensor, "batch residue channel"], attended: Float[Tensor, "batch residue channel"]
    ) -> Float[Tensor, "batch residue channel"]:
        with self._attention_precision(x):
            x = x + self.dropout(self.attention_output(attended))
        fed: Tensor
        if self.is_pre_norm:
            fed = x + self._feed_forward(self.feed_forward_norm(x))
        else:
            x = self.attention_norm(x)
            fed = self.feed_forward_norm(x + self._feed_forward(x))
        return fed

    def _feed_forward(self, x: Tensor) -> Tensor:
        fed: Tensor = self.dropout(self.feed_forward_output(F.gelu(self.feed_forward_input(x))))
        return fed


def _layer_norm(config: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)


def in_blocks(compute: Callable[[slice], Tensors], x: Float[Tensor, "batch residue channel"], *, dim: int) -> Tensors:
    """What `compute` gives for all residues of x, along its dimension `dim`; in blocks where autograd keeps nothing.

    The parts go into their places one by one: collecting them first would hold everything twice.
    """
    length, blocks = x.shape[1], block_slices(x)
    if torch.is_grad_enabled() or len(blocks) == 1:
        return compute(slice(0, length))
    joined: list[Tensor] = []
    for block in blocks:
        parts = compute(block)
        joined = joined or [part.new_empty((*part.shape[:dim], length, *part.shape[dim + 1 :])) for part in parts]
        for whole, part in zip(joined, parts, strict=True):
            whole.narrow(dim, block.start, part.shape[dim]).copy_(part)
    return cast(Tensors, tuple(joined))


def block_slices(x: Float[Tensor, "batch residue channel"]) -> list[slice]:
    """The residues of x in blocks of about BLOCK_TOKENS tokens."""
    batch, length, _ = x.shape
    size = max(1, BLOCK_TOKENS // batch)
    return [slice(start, min(start + size, length)) for start in range(0, max(1, length), size)]


@torch.no_grad()
def initialize_weights(module: nn.Module, *, num_layers: int) -> None:
    """Draw the weights so that every layer keeps the variance of what it gets, whatever the width.

    Matrices are normal with std fan_in ** -0.5 (LeCun et al. 1998), smaller by sqrt(2 layers) where a block adds to
    the residual stream (GPT-2, Radford et al. 2019, section 2.3); the embedding has std channel ** -0.5, since its
    transpose makes the logits. Biases are zero, norms the identity. In the first minutes of training this learns
    several times faster than BERT's 0.02.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            into_residual = name.endswith(("attention_output", "feed_forward_output"))
            scale = (2 * num_layers) ** -0.5 if into_residual else 1.0
            nn.init.normal_(child.weight, std=scale * child.in_features**-0.5)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=child.embedding_dim**-0.5)
            if child.padding_idx is not None:
                child.weight[child.padding_idx].zero_()
