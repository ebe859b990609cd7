"""`protformer convert`: a pretrained softmax Transformer to a model folder."""

from pathlib import Path

import click

from protformer.cli.options import FilePath, quiet_option


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
    help="Exact gives the original's results; a linear kind uses its weights, and needs training to recover.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a field of the attention: model.attention.num_features=1024.",
)
@click.option("--fasta", metavar="FILE", help="With favor: proteins to report on (default: random residues).")
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

    With favor, a report tells layer by layer how far random features are from the original's attention.

    \b
    Example:
      protformer convert --from facebook/esm2_t6_8M_UR50D --out models/esm2-8m
    """
    from protformer.config import load_run_config
    from protformer.errors import ConfigError, OutputError

    for override in overrides:
        if not override.startswith("model.attention.") or override.startswith("model.attention.kind"):
            raise ConfigError(f"--set {override}: only fields of model.attention can be set here (and not its kind)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists already; choose another --out or remove it")
    chosen = load_run_config(None, (f"model.attention.kind={attention}", *overrides)).model.attention

    from protformer.checkpoint import save_model
    from protformer.conversion.convert import convert
    from protformer.conversion.pretrained_folder import read_pretrained

    conversion = convert(read_pretrained(source), chosen)
    save_model(out, conversion.model, conversion.description)
    for note in conversion.notes if not quiet else ():
        click.echo(f"note: {note}", err=True)
    if chosen.kind == "favor":
        from protformer.cli.benchmark_tables import readiness_table
        from protformer.cli.readiness import print_tables, report_readiness

        reports, sequences = report_readiness(
            conversion.model,
            conversion.description,
            counts=(None,),
            fasta=fasta,
            num_proteins=num_proteins,
            quiet=quiet,
        )
        print_tables(readiness_table(reports, sequences))
    elif chosen.kind == "generalized" and not quiet:
        click.echo("note: this kernel is no estimate of softmax attention: train the model before you use it", err=True)
    num_parameters = sum(parameter.numel() for parameter in conversion.model.parameters())
    click.echo(f"{out}: {conversion.description.converted_from}, {num_parameters:,} parameters, {attention} attention")
