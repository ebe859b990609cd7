"""Token stores to training batches: one of the two places where NumPy becomes torch.

In: a corpus, perhaps validation stores, and the run's configuration. Out: `TrainingBatch`es without end, each with the
position behind it. What was consumed, not what was prefetched, is the state that a checkpoint keeps.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from protformer.alphabet import FIRST_RESIDUE, LAST_RESIDUE
from protformer.config import RunConfig
from protformer.corpus.evaluation_rows import EVALUATION_RATE, evaluation_rows
from protformer.corpus.masking import IGNORE, MaskedRow, mask_row, shift_row
from protformer.corpus.packing import RowPacking, RowPlan, build_packing
from protformer.corpus.row_stream import SamplerPosition, position_behind, row_generator, row_plans
from protformer.corpus.sampling import Corpus
from protformer.corpus.token_store import TokenStore
from protformer.errors import ConfigError
from protformer.evaluation.masked_lm import MaskedBatch
from protformer.training.ranks import RankLayout, gather_over_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """Rows for one optimizer step on one device."""

    masked: MaskedBatch
    number: int
    """Batches of this rank since the start of the run, this one included."""
    num_tokens: int
    num_residues: int
    num_asked: int
    """Tokens that are no padding; residues among them; positions with a target."""
    after: SamplerPosition
    """Where the stream of rows stands behind this batch."""

    def to(self, device: torch.device) -> "TrainingBatch":
        return replace(self, masked=self.masked.to(device))


class ProteinDataModule(pl.LightningDataModule):
    """Feeds one rank from the token stores."""

    def __init__(
        self,
        corpus: Corpus,
        validation_sets: Mapping[str, Sequence[TokenStore]],
        config: RunConfig,
        *,
        batch_rows: int,
        ranks: RankLayout,
    ) -> None:
        """`batch_rows` is the number of rows of a step on one device, or on those that share them."""
        super().__init__()
        self.corpus, self.validation_sets = corpus, validation_sets
        self.config = config
        self.batch_rows, self.ranks = batch_rows, ranks
        self.position = SamplerPosition()
        self.num_batches = 0

    def train_dataloader(self) -> DataLoader[TrainingBatch]:
        trainer = self.trainer
        assert trainer is not None
        packing = build_packing(self.corpus, self.config.data, seed=self.config.seed)
        stream = BatchStream(
            packing,
            self.config,
            batch_rows=self.batch_rows,
            start=self.position,
            num_batches=self.num_batches,
            rank=trainer.global_rank,
            ranks=self.ranks,
        )
        on_gpu = trainer.strategy.root_device.type == "cuda"
        num_workers = self.config.data.num_workers
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=int(on_gpu) if num_workers is None else num_workers,
            pin_memory=on_gpu,
            worker_init_fn=_leave_stopping_to_the_parent,
        )

    def validation_batches(self, name: str, *, rank: int, num_ranks: int) -> Iterator[MaskedBatch]:
        """Each held-out protein of this set alone, MASK at every selected position.

        Of more than data.max_validation_residues tokens, every k-th protein, k the least that keeps near them.
        """
        stores = self.validation_sets[name]
        total = sum(store.num_tokens for store in stores)
        every = max(1, -(-total // self.config.data.max_validation_residues))
        rows = evaluation_rows(
            (store.protein(i) for store in stores for i in range(0, len(store), every)),
            direction=self.config.model.direction,
            rate=EVALUATION_RATE,
            max_tokens=max(self.config.data.max_residues // self.ranks.context_parallel, 16_384),
        )
        while of_ranks := list(islice(rows, num_ranks)):
            # Ranks that share their weights go through the model together: all have the same number of batches.
            yield to_masked_batch(of_ranks[rank] if rank < len(of_ranks) else _asking_nothing(of_ranks[0]))

    def state_dict(self) -> dict[str, Any]:
        """The same on all ranks, which must ask for it together."""
        positions = gather_over_ranks(asdict(self.position))[:: self.ranks.context_parallel]
        return {"positions": positions, "num_batches": self.num_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the next row that no rank has had, on as many groups of ranks as one likes if a row is a unit."""
        assert self.trainer is not None
        positions = [SamplerPosition(**position) for position in state_dict["positions"]]
        self.num_batches = state_dict["num_batches"]
        before, now = len(positions), self.ranks.num_data_ranks
        if before == now:
            self.position = positions[self.ranks.data_rank(self.trainer.global_rank)]
        elif len(set(positions)) == 1 and positions[0].row == 0 and positions[0].unit * before % now == 0:
            self.position = SamplerPosition(positions[0].unit * before // now)
        else:
            raise ConfigError(
                f"--resume: rows were drawn for {before} devices (or groups that share rows) and cannot be shared out"
                f" among {now} now; go on with as many as before"
            )

    def consumed(self, batch: TrainingBatch) -> None:
        """Note that a batch was trained on; a checkpoint now goes on behind it."""
        self.position, self.num_batches = batch.after, batch.number


class BatchStream(IterableDataset[TrainingBatch]):
    """Masked (or shifted) rows in batches, from a position on, without end.

    With several worker processes, DataLoader takes batches from them in turns. Each worker plans every row, which
    copies no tokens, and assembles every k-th batch only, so that the order is the same as without workers.
    """

    def __init__(
        self,
        packing: RowPacking,
        config: RunConfig,
        *,
        batch_rows: int,
        start: SamplerPosition,
        num_batches: int,
        rank: int,
        ranks: RankLayout,
    ) -> None:
        super().__init__()
        self.packing, self.config, self.batch_rows = packing, config, batch_rows
        self.start, self.num_batches = start, num_batches
        self.rank, self.num_ranks = ranks.data_rank(rank), ranks.num_data_ranks
        self.part = ranks.part(rank, config.data.max_residues)

    def __iter__(self) -> Iterator[TrainingBatch]:
        plans = row_plans(self.packing, self.start, rank=self.rank, num_ranks=self.num_ranks)
        worker = get_worker_info()
        every, turn = (1, 0) if worker is None else (worker.num_workers, worker.id)
        number = self.num_batches
        while True:
            number += 1
            chosen = list(islice(plans, self.batch_rows))
            if (number - self.num_batches - 1) % every == turn:
                yield self._batch(chosen, number)

    def _batch(self, plans: list[RowPlan], number: int) -> TrainingBatch:
        rows = self.packing.assemble(plans)
        if self.config.model.direction == "unidirectional":
            masked = [shift_row(row) for row in rows]
        else:
            masking, seed = self.config.data.masking, self.config.seed
            masked = [mask_row(row, masking, row_generator(seed, plan)) for row, plan in zip(rows, plans, strict=True)]
        stacked, tokens = _stack(masked, self.part), rows.tokens[:, self.part]
        return TrainingBatch(
            masked=to_masked_batch(stacked),
            number=number,
            num_tokens=int((stacked.segments > 0).sum()),
            num_residues=int(((tokens >= FIRST_RESIDUE) & (tokens <= LAST_RESIDUE)).sum()),
            num_asked=int((stacked.targets != IGNORE).sum()),
            after=position_behind(plans[-1], num_ranks=self.num_ranks),
        )


def _leave_stopping_to_the_parent(worker: int) -> None:
    """Ctrl-C, and SLURM's signals, reach all processes of a job: one that ended now would fail the last steps."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def to_masked_batch(rows: MaskedRow) -> MaskedBatch:
    """Arrays (batch, residue) as int64 tensors."""
    return MaskedBatch(
        inputs=torch.from_numpy(rows.inputs.astype(np.int64)),
        targets=torch.from_numpy(rows.targets.astype(np.int64)),
        segments=torch.from_numpy(rows.segments.astype(np.int64)),
    )


def _stack(rows: list[MaskedRow], part: slice) -> MaskedRow:
    """The same part of each row."""
    return MaskedRow(
        inputs=np.stack([row.inputs[part] for row in rows]),
        targets=np.stack([row.targets[part] for row in rows]),
        segments=np.stack([row.segments[part] for row in rows]),
    )


def _asking_nothing(rows: MaskedRow) -> MaskedRow:
    return replace(rows, targets=np.full_like(rows.targets, IGNORE))
