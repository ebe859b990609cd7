"""How far a model's attention is from exact attention with the same weights, layer by layer.

In: an encoder, one with exact attention (the teacher), and tokens. Out: for each layer the squared error of the
attended values over their variance, both layers given the teacher's hidden states, so that one layer's error is not
another's; and the error of the hidden states once all layers follow each other. Cost: that of exact attention.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from protformer.attention.exact import ExactAttention
from protformer.config import ExactConfig
from protformer.evaluation.model_readiness import hidden_by_layer
from protformer.model.encoder import Block, Encoder
from protformer.model.masked_lm_head import ProteinLanguageModel


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionError:
    """One layer of a model."""

    layer: int
    """Counted from 1."""
    relative_error: float
    """Squared error of the attended values over their variance; 1 is what the mean of all residues gives."""
    hidden_error: float
    """Relative error of the hidden states after this layer."""


def compare_with_exact(
    model: ProteinLanguageModel, proteins: Iterable[Sequence[int]], *, advance: Callable[[int], object]
) -> list[AttentionError]:
    """Means over proteins, which are residue tokens."""
    exact = _with_exact(model)
    errors, hidden = [], []
    for protein in proteins:
        before, behind = model.config.frame
        tokens = torch.tensor([[*before, *protein, *behind]], device=model.head.bias.device)
        with torch.no_grad():
            errors.append(attention_errors(model.encoder, exact.encoder, tokens, torch.ones_like(tokens)))
        states = zip(hidden_by_layer(model, tokens), hidden_by_layer(exact, tokens), strict=True)
        hidden.append(torch.stack([(ours - true).norm() / true.norm() for ours, true in states]))
        advance(1)
    means = zip(torch.stack(errors).mean(dim=0).tolist(), torch.stack(hidden).mean(dim=0).tolist(), strict=True)
    return [
        AttentionError(layer=layer, relative_error=error, hidden_error=hidden_error)
        for layer, (error, hidden_error) in enumerate(means, start=1)
    ]


def attention_errors(
    student: Encoder,
    teacher: Encoder,
    tokens: Int[Tensor, "batch residue"],
    segments: Int[Tensor, "batch residue"],
) -> Float[Tensor, " layer"]:
    """Squared error over variance of each layer's attended values; gradients reach the student only."""
    with torch.no_grad():
        layers = list(teacher.layer_inputs(tokens, segments))
    errors = []
    for (block, x, angles), own in zip(layers, student.blocks, strict=True):
        assert isinstance(own, Block)
        with torch.no_grad():
            wanted = block.attention(*block.queries_keys_values(x, angles), segments)
        attended = own.attention(*own.queries_keys_values(x, angles), segments)
        errors.append(_error_over_variance(attended, wanted, segments > 0))
    return torch.stack(errors)


def _error_over_variance(
    attended: Float[Tensor, "batch head residue head_dim"],
    wanted: Float[Tensor, "batch head residue head_dim"],
    is_residue: Bool[Tensor, "batch residue"],
) -> Float[Tensor, ""]:
    """Both are zero at padding."""
    mean = wanted.float().sum(dim=(0, 2), keepdim=True) / is_residue.sum()
    deviations = (wanted.float() - mean) * is_residue[:, None, :, None]
    return (attended.float() - wanted.float()).square().sum() / deviations.square().sum()


def _with_exact(model: ProteinLanguageModel) -> ProteinLanguageModel:
    """The model with exact attention in all layers, sharing its weights."""
    shallow = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    causal = model.config.direction == "unidirectional"
    for layer, block in enumerate(shallow.encoder.blocks):
        block.attention = ExactAttention(ExactConfig(), head_dim=0, num_heads=0, causal=causal, seed=0, layer=layer)
    return shallow.eval()
