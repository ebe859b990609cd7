"""`protformer prepare`: FASTA to the token store that training reads."""

from pathlib import Path

import click

from protformer.cli.options import FilePath, fasta_option, quiet_option, workers_option


@click.command("prepare")
@fasta_option(multiple=True)
@click.option("--out", required=True, type=FilePath, metavar="STORE", help="Folder to make.")
@workers_option
@quiet_option
def command(fasta: tuple[str, ...], out: Path, workers: int | None, quiet: bool) -> None:
    """Turn FASTA into a token store.

    `train` does this by itself; prepare once to train several times on a large file: `train --fasta STORE`. Duplicate
    ids are allowed, ids are kept. The store is the same whatever the number of workers; after a kill, the same command
    goes on from where it was.
    """
    from protformer.cli.progress import byte_progress
    from protformer.corpus.build_workers import num_cores
    from protformer.corpus.token_store import build_token_store
    from protformer.errors import OutputError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists already; choose another --out, or delete it")
    with byte_progress(fasta, quiet=quiet) as progress:
        manifest = build_token_store(fasta, out, workers=workers or num_cores(), progress=progress)
    if not quiet and (changes := manifest.changes_summary()):
        click.echo(changes, err=True)
    click.echo(f"{out}: {manifest.num_proteins:,} proteins, {manifest.num_residues:,} residues")
