"""The processes that train one model together: who has which rows, how they are set up, and sums over them.

In: the configuration and the number of processes (ranks). Out: a Lightning strategy, a model whose weights are spread
and whose windows are split as asked for, and numbers that are the same on all ranks. With context_parallel = c, ranks
0 to c - 1 hold the parts of the same rows, ranks c to 2 c - 1 those of others, and so on. Gradients are sums over all
ranks of the gradient of (loss sum of a rank / positions asked for on all ranks), whatever a rank's share is: its rows
or its part of rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from protformer.attention.sequence_group import SequenceGroup
from protformer.config import TrainingConfig, parse_duration
from protformer.errors import ConfigError, LostRankError
from protformer.model.masked_lm_head import ProteinLanguageModel

Anything = TypeVar("Anything")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLayout:
    """Which rows, and which part of them, a rank has."""

    num_ranks: int
    context_parallel: int

    def __post_init__(self) -> None:
        if self.num_ranks % self.context_parallel:
            raise ConfigError(
                f"training.context_parallel: rows split over {self.context_parallel} devices do not go with"
                f" {self.num_ranks} devices in all (devices x nodes); that must be a multiple"
            )

    @property
    def num_data_ranks(self) -> int:
        """Groups of ranks that have rows of their own."""
        return self.num_ranks // self.context_parallel

    def data_rank(self, rank: int) -> int:
        return rank // self.context_parallel

    def part(self, rank: int, length: int) -> slice:
        """The positions of a row of this length that a rank has."""
        size = length // self.context_parallel
        start = rank % self.context_parallel * size
        return slice(start, start + size)


def build_strategy(config: TrainingConfig, *, num_ranks: int) -> Strategy | str:
    """Lightning's part of it; over NCCL on GPUs, over gloo on CPUs."""
    timeout = timedelta(seconds=parse_duration(config.rank_timeout, "training.rank_timeout"))
    if num_ranks == 1:
        return "auto"
    if config.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=num_ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout
        )
    return DDPStrategy(broadcast_buffers=False, timeout=timeout)


def cluster_environment() -> ClusterEnvironment | None:
    """SLURM's, without Lightning's way of requeuing a job, which would know nothing of this package's checkpoints."""
    return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None


def spread_model(model: ProteinLanguageModel, config: TrainingConfig, mesh: DeviceMesh | None) -> None:
    """Split windows over groups of ranks, and with a mesh the weights over all ranks (FSDP2, torch's fully_shard)."""
    if config.context_parallel > 1:
        starts = range(0, dist.get_world_size(), config.context_parallel)
        groups = [dist.new_group(range(start, start + config.context_parallel)) for start in starts]
        model.encoder.split_over(SequenceGroup(groups[dist.get_rank() // config.context_parallel]))
    if mesh is None:
        return
    for module in (*model.encoder.blocks, model):
        sharded = fully_shard(module, mesh=mesh)
        # Sums, not means; gloo has no sums that are scaled on the way.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


@contextmanager
def whole_windows(model: ProteinLanguageModel) -> Iterator[None]:
    """Let each rank give the model rows of its own for a while."""
    group = model.encoder.group
    if group is None:
        yield
        return
    model.encoder.split_over(None)
    try:
        yield
    finally:
        model.encoder.split_over(group)


def is_sharded(model: ProteinLanguageModel) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_weights(model: ProteinLanguageModel) -> dict[str, Tensor]:
    """The state dict, gathered on the CPU of the first rank; all ranks must ask for it."""
    if not is_sharded(model):
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Tensor] = get_model_state_dict(model, options=options)  # type: ignore[assignment]
    return weights


def local_part(x: Tensor) -> Tensor:
    """Of a sharded tensor, what lies on this rank."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """Of a sharded tensor, all of it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def over_ranks(trainer: pl.Trainer, numbers: Sequence[float | int], operation: str) -> list[float]:
    """Elementwise `sum`, `min` or `max` over all ranks."""
    if trainer.world_size == 1:
        return [float(number) for number in numbers]
    own = torch.tensor(numbers, dtype=torch.float64, device=trainer.strategy.root_device)
    over_all: Tensor = trainer.strategy.reduce(own, reduce_op=operation)
    return over_all.tolist()


def gather_over_ranks(x: Anything) -> list[Anything]:
    """An object of each rank, in their order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [x]
    gathered = [x] * dist.get_world_size()
    dist.all_gather_object(gathered, x)
    return gathered


@contextmanager
def losses_of_ranks_told(config: TrainingConfig) -> Iterator[None]:
    """Make one clear error of what torch says in many ways when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        is_initialized = dist.is_available() and dist.is_initialized()
        if not isinstance(error, dist.DistError) and not (is_initialized and "gloo" in str(error).lower()):
            raise
        reason = str(error).splitlines()[0].removesuffix(".")[:300]
        raise LostRankError(
            f"the processes of this job lost each other: one has died, or did not answer for {config.rank_timeout}"
            f" (training.rank_timeout); the last checkpoint is kept; add --resume to go on from it ({reason})"
        ) from error
