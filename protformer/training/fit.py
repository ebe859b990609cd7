"""One training run, from FASTA to model folder.

In: a `RunConfig`, FASTA files and a run folder. Out: a `RunSummary`, and the files that `run_folder` lists. A run
that was stopped or killed goes on from its last checkpoint with the very numbers it would have had.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from protformer.checkpoint import save_weights
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
    peak_memory_gb,
)
from protformer.errors import ConfigError, InterruptedRunError
from protformer.evaluation.masked_lm import MaskedLmScores
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import ModelDescription, TrainingProvenance
from protformer.training.callbacks import (
    Checkpointing,
    ConsumedPosition,
    Progress,
    StepRandomness,
    StopRequest,
)
from protformer.training.curves import draw_curves
from protformer.training.datamodule import ProteinDataModule
from protformer.training.distillation import Distillation, DistillationLog, build_distillation
from protformer.training.fine_tuning import (
    InitialWeights,
    add_lora,
    freeze_lower_layers,
    learn_attention_only,
    load_initial_weights,
    merge_adapters,
    read_initial_weights,
)
from protformer.training.masked_lm import MaskedLmTask
from protformer.training.metric_sinks import open_metric_sinks
from protformer.training.metrics_log import MetricsLog
from protformer.training.micro_batches import MicroBatches
from protformer.training.nonfinite import NonFiniteSteps
from protformer.training.ranks import (
    RankLayout,
    build_strategy,
    cluster_environment,
    losses_of_ranks_told,
)
from protformer.training.readiness_log import MAX_PROTEINS, ReadinessLog
from protformer.training.run_folder import RunFolder, StorePaths
from protformer.training.status_file import StatusFile
from protformer.training.validation import validate


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """What a finished run has to say."""

    steps: int
    tokens_seen: int
    residues_seen: int
    fill_rate: float
    """Share of the places in rows that held tokens, not padding."""
    scores: dict[str, MaskedLmScores]
    """On each set of held-out proteins, MASK at every selected position; empty if nothing is held out."""
    skipped_steps: int
    """Left out for want of a finite gradient."""
    seconds: float
    """Of training and validation, over all sittings."""
    residues_per_second: float
    """In this sitting; 0 if it made no step."""
    peak_memory_gb: float
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
    ranks = RankLayout(num_ranks=devices * num_nodes, context_parallel=config.training.context_parallel)
    step_rows = rows_per_step(config, ranks)
    make_deterministic()
    keep_freed_memory(torch_device)
    corpus, validation_sets = open_corpus(run.load_stores())
    counts = _residue_counts(corpus)
    torch.manual_seed(config.seed)
    initial = read_initial_weights(run)
    model = _build_model(config, counts, None if run.checkpoint.exists() else initial)
    distillation = build_distillation(config, initial)
    micro_batches = _build_micro_batches(config, ranks, distillation, step_rows=step_rows, device=torch_device)
    task = MaskedLmTask(model, config.training, micro_batches)
    datamodule = ProteinDataModule(corpus, validation_sets, config, batch_rows=step_rows, ranks=ranks)
    callbacks = _build_callbacks(
        config,
        run,
        datamodule,
        describe=partial(_describe, config, corpus, counts, initial),
        distillation=distillation,
        quiet=quiet,
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
        with memory_refused_in_time(torch_device), losses_of_ranks_told(config.training):
            _fit(trainer, task, datamodule, run, callbacks)
    return _summarize(config, run, callbacks.metrics, steps=trainer.global_step, device=torch_device)


def _build_model(config: RunConfig, counts: list[int], initial: InitialWeights | None) -> ProteinLanguageModel:
    """The model as it begins, by `initial` if that is given; a checkpoint replaces all its weights."""
    model = ProteinLanguageModel(config.model, seed=config.seed)
    if initial is None:
        model.start_from_counts(counts)
    else:
        load_initial_weights(model, initial)
    freeze_lower_layers(model.encoder, config.training.frozen_layers)
    if config.training.lora is not None:
        add_lora(model, config.training.lora)
    if config.training.distill:
        learn_attention_only(model)
    if config.training.activation_checkpointing:
        model.encoder.recompute_in_backward()
    if config.training.compile:
        model.encoder.compile_layers()
    return model


def _build_micro_batches(
    config: RunConfig, ranks: RankLayout, distillation: Distillation | None, *, step_rows: int, device: torch.device
) -> MicroBatches:
    """The parts of a step, and the loss that is summed over them."""
    return MicroBatches(
        config.training.accumulate_batches,
        step_rows=step_rows,
        row_tokens=config.data.max_residues // ranks.context_parallel,
        device=device,
        with_others=ranks.num_ranks > 1 and (ranks.context_parallel > 1 or config.training.strategy == "fsdp"),
        loss_sum=distillation,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Callbacks:
    """Those that `train` asks for something, and the others."""

    position: ConsumedPosition
    metrics: MetricsLog
    checkpointing: Checkpointing
    status: StatusFile
    stop: StopRequest
    others: list[pl.Callback]

    def in_order(self) -> list[pl.Callback]:
        """A checkpoint is written behind all that write for its step, and the run stops behind that."""
        return [self.position, self.metrics, *self.others, self.checkpointing, self.status, self.stop]


def _build_callbacks(
    config: RunConfig,
    run: RunFolder,
    datamodule: ProteinDataModule,
    *,
    describe: Callable[[int, int], ModelDescription],
    distillation: Distillation | None,
    quiet: bool,
) -> _Callbacks:
    """`describe` takes the steps and tokens of a model so far."""
    training = config.training
    checkpointing = Checkpointing(
        run,
        every_steps=training.checkpoint_every_steps,
        save_model=lambda weights, num_parameters, step: save_weights(
            run.model,
            weights if training.lora is None else merge_adapters(weights, training.lora),
            describe(step, metrics.tokens_seen),
            num_parameters=num_parameters,
        ),
    )
    stop = StopRequest(
        checkpointing,
        max_seconds=None if training.max_time is None else parse_duration(training.max_time, "training.max_time"),
    )
    nonfinite = NonFiniteSteps(checkpointing, max_in_a_row=training.max_skipped_steps)
    metrics = MetricsLog(
        run,
        log_every_steps=training.log_every_steps,
        validate_every_steps=training.validate_every_steps,
        gradients=nonfinite,
        validate=partial(validate, datamodule, describe(0, 0), stop),
        redraw_curves=partial(draw_curves, run),
        sinks=open_metric_sinks(config, run, asdict(config)),
    )
    others: list[pl.Callback] = [StepRandomness(config.seed), nonfinite]
    if training.log_readiness and datamodule.validation_sets:
        held_out = next(iter(datamodule.validation_sets.values()))[0]
        proteins = [held_out.protein(i).tolist() for i in range(min(MAX_PROTEINS, len(held_out)))]
        others.append(ReadinessLog(run, proteins, every_steps=training.validate_every_steps))
    if distillation is not None:
        others.append(DistillationLog(run, distillation, every_steps=training.log_every_steps))
    if not quiet:
        others.append(Progress(metrics, max_steps=training.max_steps))
    return _Callbacks(
        position=ConsumedPosition(datamodule),
        metrics=metrics,
        checkpointing=checkpointing,
        status=StatusFile(run, metrics, checkpointing, max_steps=training.max_steps),
        stop=stop,
        others=others,
    )


def open_corpus(paths: StorePaths) -> tuple[Corpus, dict[str, list[TokenStore]]]:
    """What a run trains on, and the stores of each set that it validates on."""
    corpus = Corpus(
        stores=tuple(TokenStore.open(path) for path in paths.train),
        clusters=None if paths.clusters is None else ClusterMembers(paths.clusters),
        pairs=None if paths.pairs is None else InteractingPairs(paths.pairs),
    )
    sets: dict[str, list[TokenStore]] = {}
    for name, path in zip(paths.validation_names, paths.validation, strict=True):
        sets.setdefault(name, []).append(TokenStore.open(path))
    return corpus, sets


def rows_per_step(config: RunConfig, ranks: RankLayout) -> int:
    """Rows of a step on one device, or on those that share rows; an error if training.tokens_per_step does not divide
    into them."""
    unit = config.data.max_residues * ranks.num_data_ranks
    tokens, parts = config.training.tokens_per_step, config.training.accumulate_batches
    if tokens % unit:
        nearest = max(1, round(tokens / unit)) * unit
        raise ConfigError(
            f"training.tokens_per_step: {tokens} is not a multiple of data.max_residues ({config.data.max_residues}) x"
            f" devices with rows of their own ({ranks.num_data_ranks}) = {unit}; the nearest is {nearest}"
        )
    rows = tokens // unit
    if parts != "auto" and parts > rows:
        raise ConfigError(
            f"training.accumulate_batches: {parts} parts of a step, but a device has only {rows} rows of it"
        )
    return rows


def _summarize(
    config: RunConfig, run: RunFolder, metrics: MetricsLog, *, steps: int, device: torch.device
) -> RunSummary:
    return RunSummary(
        steps=steps,
        tokens_seen=metrics.tokens_seen,
        residues_seen=metrics.residues_seen,
        fill_rate=metrics.tokens_seen / (steps * config.training.tokens_per_step),
        scores=metrics.scores,
        skipped_steps=metrics.gradients.skipped_steps,
        seconds=metrics.seconds_trained,
        residues_per_second=metrics.residues_per_second,
        peak_memory_gb=peak_memory_gb(device),
        model_folder=run.model,
    )


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
        strategy=build_strategy(config, num_ranks=devices * num_nodes),
        plugins=cluster_environment(),
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


def _fit(
    trainer: pl.Trainer, task: MaskedLmTask, datamodule: ProteinDataModule, run: RunFolder, callbacks: _Callbacks
) -> None:
    """From the last checkpoint on until the end or a signal. Raises InterruptedRunError after a signal."""
    with callbacks.stop.listening():
        checkpoint = run.checkpoint if run.checkpoint.exists() else None
        trainer.fit(task, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        callbacks.checkpointing.save(trainer, task)
        if callbacks.stop.signal_name is None:
            callbacks.metrics.finish(trainer, task)
        callbacks.metrics.close()
        callbacks.status.write(trainer)
    if callbacks.stop.signal_name is not None:
        raise InterruptedRunError(
            f"stopped by {callbacks.stop.signal_name} after step {trainer.global_step}; the state is saved in"
            f" {run.checkpoint}; add --resume to go on"
        )


def _describe(
    config: RunConfig,
    corpus: Corpus,
    residue_counts: list[int],
    initial: InitialWeights | None,
    steps: int,
    tokens_seen: int,
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
            initial_model=None if initial is None else initial.model,
        ),
        converted_from="" if initial is None else initial.converted_from,
        has_lm_head=initial is None or initial.has_lm_head or not config.training.distill,
        residue_counts=residue_counts,
    )


def _residue_counts(corpus: Corpus) -> list[int]:
    """How often each token occurs in the training stores, however often they are drawn from."""
    counts = zip(*(store.manifest.residue_counts for store in corpus.stores), strict=True)
    return [sum(numbers) for numbers in counts]


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
        try:
            yield
        finally:
            for logger, level in before:
                logger.setLevel(level)
