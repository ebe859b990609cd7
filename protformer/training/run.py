"""From what the user typed to a training run: configuration, token stores, resume.

In: a `RunRequest`. Out: the closing summary as text. Everything that can be wrong with the request is said before
data are read; a run folder appears only with its first content.
"""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from protformer.config import RunConfig, dump_yaml, load_run_config, override_run
from protformer.corpus.token_store import TokenStore
from protformer.decoding import flatten
from protformer.device import choose_device, launched_rank, launched_size, require_compiler
from protformer.errors import ConfigError, InputError, InterruptedRunError, LostRankError, OutputError
from protformer.evaluation.masked_lm import MaskedLmScores
from protformer.model_description import read_description
from protformer.run_status import sole_process
from protformer.training.fine_tuning import (
    InitialWeights,
    check_fine_tuning,
    check_initial_unchanged,
    check_same_weights,
    save_initial_weights,
)
from protformer.training.fit import RunSummary, rows_per_step, train
from protformer.training.metric_sinks import check_metric_sinks
from protformer.training.ranks import RankLayout
from protformer.training.run_folder import RunFolder
from protformer.training.run_stores import Console, prepare_stores
from protformer.training.sampling_tables import (
    add_sampling_tables,
    check_sampling,
    check_tables_unchanged,
    fasta_by_store,
)
from protformer.training.validation_sets import check_validation_unchanged, validation_sets
from protformer.whole_file import write_whole

RESUMABLE_CHANGES = frozenset(
    f"training.{name}"
    for name in (
        "max_steps",
        "max_time",
        "validate_every_steps",
        "log_readiness",
        "log_every_steps",
        "checkpoint_every_steps",
        "max_skipped_steps",
        "wandb_project",
        "precision",
        "strategy",
        "context_parallel",
        "rank_timeout",
        "accumulate_batches",
        "activation_checkpointing",
        "compile",
    )
) | {"data.num_workers"}
"""Fields that may differ on a resume: they do not change what is learned, or only by rounding."""

PREPARATION_SECONDS, POLL_SECONDS = 24 * 3600.0, 0.5
"""How long the other processes of a job wait for the first one to read FASTA, and how often they look."""

STARTING_MARK = ".protformer-starting"
"""Lies in a run folder that this program has made, until the run has its token stores and config.yaml."""

MADE_WHILE_STARTING = (
    r"(\.?(store|validation)(-\d+)?(\.\d+\.(tmp|old)|\.building)?)|clusters|pairs\.npy"
    r"|stores\.json(\.partial)?|initial_model\.json(\.partial)?|config\.yaml\.partial"
)
"""What may be in such a folder besides the mark; nothing else is ever removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """The options of `protformer train`."""

    fasta: tuple[str, ...]
    out: Path
    config_source: str | None
    overrides: tuple[str, ...]
    validation_fasta: tuple[str, ...]
    """Each may be `NAME=PATH`."""
    clusters: str | None
    pairs: str | None
    cache_dir: Path | None
    init_from: Path | None
    distill: bool
    max_steps: int | None
    max_time: str | None
    devices: int
    num_nodes: int
    seed: int | None
    resume: bool
    device: str
    quiet: bool


def run_training(request: RunRequest, console: Console) -> str:
    """Train as requested; the closing summary."""
    run = RunFolder(request.out)
    request = _for_all_processes(request)
    if launched_rank() > 0:
        return _follow(request, run)
    is_new = _check_folder(run, resume=request.resume)
    config = _resolve_config(request, None if is_new else load_run_config(str(run.config)))
    device = choose_device(request.device)
    if config.training.compile:
        require_compiler(device)
    check_metric_sinks(config)
    has_initial = request.init_from is not None if is_new else run.initial_model.exists()
    check_fine_tuning(config.training, config.model, has_initial=has_initial)
    num_ranks = request.devices * request.num_nodes
    rows_per_step(config, RankLayout(num_ranks=num_ranks, context_parallel=config.training.context_parallel))
    if is_new:
        _prepare_stores(request, run, config, console)
    else:
        _check_sources(request, run, config)
    with sole_process(run.root):
        if not is_new:
            _write_config(run, config)
        return describe_summary(_train(request, config, run))


def _for_all_processes(request: RunRequest) -> RunRequest:
    """Where a launcher has started all processes, it has decided how many there are."""
    size = launched_size()
    if size is None:
        return request
    asked = (request.devices, request.num_nodes)
    if asked not in ((1, 1), size):
        raise ConfigError(
            f"--devices {asked[0]} --num-nodes {asked[1]}: {size[0]} processes on each of {size[1]} nodes were started;"
            f" leave these options out"
        )
    return replace(request, devices=size[0], num_nodes=size[1])


def _follow(request: RunRequest, run: RunFolder) -> str:
    """Train along with the first process of the job, which makes the run folder, and reports."""
    deadline = time.monotonic() + PREPARATION_SECONDS
    while not run.config.is_file():
        if time.monotonic() > deadline:
            raise LostRankError(f"{run.config}: the first process has not written it in {PREPARATION_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
    config = _resolve_config(request, load_run_config(str(run.config)) if request.resume else None)
    with suppress(InterruptedRunError):
        _train(request, config, run)
    return ""


def _train(request: RunRequest, config: RunConfig, run: RunFolder) -> RunSummary:
    return train(
        config,
        run,
        device=request.device,
        devices=request.devices,
        num_nodes=request.num_nodes,
        quiet=request.quiet,
    )


def describe_summary(summary: RunSummary) -> str:
    """The closing lines of a run."""
    rate = summary.residues_per_second
    lines = [
        f"{summary.steps:,} steps, {summary.residues_seen:,} residues seen ({summary.tokens_seen:,} tokens,"
        f" rows {summary.fill_rate:.1%} full)",
        f"{_as_duration(summary.seconds)} of training in all,"
        f" {f'{rate:,.0f} residues/s' if rate else 'no step was left to make'} in this sitting,"
        f" at most {summary.peak_memory_gb:.2f} GB of memory, {summary.skipped_steps:,} steps skipped",
    ]
    if not read_description(summary.model_folder).has_lm_head:
        lines.append("perplexity is left out: the weights that this began with came without a masked-LM head")
    elif summary.scores:
        for name, scores in summary.scores.items():
            lines += _compare(name, scores)
    else:
        lines.append("nothing was held out, so there is no validation")
    lines.append(f"model: {summary.model_folder}")
    return "\n".join(lines)


def _as_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _compare(name: str, scores: MaskedLmScores) -> list[str]:
    error = scores.log_likelihood_gain_standard_error
    spread = "" if error is None else f", standard error {error:.4f} (over proteins)"
    return [
        f"held-out proteins ({name}), {scores.num_masked:,} residues asked for:",
        f"  perplexity {scores.perplexity:6.3f}   unigram baseline {scores.baseline_perplexity:6.3f}",
        f"  accuracy   {scores.accuracy:6.2%}   unigram baseline {scores.baseline_accuracy:6.2%}",
        f"  log-likelihood over the baseline {scores.log_likelihood_gain:+.4f} nats a residue{spread}",
    ]


def _check_folder(run: RunFolder, *, resume: bool) -> bool:
    """Whether the run is new: nothing is there yet, or what a run left that was killed before its first step."""
    if run.root.exists() and not run.root.is_dir():
        raise OutputError(f"{run.root}: is a file; choose another --out")
    entries = [entry.name for entry in run.root.iterdir()] if run.root.exists() else []
    is_unstarted = STARTING_MARK in entries and not run.config.is_file()
    if entries and not resume and not is_unstarted:
        raise run.exists_already()
    if resume and not run.config.is_file() and not is_unstarted:
        raise InputError(f"{run.root}: no run to resume here (no config.yaml)")
    run.refuse_damaged()
    return not run.config.is_file()


def _resolve_config(request: RunRequest, stored: RunConfig | None) -> RunConfig:
    """The run's configuration; on a resume, that of the stored run unless the request asks for another."""
    source = request.config_source
    if source is None and stored is not None:
        source = str(RunFolder(request.out).config)
    initial = None
    if stored is None and request.init_from is not None:
        initial = read_description(request.init_from).model
    config = load_run_config(source, request.overrides, model_defaults=initial)
    if initial is not None and request.init_from is not None:
        check_same_weights(request.init_from, initial, config.model)
    # --max-steps says where to stop; the schedule keeps the length that the configuration gave it.
    config = override_run(
        config,
        seed=request.seed,
        schedule_steps=config.training.num_schedule_steps,
        max_steps=request.max_steps,
        max_time=request.max_time,
        distill=request.distill or None,
    )
    if stored is not None:
        before, now = flatten(asdict(stored)), flatten(asdict(config))
        for path in sorted(before.keys() | now.keys()):
            if before.get(path) != now.get(path) and path not in RESUMABLE_CHANGES:
                raise ConfigError(
                    f"--resume: {path} was {before.get(path)!r} and is now {now.get(path)!r};"
                    f" a run goes on as it began, so start another --out for this"
                )
    return config


def _prepare_stores(request: RunRequest, run: RunFolder, config: RunConfig, console: Console) -> None:
    _refuse_input_inside(run, request)
    check_sampling(request.fasta, config.data, clusters=request.clusters, pairs=request.pairs)
    with _starting(run.root):
        paths = prepare_stores(
            fasta_by_store(request.fasta, config.data),
            validation_sets(request.validation_fasta),
            beside=run.root,
            cache=request.cache_dir,
            fraction=config.data.validation_fraction,
            clusters=request.clusters,
            console=console,
        )
        for path in paths.train:
            if len(TokenStore.open(path)) == 0:
                raise InputError(f"{', '.join(request.fasta)}: no proteins are left to train on")
        paths = add_sampling_tables(
            paths, run, config.data, clusters=request.clusters, pairs=request.pairs, tell=console.tell
        )
        run.save_stores(paths)
        if request.init_from is not None:
            save_initial_weights(run, InitialWeights.of(request.init_from))
        _write_config(run, config)


def _write_config(run: RunFolder, config: RunConfig) -> None:
    write_whole(run.config, lambda partial: partial.write_text(dump_yaml(config), encoding="utf-8"))


def _refuse_input_inside(run: RunFolder, request: RunRequest) -> None:
    """The run folder is this program's own; a file of the user's in it could be taken for part of the run."""
    sources = [*validation_sets(request.validation_fasta).values(), *filter(None, [request.clusters, request.pairs])]
    for source in (*request.fasta, *sources):
        if source != "-" and Path(source).resolve().is_relative_to(run.root.resolve()):
            raise OutputError(f"{run.root}: {source} lies inside the run folder; choose another --out")


def _check_sources(request: RunRequest, run: RunFolder, config: RunConfig) -> None:
    """Refuse to go on with other data than the run began with."""
    paths = run.load_stores()
    if Path(request.fasta[0]).is_dir():
        named = tuple(Path(source).resolve() for source in request.fasta)
        if named != paths.train:
            began = ", ".join(map(str, paths.train))
            raise InputError(f"--resume: the run began with {began}, not with {', '.join(map(str, named))}")
    else:
        by_store = fasta_by_store(request.fasta, config.data)
        if len(by_store) != len(paths.train):
            raise InputError(f"--resume: the run began with {len(paths.train)} --fasta, not with {len(by_store)}")
        for fasta, store in zip(by_store, paths.train, strict=True):
            if difference := TokenStore.open(store).difference_from(fasta):
                raise InputError(f"--resume: {difference}; a run goes on with the data it began with")
    if not run.has_stores(paths):
        began = ", ".join(map(str, paths.train))
        raise InputError(f"--resume: {began}: the token store is not the one that the run began with")
    check_initial_unchanged(run, request.init_from)
    check_validation_unchanged(paths, validation_sets(request.validation_fasta))
    check_tables_unchanged(paths, clusters=request.clusters, pairs=request.pairs)


@contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """A folder that is marked until the block is done, and as it was before if the block fails.

    Stores that were half built when a run was killed stay, for the next one to go on with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_made_while_starting(folder, but_half_built=True)
    (folder / STARTING_MARK).touch()
    try:
        yield
    except InterruptedRunError:
        raise
    except BaseException:
        _remove_made_while_starting(folder)
        (folder / STARTING_MARK).unlink(missing_ok=True)
        with suppress(OSError):  # it had or has other contents
            folder.rmdir()
        raise
    for left in folder.glob(".*.building"):  # by a run that was killed, with other files
        shutil.rmtree(left)
    (folder / STARTING_MARK).unlink()


def _remove_made_while_starting(folder: Path, *, but_half_built: bool = False) -> None:
    if not (folder / STARTING_MARK).exists():
        return
    for entry in folder.iterdir():
        if but_half_built and entry.name.endswith(".building"):
            continue
        if re.fullmatch(MADE_WHILE_STARTING, entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
