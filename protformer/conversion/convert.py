"""Pretrained softmax Transformers to our model: the same weights, with exact or linear attention.

In: a `PretrainedFolder` and the attention to use. Out: a `Conversion`. With exact attention the model gives the
original's hidden states, logits and contacts. Tensors that are missing, that do not fit, or that are inside the encoder
and would be ignored, are errors; heads of other tasks are left out and told. Positions and token types of BERT become
one table; rows of embeddings take our order of tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from protformer.alphabet import NUM_TOKENS, RESIDUE_TO_TOKEN, TOKENS
from protformer.config import AttentionConfig, ModelConfig, RotaryRounding
from protformer.conversion.layouts import WITHOUT_MEANING, Layout, LmHead, find_layout
from protformer.conversion.pretrained_folder import PretrainedFolder
from protformer.conversion.vocabulary import Vocabulary, match_vocabulary
from protformer.errors import InputError
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model.rotary import rotary_frequencies
from protformer.model_description import ModelDescription

SWISS_PROT_COMPOSITION = {
    "A": 825, "R": 553, "N": 406, "D": 546, "C": 138, "Q": 393, "E": 672, "G": 707, "H": 227, "I": 591, "L": 965,
    "K": 580, "M": 241, "F": 386, "P": 474, "S": 664, "T": 535, "W": 110, "Y": 292, "V": 686,
}  # fmt: skip
"""Of 10,000 residues (UniProtKB/Swiss-Prot, release statistics of 2023): the unigram baseline of a converted model, as
its own training corpus is not known here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A converted model and what its user should know."""

    model: ProteinLanguageModel
    description: ModelDescription
    notes: tuple[str, ...]


def convert(
    pretrained: PretrainedFolder, attention: AttentionConfig | None = None, *, exact_layers: Sequence[int] = ()
) -> Conversion:
    """Build our model of these weights; `attention` is exact unless given. Raises InputError and ConfigError."""
    layout = find_layout(pretrained.config, pretrained.tensors.keys(), pretrained.name)
    reader = _Reader(pretrained, layout)
    config = replace(layout.model, rotary_rounding=reader.rotary_rounding())
    if attention is not None:
        config = replace(config, attention=attention, exact_layers=tuple(exact_layers))
    weights = dict(reader.weights())
    has_lm_head = any(name.startswith("head.") for name in weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a head that the weights do not have is the same each time
        model = ProteinLanguageModel(config, seed=0)
    _check_shapes(model, weights, pretrained.name)
    model.load_state_dict(weights, strict=False)
    description = ModelDescription(
        packing="isolate",
        model=config,
        converted_from=f"{pretrained.name} ({layout.name})",
        has_lm_head=has_lm_head,
        residue_counts=_residue_counts(),
    )
    return Conversion(
        model=model.eval(), description=description, notes=tuple(_notes(config, reader, has_lm_head=has_lm_head))
    )


class _Reader:
    """Takes tensors by their names in the layout, and keeps account of them."""

    def __init__(self, pretrained: PretrainedFolder, layout: Layout) -> None:
        self.source, self.layout = pretrained.name, layout
        # BERT's first checkpoints have TensorFlow's names of what a LayerNorm multiplies with and adds.
        self.tensors = {_modern_name(name): tensor for name, tensor in pretrained.tensors.items()}
        self.taken: set[str] = set()
        vocabulary = pretrained.vocabulary
        if vocabulary is None:
            if layout.name != "ESM" or len(self.take(layout.token_embedding)) != NUM_TOKENS:
                raise InputError(
                    f"{self.source}: no vocabulary (vocab.txt, vocab.json or tokenizer.json), which says what a row of"
                    f" the embedding stands for"
                )
            vocabulary = TOKENS
        self.vocabulary: Vocabulary = match_vocabulary(vocabulary, self.source)

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise InputError(f"{self.source}: the tensor {name} is missing")
        self.taken.add(name)
        return self.tensors[name].float()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Our tensors. Raises InputError if one of the encoder is left over in the end."""
        layout = self.layout
        embedding = self.take(layout.token_embedding)
        if layout.vocab_size not in (None, len(embedding)):
            raise InputError(
                f"{self.source}: the weights do not fit config.json: vocab_size is {layout.vocab_size}, and"
                f" {layout.token_embedding} has {len(embedding)} rows"
            )
        if max(self.vocabulary.rows) >= len(embedding):
            raise InputError(f"{self.source}: {layout.token_embedding} has fewer rows than the vocabulary has tokens")
        yield "encoder.embedding.weight", self.vocabulary.embedding(embedding)
        if layout.model.positions == "learned":
            yield "encoder.position_embedding.weight", self._positions()
        for ours, theirs in layout.sources.items():
            yield ours, torch.cat([self.take(name) for name in theirs])
        if layout.model.contact_head:
            regression = self.take(f"{layout.contact_head}.weight")
            yield "contact_head.weight", regression.view(layout.model.num_layers, -1)
            yield "contact_head.bias", self.take(f"{layout.contact_head}.bias")
        yield from self._lm_head(layout.lm_head, embedding)
        self._refuse_leftovers()

    def rotary_rounding(self) -> RotaryRounding:
        """How the checkpoint's rotary frequencies are rounded; some layouts save them, and ESM-2 rounded them."""
        saved = [name for name in self.tensors if name.endswith("inv_freq")]
        roundings: tuple[RotaryRounding, ...] = get_args(RotaryRounding)
        for rounding in roundings:
            expected = rotary_frequencies(self.layout.model.head_dim, rounding)
            if all(_are_close(self.tensors[name], expected) for name in saved):
                return rounding
        raise InputError(f"{self.source}: {saved[0]} holds other rotary frequencies than 10000 ** (-2 c / head_dim)")

    def left_out(self) -> list[str]:
        """Other heads, by as much of their tensors' names as tells them from those that were taken."""
        heads = set()
        for name in self.tensors.keys() - self.taken:
            if name.startswith(self.layout.prefix):
                continue
            parts = name.split(".")
            starts = (".".join(parts[:number]) for number in range(1, len(parts)))
            heads.add(next((s for s in starts if not any(t.startswith(f"{s}.") for t in self.taken)), name))
        return sorted(heads)

    def _positions(self) -> Tensor:
        table = self.take(self.layout.position_embedding)[self.layout.first_position :]
        if self.layout.token_types in self.tensors:
            table = table + self.take(self.layout.token_types)[0]
        return table

    def _lm_head(self, head: LmHead, embedding: Tensor) -> Iterator[tuple[str, Tensor]]:
        if f"{head.parts['dense']}.weight" not in self.tensors:
            return
        decoder, decoder_bias = head.decoder
        for copy, original in ((decoder, embedding), (decoder_bias, self.take(head.bias))):
            if copy in self.tensors and not torch.equal(self.take(copy), original):
                raise InputError(f"{self.source}: {copy} is not tied to the embedding or bias, as our head's is")
        for ours, theirs in head.parts.items():
            for kind in ("weight", "bias"):
                yield f"head.{ours}.{kind}", self.take(f"{theirs}.{kind}")
        yield "head.bias", self.vocabulary.output_bias(self.take(head.bias))

    def _refuse_leftovers(self) -> None:
        prefix = self.layout.prefix
        rotary = self.layout.model.positions == "rotary"
        known = {self.layout.position_embedding} if rotary else set()
        left = [
            name
            for name in self.tensors.keys() - self.taken - known
            if name.startswith(prefix) and not WITHOUT_MEANING.search(name)
        ]
        if left:
            raise InputError(
                f"{self.source}: {len(left):,} tensors of the encoder have no place in the {self.layout.name} layout,"
                f" such as {', '.join(sorted(left)[:3])}"
            )


def _modern_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    modern = {"gamma": "weight", "beta": "bias"}
    return f"{stem}.{modern[kind]}" if kind in modern else name


def _are_close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-6, atol=0)


def _check_shapes(model: ProteinLanguageModel, weights: Mapping[str, Tensor], source: str) -> None:
    expected = model.state_dict()
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{source}: the weights do not fit config.json: what becomes {name} is {tuple(tensor.shape)}, expected"
                f" {tuple(expected[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{source}: what becomes {name} holds a number that is not finite")


def _residue_counts() -> list[int]:
    counts = [0] * NUM_TOKENS
    for letter, count in SWISS_PROT_COMPOSITION.items():
        counts[RESIDUE_TO_TOKEN[letter]] = count
    return counts


def _notes(config: ModelConfig, reader: _Reader, *, has_lm_head: bool) -> Iterator[str]:
    unknown = [token for token, is_unknown in zip(TOKENS, reader.vocabulary.unknown, strict=True) if is_unknown]
    if unknown:
        yield f"not in its vocabulary, and taken for its <unk>: {' '.join(unknown)}"
    if left := reader.left_out():
        yield f"left out, as no part of the language model: {', '.join(left)}"
    if not has_lm_head:
        yield "the weights have no masked-LM head: embeddings are the original's, predictions of residues are not"
    if config.contact_head:
        yield "its contact head is kept: predict-contacts gives probabilities"
    if config.max_positions is not None:
        yield f"learned positions: proteins of at most {config.max_positions - 2:,} residues"
