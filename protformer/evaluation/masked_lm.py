"""How well a language model predicts residues, beside what knows nothing but frequencies.

In: a model and `MaskedBatch`es. Out: `MaskedLmScores`. Also the one definition of the loss, which training uses too.
Logits are computed at the asked positions only.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protformer.alphabet import FIRST_RESIDUE, LAST_RESIDUE
from protformer.model.masked_lm_head import ProteinLanguageModel

IGNORE = -100
"""Target of a position that is not asked for: what torch's cross_entropy skips by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedBatch:
    """Rows of tokens as the model sees them, and what it is asked for."""

    inputs: Int[Tensor, "batch residue"]
    targets: Int[Tensor, "batch residue"]
    """Token to predict, or IGNORE."""
    segments: Int[Tensor, "batch residue"]

    def to(self, device: torch.device) -> "MaskedBatch":
        return MaskedBatch(
            inputs=self.inputs.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
        )

    def split(self, num_rows: int) -> Iterator["MaskedBatch"]:
        """Views of so many rows each; the last may have fewer."""
        parts = (x.split(num_rows) for x in (self.inputs, self.targets, self.segments))
        for inputs, targets, segments in zip(*parts, strict=True):
            yield MaskedBatch(inputs=inputs, targets=targets, segments=segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedLmScores:
    """Figures over all asked positions of a set of proteins."""

    num_masked: int
    loss: float
    """Mean cross-entropy, nats."""
    perplexity: float
    accuracy: float
    baseline_perplexity: float
    """Of the unigram frequencies or of the copying baseline, at the same positions."""
    baseline_accuracy: float
    log_likelihood_gain: float
    """Mean over positions of log p(model) - log p(baseline), in nats; above 0 the model is better."""
    log_likelihood_gain_standard_error: float | None
    """With proteins, not positions, as the independent units (ratio estimator: Cochran 1977, 6.13); None for one."""


def predict_targets(
    model: ProteinLanguageModel, batch: MaskedBatch
) -> tuple[Float[Tensor, "asked token"], Int[Tensor, " asked"]]:
    """Logits at the asked positions, and the tokens asked for there."""
    asked = batch.targets != IGNORE
    return model(batch.inputs, batch.segments, asked), batch.targets[asked]


def masked_lm_loss_sum(model: ProteinLanguageModel, batch: MaskedBatch) -> Float[Tensor, ""]:
    """Cross-entropy summed over the asked positions, in nats, in float32."""
    logits, targets = predict_targets(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def evaluate_masked_lm(
    model: ProteinLanguageModel,
    batches: Iterable[MaskedBatch],
    frequencies: Float[Tensor, " token"],
    *,
    copying: tuple[float, float] | None = None,
) -> MaskedLmScores | None:
    """Score a model in evaluation mode against residue `frequencies`, or against `copying` them where a residue shows.

    `copying` is (share unchanged, share random) of the masking scheme among the selected positions. None if no position
    is asked for.
    """
    return summarize_units(score_units(model, batches, frequencies, copying=copying))


@torch.no_grad()
def score_units(
    model: ProteinLanguageModel,
    batches: Iterable[MaskedBatch],
    frequencies: Float[Tensor, " token"],
    *,
    copying: tuple[float, float] | None = None,
) -> Float[Tensor, "unit 5"]:
    """What `summarize_units` makes scores of: a row for each protein, so that processes may share the proteins."""
    units = [_score_batch(model, batch, frequencies.double(), copying) for batch in batches]
    return torch.cat([torch.zeros(0, 5, dtype=torch.float64), *units])


def summarize_units(table: Float[Tensor, "unit 5"]) -> MaskedLmScores | None:
    """Scores of all proteins together."""
    count, nll, correct, baseline_nll, baseline_correct = table.unbind(dim=1)
    num_masked = int(count.sum())
    if num_masked == 0:
        return None
    gain = baseline_nll - nll
    mean_gain = gain.sum() / num_masked
    num_units = len(table)
    squares = float(((gain - count * mean_gain) ** 2).sum())
    return MaskedLmScores(
        num_masked=num_masked,
        loss=float(nll.sum()) / num_masked,
        perplexity=float((nll.sum() / num_masked).exp()),
        accuracy=float(correct.sum() / num_masked),
        baseline_perplexity=float((baseline_nll.sum() / num_masked).exp()),
        baseline_accuracy=float(baseline_correct.sum() / num_masked),
        log_likelihood_gain=float(mean_gain),
        log_likelihood_gain_standard_error=None
        if num_units == 1
        else (squares * num_units / (num_units - 1)) ** 0.5 / num_masked,
    )


def _score_batch(
    model: ProteinLanguageModel, batch: MaskedBatch, frequencies: Tensor, copying: tuple[float, float] | None
) -> Float[Tensor, "unit 5"]:
    """Sums over each protein: asked positions, NLL, correct, the baseline's NLL and correct; float64 on the CPU."""
    logits, targets = predict_targets(model, batch)
    shown = batch.inputs[batch.targets != IGNORE].cpu()
    logits, targets = logits.float().cpu(), targets.cpu()
    baseline = _baseline(shown, frequencies, copying)
    columns = [
        torch.ones(len(targets)),
        F.cross_entropy(logits, targets, reduction="none"),
        (logits.argmax(dim=-1) == targets).double(),
        -baseline.gather(1, targets[:, None])[:, 0].log(),
        (baseline.argmax(dim=-1) == targets).double(),
    ]
    values = torch.stack([column.double() for column in columns], dim=1)
    row = torch.nonzero(batch.targets != IGNORE)[:, 0].cpu()
    unit = row * (int(batch.segments.max()) + 1) + batch.segments[batch.targets != IGNORE].cpu()
    _, unit_index = torch.unique(unit, return_inverse=True)
    num_units = int(unit_index.max()) + 1 if len(unit_index) else 0
    return torch.zeros(num_units, 5, dtype=torch.float64).index_add_(0, unit_index, values)


def _baseline(
    shown: Int[Tensor, " asked"], frequencies: Tensor, copying: tuple[float, float] | None
) -> Float[Tensor, "asked token"]:
    """What someone predicts who knows the frequencies, the masking scheme and the shown token, but no context.

    By Bayes, p(true t | shown r) is proportional to p(t) (unchanged [t = r] + random / number of residues).
    """
    prediction = frequencies.expand(len(shown), -1)
    if copying is None:
        return prediction
    unchanged, random = copying
    num_residues = LAST_RESIDUE - FIRST_RESIDUE + 1
    likelihood = unchanged * F.one_hot(shown, len(frequencies)).double() + random / num_residues
    posterior = prediction * likelihood
    posterior = posterior / posterior.sum(dim=1, keepdim=True)
    is_residue = (shown >= FIRST_RESIDUE) & (shown <= LAST_RESIDUE)
    return torch.where(is_residue[:, None], posterior, prediction)
