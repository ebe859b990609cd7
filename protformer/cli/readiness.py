"""How ready the layers of a model are for random features, for the commands that report it."""

import sys
from collections.abc import Sequence
from itertools import islice

from rich.console import Console

from protformer.cli.progress import count_progress
from protformer.corpus.fasta import FastaReport, read_fasta
from protformer.evaluation.attention_error import AttentionError, compare_with_exact
from protformer.evaluation.model_readiness import LayerReport, model_readiness, random_proteins
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import ModelDescription

RANDOM_RESIDUES = 512


def report_readiness(
    model: ProteinLanguageModel,
    description: ModelDescription,
    *,
    counts: Sequence[int | None],
    fasta: str | None,
    num_proteins: int,
    quiet: bool,
) -> tuple[list[LayerReport], str]:
    """A report for each layer and number of features (None: the model's own), and in words what it was made on.

    That is the first `num_proteins` of `fasta`, or as many of random residues.
    """
    proteins, sequences = _proteins(description, fasta, num_proteins)
    reports: list[LayerReport] = []
    with count_progress("proteins", quiet=quiet) as advance:
        for num_features in counts:
            reports += model_readiness(model, proteins, num_features=num_features, advance=advance)
    return reports, sequences


def report_exactness(
    model: ProteinLanguageModel, description: ModelDescription, *, fasta: str | None, num_proteins: int, quiet: bool
) -> tuple[list[AttentionError], str]:
    """The error of each layer's attention, and in words what it was measured on, as above."""
    proteins, sequences = _proteins(description, fasta, num_proteins)
    with count_progress("proteins", quiet=quiet) as advance:
        return compare_with_exact(model, proteins, advance=advance), sequences


def print_tables(tables: Sequence[object]) -> None:
    """Tables, and lines between them, on stdout."""
    # A file or pipe has no width; tables are not folded there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables:
        console.print(table)


def _proteins(description: ModelDescription, fasta: str | None, num_proteins: int) -> tuple[list[Sequence[int]], str]:
    proteins: list[Sequence[int]]
    if fasta is None:
        frequencies = description.unigram_frequencies
        proteins = [*random_proteins(frequencies, count=num_proteins, length=RANDOM_RESIDUES, seed=0)]
        sequences = f"{num_proteins} x {RANDOM_RESIDUES} random residues"
    else:
        records = read_fasta(fasta, on_duplicate="allow", report=FastaReport())
        proteins = [record.tokens for record in islice(records, num_proteins)]
        sequences = f"the first {len(proteins)} proteins of {fasta}"
    return proteins, sequences
