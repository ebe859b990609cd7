"""`protformer prepare`: FASTA to the token store that training reads, or to several that share no relatives."""

from pathlib import Path
from typing import Any

import click

from protformer.cli.options import FilePath, fasta_option, quiet_option, workers_option
from protformer.cli.split_options import split_options, split_request


@click.command("prepare")
@fasta_option(takes_stores=False, multiple=True)
@click.option("--out", required=True, type=FilePath, metavar="STORE", help="Folder to make.")
@workers_option
@split_options
@quiet_option
def command(fasta: tuple[str, ...], out: Path, workers: int | None, split: dict[str, Any], quiet: bool) -> None:
    """Turn FASTA into a token store.

    `train` does this by itself; prepare once to train several times on a large file: `train --fasta STORE`. Duplicate
    ids are allowed, ids are kept. The store is the same whatever the number of workers. After Ctrl-C, SIGTERM or a
    kill, the same command goes on from the parts that were finished: plain FASTA is read in parts of 64 MiB, a
    compressed file whole.

    With --split, STORE holds one token store each for train, validation, test and ood (families held out whole), and
    split.json and sides.tsv, which say how they were made and where each protein went: `train --fasta STORE/train
    --val-fasta STORE/validation`. Whole clusters go to one side by a keyed hash, so that they stay there when proteins
    are added.

    \b
    Example:
      protformer prepare --fasta proteins.fa.gz --out splits --split mmseqs --threads 8
    """
    from protformer.cli.progress import StderrConsole
    from protformer.corpus.build_workers import num_cores
    from protformer.corpus.duplicates import refuse_repeated_sources
    from protformer.corpus.store_manifest import StoreManifest
    from protformer.corpus.token_store import TokenStore, build_token_store
    from protformer.errors import OutputError

    request = split_request(split)
    refuse_repeated_sources(fasta)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists already; choose another --out, or delete it")
    console = StderrConsole(quiet=quiet)

    def build(store: Path) -> StoreManifest:
        if store.exists() and (left := TokenStore.open(store)).difference_from(fasta) is None:
            console.tell("the proteins were read already, before an interruption")
            return left.manifest
        with console.byte_progress(fasta) as progress:
            manifest = build_token_store(
                fasta, store, workers=workers or num_cores(), progress=progress, tell=console.tell
            )
        console.tell(manifest.changes_summary())
        console.tell(manifest.nucleotide_note())
        return manifest

    if request is None:
        manifest = build(out)
        click.echo(f"{out}: {manifest.num_proteins:,} proteins, {manifest.num_residues:,} residues")
        return
    from protformer.corpus.split_stores import prepare_split

    if request.method == "hash" and not request.search:
        console.tell(
            "note: a hash keeps identical sequences together, not homologs: what is held out has relatives in train"
        )
    for line in prepare_split(request, out, build=build, tell=console.tell).summary(str(out)):
        click.echo(line)
