"""`protformer evaluate`: how good is a model."""

import json
from pathlib import Path
from typing import Literal

import click

from protformer.cli.options import (
    batch_tokens_option,
    device_option,
    fasta_option,
    json_option,
    model_option,
    precision_option,
    quiet_option,
)


@click.group("evaluate")
def command() -> None:
    """Measure a model against held-out data, beside simple baselines."""


@command.command("masked-lm")
@model_option
@fasta_option()
@click.option(
    "--masking",
    type=click.Choice(["mask", "bert", "protein_lm"]),
    default="mask",
    show_default=True,
    help="Show MASK at every selected position, or a training scheme, beside a baseline that copies what it sees.",
)
@json_option
@batch_tokens_option
@precision_option
@device_option
@quiet_option
def masked_lm(
    model_path: Path,
    fasta: str,
    masking: Literal["mask", "bert", "protein_lm"],
    as_json: bool,
    batch_tokens: int,
    precision: str,
    device: str,
    quiet: bool,
) -> None:
    """Perplexity and accuracy at masked residues, beside residue frequencies alone.

    --fasta may be a token store, such as the `test` that `prepare --split` makes.

    Proteins are whole and by themselves; which residues are masked depends on the protein only, so figures of
    different models compare. A unidirectional model is asked for every residue, from those before it.
    """
    from protformer.cli.progress import byte_progress
    from protformer.corpus.fasta import FastaReport
    from protformer.corpus.stored_records import read_proteins
    from protformer.inference.masked_lm import score_masked_lm
    from protformer.inference.session import open_session

    session = open_session(model_path, device=device, precision=precision)
    report = FastaReport()
    with byte_progress([fasta], quiet=quiet) as progress:
        records = read_proteins(fasta, on_duplicate="allow", report=report, consumed=progress)
        figures = score_masked_lm(session, records, masking=masking, batch_tokens=batch_tokens)
    if not quiet and (line := report.summary()):
        click.echo(line, err=True)
    if as_json:
        click.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        click.echo(f"{name:34} {value:.4f}" if isinstance(value, float) else f"{name:34} {value}")
