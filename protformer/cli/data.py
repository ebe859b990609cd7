"""`protformer data`: look at a corpus, bring one, and rid it of repeats."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from protformer.cli.options import FilePath, fasta_option, json_option, quiet_option

if TYPE_CHECKING:
    from protformer.corpus.statistics import CorpusStatistics


@click.group("data")
def command() -> None:
    """Look at proteins, download them, and remove repeats."""


@command.command("stats")
@fasta_option(multiple=True)
@click.option("--plot", type=FilePath, metavar="PNG", help="Also draw lengths and residues.")
@json_option
@quiet_option
def stats(fasta: tuple[str, ...], plot: Path | None, as_json: bool, quiet: bool) -> None:
    """Count proteins, lengths and residues of FASTA files, or of a token store.

    \b
    Example:
      protformer data stats --fasta proteins.fa.gz --plot proteins.png
    """
    from protformer.cli.progress import byte_progress
    from protformer.corpus.statistics import count_proteins
    from protformer.corpus.store_manifest import nucleotide_note

    with byte_progress(fasta, quiet=quiet) as progress:
        statistics = count_proteins(fasta, consumed=progress)
    if not quiet and statistics.changes:
        click.echo(statistics.changes, err=True)
    if not quiet and (note := nucleotide_note(statistics.residue_counts)):
        click.echo(note, err=True)
    if plot is not None:
        from protformer.evaluation.corpus_figure import draw_corpus

        draw_corpus(statistics, plot)
    click.echo(json.dumps(statistics.to_tree()) if as_json else _as_table(statistics))


@command.command("download")
@click.argument("database", type=click.Choice(["swissprot", "trembl", "uniref50"]))
@click.option("--out", required=True, type=FilePath, metavar="FILE", help="A gzip file: name it *.fasta.gz.")
@click.option(
    "--mirror",
    default="uniprot",
    show_default=True,
    metavar="NAME|URL",
    help="uniprot, ebi, expasy, or the address of a folder laid out as UniProt's current_release.",
)
@quiet_option
def fetch(database: str, out: Path, mirror: str, quiet: bool) -> None:
    """Download a UniProt database's current release as FASTA.

    Size and MD5 are those of the release. What came of an interrupted download stays beside FILE, and the same command
    goes on with it.

    \b
    Example:
      protformer data download swissprot --out swissprot.fasta.gz
    """
    from protformer.cli.progress import StderrConsole, transfer_progress
    from protformer.corpus.download import download, read_release
    from protformer.errors import OutputError

    if out.exists():
        raise OutputError(f"{out}: exists already; choose another --out, or delete it")
    console = StderrConsole(quiet=quiet)
    release = read_release(database, mirror, tell=console.tell)
    console.tell(f"{database}, release {release.version}: {release.num_bytes:,} bytes")
    with transfer_progress("downloading", release.num_bytes, quiet=quiet) as progress:
        download(database, mirror, out, release, progress=progress, tell=console.tell)
    click.echo(f"{out}: {database}, release {release.version}, {release.num_bytes:,} bytes, MD5 {release.md5}")


@command.command("dedup")
@fasta_option(multiple=True)
@click.option("--out", required=True, type=FilePath, metavar="FILE", help="FASTA, gzip-compressed if it ends in .gz.")
@quiet_option
def dedup(fasta: tuple[str, ...], out: Path, quiet: bool) -> None:
    """Keep the first record of each sequence.

    Sequences are compared and written as they are read everywhere: in upper case, without gaps, J as X.

    \b
    Example:
      protformer data dedup --fasta a.fa.gz --fasta b.fa.gz --out unique.fa.gz
    """
    from protformer.cli.progress import byte_progress
    from protformer.corpus.unique_sequences import write_unique

    with byte_progress(fasta, quiet=quiet) as progress:
        report = write_unique(fasta, out, consumed=progress)
    if not quiet and report.changes:
        click.echo(report.changes, err=True)
    click.echo(
        f"{out}: {report.kept:,} proteins, {report.residues:,} residues; {report.repeated:,} repeated sequences dropped"
    )


@command.command("export")
@fasta_option(multiple=True)
@click.option("--out", required=True, type=FilePath, metavar="FILE", help="FASTA, gzip-compressed if it ends in .gz.")
@quiet_option
def export(fasta: tuple[str, ...], out: Path, quiet: bool) -> None:
    """Write the proteins of a token store as FASTA.

    A store keeps ids without the words behind them, and sequences as they were read: in upper case, without gaps, J
    as X.

    \b
    Example:
      protformer data export --fasta splits/test --out test.fa.gz
    """
    from protformer.cli.progress import byte_progress
    from protformer.corpus.fasta_writing import export_fasta

    with byte_progress(fasta, quiet=quiet) as progress:
        report = export_fasta(fasta, out, consumed=progress)
    if not quiet and (changes := report.summary()):
        click.echo(changes, err=True)
    click.echo(f"{out}: {report.records:,} proteins, {report.residues:,} residues")


def _as_table(statistics: "CorpusStatistics") -> str:
    from protformer.corpus.statistics import QUANTILES

    edges, counts = statistics.histogram()
    largest = max(1, int(counts.max()))
    lines = [
        f"proteins      {statistics.num_proteins:,}",
        f"residues      {statistics.num_residues:,}",
        f"length        mean {statistics.mean_length:.1f}, shortest {statistics.length_quantile(0.0):,}, "
        f"longest {statistics.length_quantile(1.0):,}",
        "quantiles     " + ", ".join(f"{share:.0%} {statistics.length_quantile(share):,}" for share in QUANTILES),
        "",
        "length from   proteins",
    ]
    for edge, count in zip(edges.tolist(), counts.tolist(), strict=False):
        lines.append(f"{edge:11,}   {count:12,} {'#' * round(40 * count / largest)}".rstrip())
    lines += ["", "residue          count      share"]
    for letter, count in sorted(statistics.residue_counts.items(), key=lambda item: -item[1]):
        if count:
            lines.append(f"{letter:7} {count:14,} {count / statistics.num_residues:10.4%}")
    return "\n".join(lines)
