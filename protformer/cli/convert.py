"""`protformer convert`: a pretrained softmax Transformer to a model folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from protformer.cli.options import FilePath, quiet_option

if TYPE_CHECKING:
    from protformer.cli.readiness import Tokens
    from protformer.conversion.convert import Conversion


@click.command("convert")
@click.option(
    "--from",
    "source",
    required=True,
    metavar="FOLDER_OR_HUB_ID",
    help="A folder of transformers' layout (ESM, BERT, RoBERTa), or facebook/esm2_t6_8M_UR50D to download that.",
)
@click.option("--out", required=True, type=FilePath, metavar="MODEL", help="Model folder to make.")
@click.option(
    "--attention",
    type=click.Choice(["exact", "clustered", "favor", "generalized"]),
    default="exact",
    show_default=True,
    help="Exact gives the original's results, clustered nearly so in O(length^1.5) time; linear kinds need training.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a field of the attention, model.attention.num_features=1024, or model.exact_layers=[1, 6].",
)
@click.option("--fasta", metavar="FILE", help="Proteins to report on (default: random residues).")
@click.option(
    "--num-proteins", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="To report on."
)
@quiet_option
def command(
    source: str,
    out: Path,
    attention: str,
    overrides: tuple[str, ...],
    fasta: str | None,
    num_proteins: int,
    quiet: bool,
) -> None:
    """Make a model folder of pretrained weights: ESM-1b, ESM-1v, ESM-2, or a BERT or RoBERTa of single residues.

    With another attention than exact, a report tells layer by layer how far it is from the original's.

    \b
    Example:
      protformer convert --from facebook/esm2_t6_8M_UR50D --out models/esm2-8m
    """
    from protformer.config import load_run_config
    from protformer.errors import ConfigError, OutputError

    for override in overrides:
        is_allowed = override.startswith(("model.attention.", "model.exact_layers="))
        if not is_allowed or override.startswith("model.attention.kind"):
            raise ConfigError(
                f"--set {override}: only model.exact_layers and fields of model.attention (not its kind) are set here"
            )
    if attention == "exact" and fasta is not None:
        raise click.UsageError("--fasta is for the report, which exact attention has none of")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists already; choose another --out or remove it")
    # The number of layers is in the weights; until they are read, layers may have any number.
    anything = "model.num_layers=1000000"
    wanted = load_run_config(None, (anything, f"model.attention.kind={attention}", *overrides)).model
    chosen = wanted.attention

    from protformer.checkpoint import save_model
    from protformer.cli.readiness import proteins_to_report
    from protformer.conversion.convert import convert
    from protformer.conversion.pretrained_folder import read_pretrained

    conversion = convert(read_pretrained(source), chosen, exact_layers=wanted.exact_layers)
    if chosen.kind != "exact":
        proteins, sequences = proteins_to_report(conversion.description, fasta, num_proteins)
    save_model(out, conversion.model, conversion.description)
    for note in conversion.notes if not quiet else ():
        click.echo(f"note: {note}", err=True)
    if chosen.kind != "exact":
        _report(conversion, proteins, sequences, quiet=quiet)
    num_parameters = sum(parameter.numel() for parameter in conversion.model.parameters())
    click.echo(f"{out}: {conversion.description.converted_from}, {num_parameters:,} parameters, {attention} attention")


def _report(conversion: "Conversion", proteins: "list[Tokens]", sequences: str, *, quiet: bool) -> None:
    """Print how far the attention is from exact attention; for random features, also why."""
    from protformer.cli.benchmark_tables import exactness_table, readiness_table
    from protformer.cli.readiness import print_tables, report_exactness, report_readiness

    model = conversion.model
    if model.config.attention.kind == "favor":
        reports = report_readiness(model, proteins, counts=(None,), quiet=quiet)
        print_tables(readiness_table(reports, sequences))
    errors = report_exactness(model, proteins, quiet=quiet)
    print_tables(exactness_table(errors, sequences))
    if model.config.attention.kind == "generalized" and not quiet:
        click.echo("note: this kernel is no estimate of softmax attention: train the model before you use it", err=True)
