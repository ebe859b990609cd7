"""How ready the layers of a model are for random features, for the commands that report it."""

import sys
from collections.abc import Sequence
from itertools import islice

from rich.console import Console

from protformer.cli.progress import count_progress
from protformer.corpus.fasta import FastaReport, read_fasta
from protformer.evaluation.attention_error import AttentionError, compare_with_exact
from protformer.evaluation.model_readiness import LayerReport, model_readiness, random_proteins
from protformer.inference.batches import longest_protein
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import ModelDescription

RANDOM_RESIDUES = 512

Tokens = Sequence[int]


def report_readiness(
    model: ProteinLanguageModel, proteins: Sequence[Tokens], *, counts: Sequence[int | None], quiet: bool
) -> list[LayerReport]:
    """A report for each layer and number of features; None: the model's own."""
    reports: list[LayerReport] = []
    with count_progress("proteins", quiet=quiet) as advance:
        for num_features in counts:
            reports += model_readiness(model, proteins, num_features=num_features, advance=advance)
    return reports


def report_exactness(model: ProteinLanguageModel, proteins: Sequence[Tokens], *, quiet: bool) -> list[AttentionError]:
    """The error of each layer's attention."""
    with count_progress("proteins", quiet=quiet) as advance:
        return compare_with_exact(model, proteins, advance=advance)


def print_tables(tables: Sequence[object]) -> None:
    """Tables, and lines between them, on stdout."""
    # A file or pipe has no width; tables are not folded there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables:
        console.print(table)


def proteins_to_report(description: ModelDescription, fasta: str | None, num_proteins: int) -> tuple[list[Tokens], str]:
    """The first `num_proteins` of `fasta`, or as many of random residues, and the same in words.

    Each is cut where the model's learned positions end.
    """
    limit = longest_protein(description.model)
    if fasta is None:
        frequencies = description.unigram_frequencies
        length = RANDOM_RESIDUES if limit is None else min(RANDOM_RESIDUES, limit)
        drawn = random_proteins(frequencies, count=num_proteins, length=length, seed=0)
        return [*drawn], f"{num_proteins} x {length} random residues"
    records = read_fasta(fasta, on_duplicate="allow", report=FastaReport())
    proteins: list[Tokens] = [record.tokens[:limit] for record in islice(records, num_proteins)]
    cut = "" if limit is None else f", {limit:,} residues of each at most"
    return proteins, f"the first {len(proteins)} proteins of {fasta}{cut}"
