"""Options that several commands share, each written once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

FilePath = click.Path(path_type=Path)


def fasta_option(*, takes_stores: bool = True, **extra: Any) -> Callable[[Function], Function]:
    """`--fasta`: paths, or `-` for stdin; existence is checked by the reader, which says more."""
    kinds = "FASTA: plain, .gz, .bgz, .zst, or - for stdin"
    text = f"{kinds}; or a token store." if takes_stores else f"{kinds}."
    return click.option("--fasta", required=True, metavar="FILE", help=text, **extra)


model_option = click.option(
    "--model", "model_path", required=True, type=FilePath, metavar="MODEL", help="Model folder, or a run folder."
)
on_duplicate_option = click.option(
    "--on-duplicate",
    type=click.Choice(["error", "suffix", "first"]),
    default="error",
    show_default=True,
    help="Two records with one id: an error, number the later ones, or keep the first only.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of matrix products; auto is bf16 on CUDA, fp32 elsewhere.",
)
batch_tokens_option = click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=16_384,
    show_default=True,
    metavar="N",
    help="Tokens worked off at once, in embed on a CPU 2,048 at most; less needs less memory, results are the same.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes that read FASTA, each some 60 MB of memory.  [default: all cores]",
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table.")
