"""`protformer predict-contacts`: proteins, or concatenated pairs, to contact maps."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import click

from protformer.cli.early_checks import check_model_and_proteins
from protformer.cli.options import (
    FilePath,
    batch_tokens_option,
    device_option,
    fasta_option,
    model_option,
    on_duplicate_option,
    precision_option,
    quiet_option,
)


@click.command("predict-contacts")
@model_option
@fasta_option()
@click.option("--out", required=True, type=FilePath, metavar="DIR", help="Folder for one file a protein or pair.")
@click.option(
    "--pairs",
    type=FilePath,
    metavar="TSV",
    help="Lines a<TAB>b[<TAB>label] of ids: concatenate these two, and map both.",
)
@click.option(
    "--ids",
    "ids",
    multiple=True,
    metavar="ID",
    help="Only this protein, by its id or accession; may be given several times.",
)
@click.option(
    "--method",
    type=click.Choice(["attention", "jacobian"]),
    default="attention",
    show_default=True,
    help="Attention maps, or the categorical Jacobian (20 forward passes a residue).",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(["npz", "rr", "csv"]),
    multiple=True,
    default=("npz",),
    show_default=True,
    help="May be given several times.",
)
@click.option("--plot", is_flag=True, help="Also write a PNG of each map.")
@click.option("--resume", is_flag=True, help="Keep the .npz maps in --out; refused if made otherwise.")
@on_duplicate_option
@batch_tokens_option
@precision_option
@device_option
@quiet_option
def command(
    model_path: Path,
    fasta: str,
    out: Path,
    pairs: Path | None,
    ids: tuple[str, ...],
    method: Literal["attention", "jacobian"],
    formats: tuple[Literal["npz", "rr", "csv"], ...],
    plot: bool,
    resume: bool,
    on_duplicate: Literal["error", "suffix", "first"],
    batch_tokens: int,
    precision: str,
    device: str,
    quiet: bool,
) -> None:
    """Predict contacts within proteins, or between two concatenated ones.

    Scores rank pairs of residues; they are no calibrated probabilities, unless the model has a contact head (as a
    converted ESM-2 has). Memory grows with the square of the length.

    \b
    Example:
      protformer predict-contacts --model runs/trembl --fasta proteins.fa --out contacts --plot
    """
    if pairs is not None and ids:
        raise click.UsageError("--pairs and --ids exclude each other: pairs name their proteins")
    if resume and "npz" not in formats:
        raise click.UsageError("--resume needs --format npz, which tells what a map was made of")
    check_model_and_proteins(model_path, fasta if pairs is None and not ids else None)
    from protformer.cli.progress import StderrConsole, count_progress
    from protformer.corpus.fasta import FastaReport, SequenceRecord
    from protformer.corpus.named_records import read_named
    from protformer.corpus.stored_records import read_proteins
    from protformer.inference.contact_maps import MapFiles, write_maps
    from protformer.inference.contacts import chains_of_pairs, only_named
    from protformer.inference.session import open_session

    session = open_session(model_path, device=device, precision=precision)
    if pairs is not None and session.description.packing == "isolate" and not quiet:
        click.echo("note: this model was trained with packing: isolate and never saw two proteins together", err=True)
    report = FastaReport()

    def find(names: Collection[str]) -> Iterator[SequenceRecord]:
        tell = StderrConsole(quiet=quiet).tell
        return read_named(fasta, names, on_duplicate=on_duplicate, report=report, tell=tell)

    if pairs is None:
        records = only_named(ids, find(ids)) if ids else read_proteins(fasta, on_duplicate=on_duplicate, report=report)
    tasks = ((record,) for record in records) if pairs is None else chains_of_pairs(pairs, find)
    files = MapFiles(folder=out, formats=tuple(dict.fromkeys(formats)), plot=plot, resume=resume)
    with count_progress("maps", quiet=quiet) as progress:
        written, there = write_maps(session, tasks, files, method=method, batch_tokens=batch_tokens, progress=progress)
    if not quiet and (line := report.summary()):
        click.echo(line, err=True)
    earlier = f" ({there:,} were there already)" if there else ""
    click.echo(f"{out}: {written:,} contact maps{earlier}")
