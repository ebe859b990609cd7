"""Other vocabularies of single residues, brought into the order of our 33 tokens.

In: the tokens of a pretrained model, in the order of their numbers. Out: the row of its embedding that each of our
tokens takes. A token that the model does not have (rare residues, gaps) takes the row of its `<unk>`, which is what
its own tokenizer would make of that letter. Vocabularies of anything but single residues are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protformer.alphabet import STANDARD_RESIDUES, TOKENS
from protformer.errors import InputError

ALIASES = {
    "[CLS]": "<cls>", "<s>": "<cls>", "[PAD]": "<pad>", "[SEP]": "<eos>", "</s>": "<eos>", "[UNK]": "<unk>",
    "[MASK]": "<mask>",
}  # fmt: skip
"""BERT's and fairseq's names of special tokens, and ours."""

REQUIRED = ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *STANDARD_RESIDUES)

UNKNOWN_BELOW = 30.0
"""A token that the model does not have gets the logit of its `<unk>` less this: next to no probability."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """How the rows of a pretrained embedding become ours."""

    rows: tuple[int, ...]
    """For each of our tokens, the row it takes."""
    unknown: tuple[bool, ...]
    """Whether that is the row of `<unk>`, as the model does not have the token."""

    def embedding(self, weight: Tensor) -> Tensor:
        """Rows in our order."""
        return weight[list(self.rows)]

    def output_bias(self, bias: Tensor) -> Tensor:
        """Biases of the logits in our order."""
        return bias[list(self.rows)] - UNKNOWN_BELOW * torch.tensor(self.unknown, dtype=bias.dtype)


def match_vocabulary(tokens: Sequence[str], source: str) -> Vocabulary:
    """Find our tokens among `tokens`. Raises InputError, beginning with `source`, for what is no such vocabulary."""
    numbers = {ALIASES.get(token, token): number for number, token in enumerate(tokens)}
    foreign = [token for token in tokens if ALIASES.get(token, token) not in TOKENS]
    if foreign:
        raise InputError(
            f"{source}: not a vocabulary of single residues: it has {len(foreign):,} other tokens, such as"
            f" {', '.join(map(repr, foreign[:5]))}"
        )
    missing = [token for token in REQUIRED if token not in numbers]
    if missing:
        raise InputError(f"{source}: the vocabulary lacks {', '.join(missing)}")
    return Vocabulary(
        rows=tuple(numbers.get(token, numbers["<unk>"]) for token in TOKENS),
        unknown=tuple(token not in numbers for token in TOKENS),
    )
