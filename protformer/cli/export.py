"""`protformer export`: a model folder to one that transformers reads."""

from pathlib import Path

import click

from protformer.cli.options import FilePath, model_option, quiet_option


@click.command("export")
@model_option
@click.option("--out", required=True, type=FilePath, metavar="DIR", help="Folder to make.")
@quiet_option
def command(model_path: Path, out: Path, quiet: bool) -> None:
    """Write a model as transformers' EsmForMaskedLM, with equal outputs.

    The model must have ESM-2's architecture: exact attention, pre-LN, rotary positions. Converted from weights without
    a masked-LM head, it is written as an EsmModel.

    \b
    Example:
      protformer export --model models/esm2-8m --out esm2-8m-hf
    """
    import torch

    from protformer.checkpoint import load_model
    from protformer.conversion.export import export_model

    model, description = load_model(model_path, torch.device("cpu"))
    notes = export_model(out, model, description)
    for note in notes if not quiet else ():
        click.echo(f"note: {note}", err=True)
    kind = "EsmForMaskedLM" if description.has_lm_head else "EsmModel"
    click.echo(f"{out}: for transformers.{kind}.from_pretrained")
