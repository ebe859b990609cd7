"""A model folder with a small untrained model whose weights are large enough to matter."""

import torch

from protformer.alphabet import FIRST_RESIDUE, NUM_TOKENS
from protformer.checkpoint import save_model
from protformer.config import ModelConfig
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import ModelDescription


def write_model(folder, attention, direction="bidirectional"):
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=2, num_heads=2, hidden_size=16, feed_forward_size=24, attention=attention, direction=direction
    )
    model = ProteinLanguageModel(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    counts = [0] * FIRST_RESIDUE + [10] * 25 + [0] * (NUM_TOKENS - FIRST_RESIDUE - 25)
    save_model(folder, model, ModelDescription(model=config, residue_counts=counts))
    return folder
