"""What commands check first: mistakes are told before torch is loaded and before anything is written."""

from pathlib import Path


def check_model_and_proteins(model: Path, fasta: str | None) -> None:
    """Raise InputError unless there is a model and a first protein; standard input is left for later."""
    from protformer.corpus.fasta import FastaReport
    from protformer.corpus.stored_records import read_proteins
    from protformer.model_description import find_model_folder

    find_model_folder(model)
    if fasta is not None and fasta != "-":
        next(read_proteins(fasta, on_duplicate="allow", report=FastaReport()))
