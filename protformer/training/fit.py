"""One training run, from FASTA to model folder.

In: a `RunConfig`, FASTA files and a run folder. Out: a `RunSummary`, and the files that `run_folder` lists. A run
that was stopped or killed goes on from its last checkpoint with the very numbers it would have had.
"""

import logging
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from protformer.checkpoint import ModelDescription, TrainingProvenance, save_model
from protformer.config import RunConfig, TrainingConfig, parse_duration
from protformer.corpus.cluster_members import ClusterMembers
from protformer.corpus.interacting_pairs import InteractingPairs
from protformer.corpus.sampling import Corpus
from protformer.corpus.token_store import TokenStore
from protformer.device import (
    choose_device,
    choose_precision,
    keep_freed_memory,
    make_deterministic,
    memory_refused_in_time,
)
from protformer.errors import ConfigError, InputError, InterruptedRunError
from protformer.evaluation.figures import plot_training_curves
from protformer.evaluation.masked_lm import MaskedLmScores, evaluate_masked_lm
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.training.callbacks import (
    Checkpointing,
    ConsumedPosition,
    MetricsLog,
    Progress,
    StepRandomness,
    StopRequest,
)
from protformer.training.datamodule import ProteinDataModule
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.micro_batches import MicroBatches
from protformer.training.readiness_log import MAX_PROTEINS, ReadinessLog
from protformer.training.run_folder import RunFolder, StorePaths, read_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """What a finished run has to say."""

    steps: int
    tokens_seen: int
    residues_seen: int
    fill_rate: float
    """Share of the places in rows that held tokens, not padding."""
    scores: MaskedLmScores | None
    """On the held-out proteins, MASK at every selected position; None if nothing is held out."""
    model_folder: Path


def train(
    config: RunConfig,
    run: RunFolder,
    *,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    quiet: bool = False,
) -> RunSummary:
    """Train until training.max_steps, from the run's last checkpoint if it has one.

    Both token stores must be in the run folder already. Raises InterruptedRunError after a signal, with the state
    saved.
    """
    torch_device = choose_device(device)
    precision = choose_precision(config.training.precision, torch_device)
    step_rows = rows_per_step(config, num_ranks=devices * num_nodes)
    make_deterministic()
    keep_freed_memory(torch_device)
    corpus, validation_stores = open_corpus(run.load_stores())
    counts = _residue_counts(corpus)
    torch.manual_seed(config.seed)
    model = ProteinLanguageModel(config.model, seed=config.seed)
    model.start_from_counts(counts)
    if config.training.activation_checkpointing:
        model.encoder.recompute_in_backward()
    if config.training.compile:
        model.encoder.compile_layers()
    micro_batches = MicroBatches(
        config.training.accumulate_batches,
        step_rows=step_rows,
        row_tokens=config.data.max_residues,
        device=torch_device,
    )
    task = MaskedLmTask(model, config.training, micro_batches)
    datamodule = ProteinDataModule(corpus, validation_stores, config, batch_rows=step_rows)
    callbacks = _build_callbacks(
        config, run, datamodule, describe=partial(_describe, config, corpus, counts), quiet=quiet
    )
    with _lightning_kept_quiet():
        trainer = _build_trainer(
            config.training,
            callbacks.in_order(),
            device=torch_device,
            uses_bf16=precision == torch.bfloat16,
            devices=devices,
            num_nodes=num_nodes,
        )
        with callbacks.stop.listening(), memory_refused_in_time(torch_device):
            _fit(trainer, task, datamodule, run)
            callbacks.checkpointing.save(trainer, task)
            if callbacks.stop.signal_name is None:
                callbacks.metrics.finish(trainer, task)
    if callbacks.stop.signal_name is not None:
        raise InterruptedRunError(
            f"stopped by {callbacks.stop.signal_name} after step {trainer.global_step}; the state is saved in"
            f" {run.checkpoint}; add --resume to go on"
        )
    metrics = callbacks.metrics
    return RunSummary(
        steps=trainer.global_step,
        tokens_seen=metrics.tokens_seen,
        residues_seen=metrics.residues_seen,
        fill_rate=metrics.tokens_seen / (trainer.global_step * config.training.tokens_per_step),
        scores=metrics.scores,
        model_folder=run.model,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Callbacks:
    """Those that `train` asks for something, and the others."""

    position: ConsumedPosition
    metrics: MetricsLog
    checkpointing: Checkpointing
    stop: StopRequest
    others: list[pl.Callback]

    def in_order(self) -> list[pl.Callback]:
        return [self.position, self.metrics, self.checkpointing, *self.others, self.stop]


def _build_callbacks(
    config: RunConfig,
    run: RunFolder,
    datamodule: ProteinDataModule,
    *,
    describe: Callable[[int, int], ModelDescription],
    quiet: bool,
) -> _Callbacks:
    """`describe` takes the steps and tokens of a model so far."""
    every, max_time = config.training.validate_every_steps, config.training.max_time
    metrics = MetricsLog(
        run,
        log_every_steps=config.training.log_every_steps,
        validate_every_steps=every,
        validate=partial(_validate, datamodule, describe(0, 0).unigram_frequencies),
        redraw_curves=partial(_draw_curves, run),
    )
    checkpointing = Checkpointing(
        run,
        every_steps=config.training.checkpoint_every_steps,
        save_model=lambda task, step: save_model(run.model, task.model, describe(step, metrics.tokens_seen)),
    )
    others: list[pl.Callback] = [StepRandomness(config.seed)]
    if config.training.log_readiness and datamodule.validation_stores:
        held_out = datamodule.validation_stores[0]
        proteins = [held_out.protein(i).tolist() for i in range(min(MAX_PROTEINS, len(held_out)))]
        others.append(ReadinessLog(run, proteins, every_steps=every))
    if not quiet:
        others.append(Progress(metrics, max_steps=config.training.max_steps))
    return _Callbacks(
        position=ConsumedPosition(datamodule),
        metrics=metrics,
        checkpointing=checkpointing,
        stop=StopRequest(
            checkpointing, max_seconds=None if max_time is None else parse_duration(max_time, "training.max_time")
        ),
        others=others,
    )


def open_corpus(paths: StorePaths) -> tuple[Corpus, tuple[TokenStore, ...]]:
    """What a run trains on, and its validation stores."""
    corpus = Corpus(
        stores=tuple(TokenStore.open(path) for path in paths.train),
        clusters=None if paths.clusters is None else ClusterMembers(paths.clusters),
        pairs=None if paths.pairs is None else InteractingPairs(paths.pairs),
    )
    return corpus, tuple(TokenStore.open(path) for path in paths.validation)


def rows_per_step(config: RunConfig, *, num_ranks: int) -> int:
    """Rows of a step on one device; an error if training.tokens_per_step does not divide into them."""
    unit = config.data.max_residues * num_ranks
    tokens, parts = config.training.tokens_per_step, config.training.accumulate_batches
    if tokens % unit:
        raise ConfigError(
            f"training.tokens_per_step: {tokens} is not a multiple of data.max_residues ({config.data.max_residues}) x"
            f" devices ({num_ranks}) = {unit}; the nearest is {max(1, round(tokens / unit)) * unit}"
        )
    rows = tokens // unit
    if parts != "auto" and parts > rows:
        raise ConfigError(
            f"training.accumulate_batches: {parts} parts of a step, but a device has only {rows} rows of it"
        )
    return rows


def _build_trainer(
    config: TrainingConfig,
    callbacks: list[pl.Callback],
    *,
    device: torch.device,
    uses_bf16: bool,
    devices: int,
    num_nodes: int,
) -> pl.Trainer:
    """A trainer that only trains: logs, checkpoints, validation and sampling are this package's own."""
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=devices,
        num_nodes=num_nodes,
        precision="bf16-mixed" if uses_bf16 else "32-true",
        max_steps=config.max_steps,
        max_epochs=-1,
        callbacks=callbacks,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _fit(trainer: pl.Trainer, task: MaskedLmTask, datamodule: ProteinDataModule, run: RunFolder) -> None:
    checkpoint = run.checkpoint if run.checkpoint.exists() else None
    trainer.fit(task, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)


def _describe(
    config: RunConfig, corpus: Corpus, residue_counts: list[int], steps: int, tokens_seen: int
) -> ModelDescription:
    manifests = [store.manifest for store in corpus.stores]
    masking = config.data.masking
    return ModelDescription(
        packing=config.data.packing,
        model=config.model,
        training=TrainingProvenance(
            sources=[Path(source.path).name for manifest in manifests for source in manifest.sources],
            num_proteins=sum(manifest.num_proteins for manifest in manifests),
            num_residues=sum(manifest.num_residues for manifest in manifests),
            steps=steps,
            tokens_seen=tokens_seen,
            seed=config.seed,
            max_residues=config.data.max_residues,
            masking_rate=masking.rate,
            masking_scheme=masking.scheme,
            masking_span_mean_length=masking.span_mean_length,
        ),
        residue_counts=residue_counts,
    )


def _residue_counts(corpus: Corpus) -> list[int]:
    """How often each token occurs in the training stores, however often they are drawn from."""
    counts = zip(*(store.manifest.residue_counts for store in corpus.stores), strict=True)
    return [sum(numbers) for numbers in counts]


def _validate(
    datamodule: ProteinDataModule, frequencies: torch.Tensor, trainer: pl.Trainer, task: MaskedLmTask
) -> MaskedLmScores | None:
    if not datamodule.validation_stores:
        return None
    task.model.eval()
    with trainer.strategy.precision_plugin.forward_context():
        batches = (batch.to(task.device) for batch in datamodule.validation_batches(rank=0, num_ranks=1))
        scores = evaluate_masked_lm(task.model, batches, frequencies)
    task.model.train()
    if scores is not None and not math.isfinite(scores.perplexity):
        raise InputError(
            "validation gave a perplexity that is not finite: the run has diverged; lower the learning rate"
        )
    return scores


def _draw_curves(run: RunFolder, path: Path) -> None:
    rows = read_metrics(run.metrics)
    trained = [row for row in rows if row["train_loss"]]
    validated = [row for row in rows if row["val_loss"]]

    def column(chosen: list[dict[str, str]], name: str) -> list[float]:
        return [float(row[name]) for row in chosen]

    plot_training_curves(
        train_steps=column(trained, "step"),
        train_loss=column(trained, "train_loss"),
        val_steps=column(validated, "step"),
        val_loss=column(validated, "val_loss"),
        val_perplexity=column(validated, "val_perplexity"),
        val_accuracy=column(validated, "val_accuracy"),
        unigram_perplexity=float(validated[-1]["unigram_perplexity"]) if validated else None,
        unigram_accuracy=float(validated[-1]["unigram_accuracy"]) if validated else None,
        path=path,
    )


@contextmanager
def _lightning_kept_quiet() -> Any:
    """Silence advice that does not apply: data come from memory maps, and the number of workers is chosen."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    for logger, _ in before:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
        yield
    for logger, level in before:
        logger.setLevel(level)
