"""`protformer evaluate`: how good is a model."""

import json
from pathlib import Path
from typing import Literal

import click

from protformer.cli.options import (
    FilePath,
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
        told = "-" if value is None else f"{value:.4f}" if isinstance(value, float) else value
        click.echo(f"{name:34} {told}")


@command.command("contacts")
@model_option
@click.option(
    "--structures",
    required=True,
    type=FilePath,
    metavar="PATH",
    help="Folder of PDB or mmCIF files, one such file, or .jsonl[.gz] with a chain a line: id, seq, cb.",
)
@click.option(
    "--method",
    type=click.Choice(["attention", "jacobian"]),
    default="attention",
    show_default=True,
    help="As in predict-contacts.",
)
@json_option
@batch_tokens_option
@precision_option
@device_option
@quiet_option
def contacts(
    model_path: Path,
    structures: Path,
    method: Literal["attention", "jacobian"],
    as_json: bool,
    batch_tokens: int,
    precision: str,
    device: str,
    quiet: bool,
) -> None:
    """Precision of predicted contacts on chains of known structure.

    Contacts are C-betas less than 8 angstrom apart; P@L is the precision of the L strongest pairs, L the chain's
    length. Ranges: long 24 residues or more along the chain, medium 12 to 23, short 6 to 11. Means over chains.
    """
    from protformer.cli.progress import count_progress
    from protformer.corpus.structures import read_chains
    from protformer.inference.contact_evaluation import score_contacts
    from protformer.inference.session import open_session

    session = open_session(model_path, device=device, precision=precision)
    with count_progress("chains", quiet=quiet) as advance:
        figures = score_contacts(
            session, read_chains(structures), method=method, batch_tokens=batch_tokens, advance=advance
        )
    if as_json:
        click.echo(json.dumps(figures))
        return
    columns = ("P@L", "P@L/2", "P@L/5", "random_P@L")
    click.echo(f"{'range':8}" + "".join(f"{name:>12}" for name in columns))
    for name, values in figures.items():
        if isinstance(values, dict):
            click.echo(f"{name:8}" + "".join(_cell(values[column]) for column in columns))
    click.echo(f"num_chains {figures['num_chains']}")


def _cell(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:12.3f}"
