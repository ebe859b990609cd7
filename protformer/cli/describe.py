"""`protformer describe`: what a token store, split, model, run, embedding file or contact map holds."""

from pathlib import Path

import click

from protformer.cli.options import FilePath, json_option

_LEAST_WIDTH = 26


@click.command("describe")
@click.argument("path", type=FilePath)
@json_option
def command(path: Path, as_json: bool) -> None:
    """Say what PATH holds: a token store, split, model folder or run, an embedding file, or a contact map (.npz)."""
    import json

    from protformer.inference.describe import describe

    facts = describe(path)
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max([_LEAST_WIDTH, *map(len, facts)])
    for name, value in facts.items():
        click.echo(f"{name:{width}} {_as_text(value, indent=width + 1)}")


def _as_text(value: object, indent: int) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return (", " if all(" " not in str(item) for item in value) else "\n" + " " * indent).join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
