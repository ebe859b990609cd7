"""From a case to something that can be run: inputs allocated, module built, nothing computed yet.

In: a `Case`. Out: a function without arguments that computes it once. Inputs are standard normal, weights are drawn
from a fixed seed, and the gradient that comes in at the output of attention is a constant. A forward pass runs
without autograd, as in inference. bf16 attention gets bf16 tensors; a bf16 model runs under autocast, as it would be
trained.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protformer.alphabet import FIRST_RESIDUE, LAST_RESIDUE
from protformer.attention import build_attention
from protformer.attention.interface import Attention, AttentionWeights, Heads, Segments
from protformer.benchmark.cases import IDENTITY, Case
from protformer.benchmark.peers import peer_attention, peer_model
from protformer.config import ExactConfig, ModelConfig
from protformer.device import choose_device
from protformer.model.masked_lm_head import ProteinLanguageModel

Run: TypeAlias = Callable[[], object]
SharedInputs: TypeAlias = dict[tuple[object, ...], list[Tensor]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class IdentityAttention(Attention):
    """Returns the values: a model's cost without attention."""

    def forward(self, q: Heads, k: Heads, v: Heads, segments: Segments) -> Heads:
        return v

    def weights(self, q: Heads, k: Heads, segments: Segments) -> AttentionWeights:
        batch, head, residue, _ = q.shape
        return torch.eye(residue, device=q.device).expand(batch, head, -1, -1)


def prepare(case: Case, inputs: SharedInputs | None = None) -> Run:
    """Allocate what the case needs; cases of the same shape and dtype share the tensors in `inputs`."""
    inputs = {} if inputs is None else inputs
    return _prepare_attention(case, inputs) if case.model is None else _prepare_model(case, case.model, inputs)


def model_of_kind(config: ModelConfig, kind: str, case: Case) -> ProteinLanguageModel:
    """A model of these sizes with the case's attention, the same weights for every kind."""
    attention = ExactConfig() if kind == IDENTITY else case.attention_config()
    fields = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    torch.manual_seed(0)
    model = ProteinLanguageModel(ModelConfig(**(fields | {"attention": attention})), seed=0)
    if kind == IDENTITY:
        for block in model.encoder.blocks:
            block.attention = IdentityAttention()
    return model


def _prepare_attention(case: Case, inputs: SharedInputs) -> Run:
    device, dtype = choose_device(case.device), DTYPES[case.dtype]
    shape = (case.batch, case.heads, case.length, case.head_dim)
    if (shape, dtype) not in inputs:
        generator = torch.Generator().manual_seed(0)
        inputs[shape, dtype] = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    q, k, v, gradient = inputs[shape, dtype]
    attend = _attention(case, device)

    def forward() -> object:
        with torch.no_grad():
            return attend(q, k, v)

    def forward_and_backward() -> object:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, gradient)

    return forward if case.passes == "forward" else forward_and_backward


def _attention(case: Case, device: torch.device) -> Callable[..., Tensor]:
    if case.implementation == "performer-pytorch":
        torch.manual_seed(0)
        return peer_attention(case).to(device)
    module: nn.Module = build_attention(
        case.attention_config(),
        head_dim=case.head_dim,
        num_heads=case.heads,
        causal=case.direction == "unidirectional",
        seed=0,
        layer=0,
    ).to(device)
    segments = torch.ones(case.batch, case.length, dtype=torch.int64, device=device)
    return lambda q, k, v: module(q, k, v, segments)


def _prepare_model(case: Case, config: ModelConfig, inputs: SharedInputs) -> Run:
    device = choose_device(case.device)
    shape = (case.batch, case.length)
    if shape not in inputs:
        generator = torch.Generator().manual_seed(0)
        inputs[shape] = [torch.randint(FIRST_RESIDUE, LAST_RESIDUE + 1, shape, generator=generator).to(device)]
    (tokens,) = inputs[shape]
    model, arguments = _model(case, config, tokens)
    model = model.to(device)

    def logits() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.dtype == "bf16"):
            computed: Tensor = model(*arguments)
        return computed

    def forward() -> object:
        with torch.no_grad():
            return logits()

    def forward_and_backward() -> object:
        loss = F.cross_entropy(logits().float().flatten(0, 1), tokens.flatten())
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    return forward if case.passes == "forward" else forward_and_backward


def _model(case: Case, config: ModelConfig, tokens: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model in the mode of its pass, and what it is called with."""
    is_training = case.passes == "forward+backward"
    if case.implementation == "performer-pytorch":
        torch.manual_seed(0)
        return peer_model(case).train(is_training), (tokens,)
    return model_of_kind(config, case.kind, case).train(is_training), (tokens, torch.ones_like(tokens))
