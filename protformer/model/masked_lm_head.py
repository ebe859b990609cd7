"""The head that turns hidden states into logits over the 33 tokens, and the whole language model around it.

In: hidden states. Out: logits. The same head serves the masked (bidirectional) and the next-residue (unidirectional)
task: what differs is what the inputs show and which targets are asked for. Its shape is that of BERT and ESM: dense,
GELU, LayerNorm, then the transposed token embedding with a bias of its own (Devlin et al. 2019).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from protformer.alphabet import NUM_TOKENS
from protformer.config import ModelConfig
from protformer.model.contact_head import ContactHead
from protformer.model.encoder import Encoder, initialize_weights


class MaskedLmHead(nn.Module):
    """Logits from hidden states, with the token embedding as the last matrix."""

    def __init__(self, hidden_size: int, *, norm_epsilon: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=norm_epsilon)
        self.bias = nn.Parameter(torch.zeros(NUM_TOKENS))

    def forward(
        self, hidden: Float[Tensor, "*batch channel"], embedding: Float[Tensor, "token channel"]
    ) -> Float[Tensor, "*batch token"]:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), embedding, self.bias)


class ProteinLanguageModel(nn.Module):
    """Encoder and heads: what a model folder holds."""

    def __init__(self, config: ModelConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, seed=seed)
        self.head = MaskedLmHead(config.hidden_size, norm_epsilon=config.norm_epsilon)
        self.contact_head = (
            ContactHead(num_layers=config.num_layers, num_heads=config.num_heads) if config.contact_head else None
        )
        initialize_weights(self, num_layers=config.num_layers)

    @torch.no_grad()
    def start_from_counts(self, token_counts: list[int]) -> None:
        """Set the output bias to the log frequencies of a corpus, so that training starts at the unigram baseline.

        `token_counts` has a number for each of the 33 tokens; each gets one pseudo-count, so that none is impossible.
        """
        counts = torch.tensor(token_counts, dtype=torch.float64) + 1.0
        self.head.bias.copy_((counts / counts.sum()).log())

    def forward(
        self,
        tokens: Int[Tensor, "batch residue"],
        segments: Int[Tensor, "batch residue"],
        asked: Bool[Tensor, "batch residue"] | None = None,
    ) -> Float[Tensor, "*position token"]:
        """Logits of every position, or of those that are asked for, in their order."""
        if asked is None:
            return self.logits(self.encoder(tokens, segments).hidden)
        return self.logits(self.encoder.states_at(tokens, segments, asked))

    def logits(self, hidden: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch token"]:
        """Logits of chosen hidden states, so that a loss on a few positions pays for those only."""
        logits: Tensor = self.head(hidden, self.encoder.embedding.weight)
        return logits
