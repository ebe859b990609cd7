"""`protformer train`: FASTA in, run folder out."""

from pathlib import Path

import click

from protformer.cli.options import FilePath, device_option, fasta_option, quiet_option
from protformer.cli.stop_signals import stop_signals_interrupt


@click.command("train")
@fasta_option(multiple=True)
@click.option("--out", required=True, type=FilePath, metavar="RUN", help="Run folder to make.")
@click.option(
    "--config", metavar="YAML", help="A file, or a built-in one: tiny, small, base, paper-single, paper-concat."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one field: model.num_layers=12.")
@click.option(
    "--val-fasta",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Held-out proteins, FASTA or a store, one set or several; else a share is held out, by hash of the "
    "sequence, or whole clusters with --clusters.",
)
@click.option(
    "--clusters",
    metavar="TSV",
    help="Representative and member, as MMseqs2 writes them: each cluster gives one member an epoch.",
)
@click.option("--pairs", metavar="TSV", help="Train on pairs of proteins that interact: a, b and perhaps a label.")
@click.option(
    "--cache-dir",
    type=FilePath,
    metavar="DIR",
    help="Keep token stores there for other runs, instead of in the run folder.",
)
@click.option(
    "--init-from",
    type=FilePath,
    metavar="MODEL",
    help="Begin with the weights of a model folder or run; model.* is then that model's.",
)
@click.option(
    "--distill",
    is_flag=True,
    help="Train only the attention, to give layer by layer what exact attention with the weights of --init-from gives.",
)
@click.option(
    "--max-steps", type=click.IntRange(min=1), metavar="N", help="Stop there; counted from the start of the run."
)
@click.option("--max-time", metavar="HH:MM:SS", help="Stop after this time of training.")
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Per node.")
@click.option("--num-nodes", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option(
    "--seed", type=click.IntRange(min=0, max=2**32 - 1), metavar="S", help="Decides weights, order and masks."
)
@click.option("--resume", is_flag=True, help="Go on with an existing run.")
@device_option
@quiet_option
def command(
    fasta: tuple[str, ...],
    out: Path,
    config: str | None,
    overrides: tuple[str, ...],
    val_fasta: tuple[str, ...],
    clusters: str | None,
    pairs: str | None,
    cache_dir: Path | None,
    init_from: Path | None,
    distill: bool,
    max_steps: int | None,
    max_time: str | None,
    devices: int,
    num_nodes: int,
    seed: int | None,
    resume: bool,
    device: str,
    quiet: bool,
) -> None:
    """Train a language model on proteins.

    Several --fasta make one corpus; --set data.source_weights='[3, 1]' gives each its share. Ctrl-C and SIGTERM save
    and leave; the same command with --resume goes on as if never stopped. The run folder holds config.yaml,
    metrics.csv, curves.png, checkpoints/last.ckpt and model/.

    \b
    Example:
      protformer train --fasta trembl.fa.gz --config small --out runs/trembl
    """
    with stop_signals_interrupt():
        if not resume:
            _check_new_run(out, config, overrides, has_own_config=init_from is None)
        from protformer.cli.progress import StderrConsole
        from protformer.training.run import RunRequest, run_training

        request = RunRequest(
            fasta=fasta,
            out=out,
            config_source=config,
            overrides=overrides,
            validation_fasta=val_fasta,
            clusters=clusters,
            pairs=pairs,
            cache_dir=cache_dir,
            init_from=init_from,
            distill=distill,
            max_steps=max_steps,
            max_time=max_time,
            devices=devices,
            num_nodes=num_nodes,
            seed=seed,
            resume=resume,
            device=device,
            quiet=quiet,
        )
        if summary := run_training(request, StderrConsole(quiet=quiet)):
            click.echo(summary)


def _check_new_run(out: Path, config: str | None, overrides: tuple[str, ...], *, has_own_config: bool) -> None:
    """Mistakes are told before torch and Lightning are loaded."""
    from protformer.config import load_run_config
    from protformer.training.run_folder import RunFolder

    RunFolder(out).refuse_trained()
    if has_own_config:
        load_run_config(config, overrides)
