"""Masked-LM figures of a model on proteins, under the names that scripts rely on.

In: a session and records. Out: a flat mapping of names to numbers, for a table or JSON.
"""

from collections.abc import Iterable
from typing import Literal

import torch

from protformer.config import MaskingConfig
from protformer.corpus.evaluation_rows import EVALUATION_RATE
from protformer.corpus.fasta import SequenceRecord
from protformer.corpus.masking import SHARES
from protformer.errors import ConfigError, InputError
from protformer.evaluation.masked_lm import evaluate_masked_lm
from protformer.inference.batches import masked_batches
from protformer.inference.session import InferenceSession

EvaluationMasking = Literal["mask", "bert", "protein_lm"]


def score_masked_lm(
    session: InferenceSession, records: Iterable[SequenceRecord], *, masking: EvaluationMasking, batch_tokens: int
) -> dict[str, float | int | str | None]:
    """Perplexity and accuracy at the selected residues, beside the unigram (or copying) baseline's.

    Raises InputError if no residue is selected, as in a file of a few very short proteins.
    """
    session.require_lm_head("evaluate masked-lm")
    direction = session.model.config.direction
    if direction == "unidirectional" and masking != "mask":
        raise ConfigError(
            f"--masking {masking}: this model is unidirectional; it predicts next residues and masks nothing"
        )
    scheme = None if masking == "mask" else MaskingConfig(rate=EVALUATION_RATE, scheme=masking)
    batches = masked_batches(
        records,
        model=session.model.config,
        rate=EVALUATION_RATE,
        training_masking=scheme,
        max_tokens=batch_tokens,
        device=session.device,
    )
    with session.autocast(), torch.inference_mode():
        scores = evaluate_masked_lm(
            session.model,
            batches,
            torch.tensor(session.description.unigram_frequencies, dtype=torch.float64),
            copying=None if scheme is None else _copying_shares(scheme),
        )
    if scores is None:
        raise InputError("no residue was selected for masking; the proteins are too few or too short")
    baseline = "unigram" if scheme is None else "copying"
    return {
        "task": "masked residues" if direction == "bidirectional" else "next residues",
        "masking": masking,
        "perplexity": scores.perplexity,
        "accuracy": scores.accuracy,
        "num_masked": scores.num_masked,
        f"{baseline}_perplexity": scores.baseline_perplexity,
        f"{baseline}_accuracy": scores.baseline_accuracy,
        "nats_better_than_baseline": scores.log_likelihood_gain,
        "nats_better_standard_error": scores.log_likelihood_gain_standard_error,
    }


def _copying_shares(masking: MaskingConfig) -> tuple[float, float]:
    """Shares of unchanged and of random residues among the selected ones."""
    share_mask, share_random = SHARES[masking.scheme]
    return 1.0 - share_mask - share_random, share_random
