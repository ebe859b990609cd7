"""`protformer embed`: proteins to vectors."""

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


@click.command("embed")
@model_option
@fasta_option()
@click.option("--out", required=True, type=FilePath, metavar="FILE", help="Ends in .h5, .npy, .parquet or .pt.")
@click.option(
    "--per",
    type=click.Choice(["protein", "residue", "both"]),
    default="protein",
    show_default=True,
    help="One vector a protein (mean over its residues), one a residue, or both.",
)
@click.option("--layer", type=int, default=-1, show_default=True, help="0 is the token embedding, -1 the last layer.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float32", show_default=True)
@click.option("--max-length", type=click.IntRange(min=1), metavar="N", help="Residues; default: whole proteins.")
@click.option(
    "--on-long",
    type=click.Choice(["error", "window", "truncate", "skip"]),
    default="error",
    show_default=True,
    help="Proteins above --max-length: refuse, mean of half-overlapping windows, cut, or leave out.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted .h5.")
@on_duplicate_option
@batch_tokens_option
@precision_option
@device_option
@quiet_option
def command(
    model_path: Path,
    fasta: str,
    out: Path,
    per: Literal["protein", "residue", "both"],
    layer: int,
    dtype: Literal["float16", "float32"],
    max_length: int | None,
    on_long: Literal["error", "window", "truncate", "skip"],
    resume: bool,
    on_duplicate: Literal["error", "suffix", "first"],
    batch_tokens: int,
    precision: str,
    device: str,
    quiet: bool,
) -> None:
    """Embed whole proteins, however long.

    \b
    Example:
      protformer embed --model runs/trembl --fasta proteins.fa --out embeddings.h5 --per both
    """
    if max_length is None and on_long != "error":
        raise click.UsageError("--on-long needs --max-length: without it proteins are embedded whole")
    from protformer.corpus.fasta import FastaReport
    from protformer.corpus.stored_records import read_proteins
    from protformer.inference.embedding_writers import check_output, open_embedding_writer

    check_output(out, resume=resume)
    check_model_and_proteins(model_path, fasta)
    from protformer.checkpoint import save_tensors
    from protformer.cli.progress import byte_progress
    from protformer.inference.embed import LengthLimit, LengthReport, describe_embedding, embed, resolve_layer
    from protformer.inference.session import open_session

    session = open_session(model_path, device=device, precision=precision)
    num_blocks = resolve_layer(layer, session.model.config.num_layers)
    limit = LengthLimit(max_length=max_length, on_long=on_long)
    description = describe_embedding(session, layer=layer, limit=limit)
    writer = open_embedding_writer(out, per=per, dtype=dtype, description=description, resume=resume, save=save_tensors)
    fasta_report, length_report = FastaReport(), LengthReport()
    with byte_progress([fasta], quiet=quiet) as progress, writer:
        done = writer.done_ids()
        records = read_proteins(fasta, on_duplicate=on_duplicate, report=fasta_report, consumed=progress)
        new = (record for record in records if not writer.has(record.id, record.tokens))
        written = 0
        for embedding in embed(
            session, new, per=per, layer=num_blocks, limit=limit, report=length_report, batch_tokens=batch_tokens
        ):
            writer.write(embedding)
            written += 1
    for line in (fasta_report.summary(), length_report.summary()):
        if line and not quiet:
            click.echo(line, err=True)
    earlier = f" ({len(done):,} were there already)" if done else ""
    click.echo(f"{out}: {written:,} proteins embedded{earlier}")
