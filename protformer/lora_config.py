"""The choice of low-rank adapters in `config`."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from protformer.attention_config import require

LoraTarget = Literal["query_key_value", "attention_output", "feed_forward_input", "feed_forward_output"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters beside linear layers, in place of training all weights (Hu et al. 2022)."""

    rank: int = 8
    alpha: int = 16
    """The update is alpha / rank times the product of the adapter's two matrices."""
    targets: list[LoraTarget] = field(default_factory=lambda: list(get_args(LoraTarget)))
    """Layers of each block that get an adapter."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "training.lora.rank", self.rank, "at least 1")
        require(self.alpha >= 1, "training.lora.alpha", self.alpha, "at least 1")
        require(len(self.targets) > 0, "training.lora.targets", self.targets, "at least one layer")
