"""Contact maps of proteins and of concatenated pairs, with no training on structures.

In: a model and one or two `SequenceRecord`s. Out: a `ContactMap`. Two methods:

- `attention`: attention matrices of every layer and head, symmetrised and APC-corrected; weighed by the model's own
  contact head if it has one (as ESM-2 does), else averaged. O(residue ** 2) memory.
- `jacobian`: the categorical Jacobian (Zhang et al. 2024): how the logits at every residue move when a residue is
  exchanged for each of the 20 amino acids. residue x 20 forward passes; needs no attention matrix.

Two proteins are concatenated as in training, each closed by EOS, in one segment.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from protformer.alphabet import EOS, RESIDUE_TO_TOKEN, STANDARD_RESIDUES
from protformer.corpus.fasta import SequenceRecord
from protformer.corpus.identifiers import short_id
from protformer.corpus.pairs import read_pairs, resolve_pairs
from protformer.errors import InputError
from protformer.inference.batches import require_positions
from protformer.inference.contact_scores import (
    PROBABILITIES,
    RANKS,
    ContactMap,
    contacts_from_attention,
    contacts_from_jacobian,
    unit_scale,
)
from protformer.inference.session import InferenceSession
from protformer.model.masked_lm_head import ProteinLanguageModel

ContactMethod = Literal["attention", "jacobian"]


@torch.inference_mode()
def predict_contacts(
    session: InferenceSession,
    chains: tuple[SequenceRecord, ...],
    *,
    method: ContactMethod,
    batch_tokens: int,
) -> ContactMap:
    """The contact map of one protein, or of several concatenated ones: probabilities of the model's contact head, or
    scores that are stretched to [0, 1]."""
    id_ = "__".join(chain.id for chain in chains)
    tokens, residues = _frame(chains, session.model.config.frame[0], session.device)
    require_positions(id_, len(tokens), session.model.config)
    with session.autocast():
        if method == "attention":
            contacts = _contacts_from_attention(session.model, tokens, residues)
        else:
            session.require_lm_head("--method jacobian")
            contacts = unit_scale(_jacobian_scores(session.model, tokens, residues, batch_tokens))
    return ContactMap(
        id=id_,
        contacts=((contacts + contacts.T) / 2).numpy(),  # without the last bit in which sums of either order differ
        sequence="".join(chain.sequence for chain in chains),
        chain_lengths=tuple(len(chain) for chain in chains),
        chain_ids=tuple(chain.id for chain in chains),
        provenance=describe_contacts(session, method=method),
    )


def describe_contacts(session: InferenceSession, *, method: ContactMethod) -> dict[str, object]:
    """What contact maps say about how they were made."""
    from_head = method == "attention" and session.model.contact_head is not None
    return session.provenance | {
        "method": method,
        "scores": PROBABILITIES if from_head else RANKS,
        "precision": str(session.dtype).removeprefix("torch."),
    }


def only_named(ids: tuple[str, ...], records: Iterable[SequenceRecord]) -> list[SequenceRecord]:
    """The records that were found for these ids. Raises InputError for an id that none has."""
    found = list(records)
    known = {name for record in found for name in (record.id, short_id(record.id))}
    if missing := sorted(set(ids) - known):
        raise InputError(
            f"--ids {missing[0]!r}: no such record in the FASTA; give the header up to the first white space, or P12345"
            " for sp|P12345|NAME"
        )
    return found


def chains_of_pairs(
    pairs: Path, find: Callable[[Collection[str]], Iterable[SequenceRecord]]
) -> Iterator[tuple[SequenceRecord, SequenceRecord]]:
    """The two proteins of each pair of the file, once each; all names are looked up before the first pair is given."""
    listed = read_pairs(pairs)
    records = list(find({name for pair in listed for name in (pair.a, pair.b)}))
    found = {short_id(record.id): record for record in reversed(records)} | {record.id: record for record in records}
    resolve_pairs(listed, found.keys(), pairs)
    return ((found[a], found[b]) for a, b in dict.fromkeys((pair.a, pair.b) for pair in listed))


def _frame(
    chains: tuple[SequenceRecord, ...], before: bytes, device: torch.device
) -> tuple[Int[Tensor, " token"], Int[Tensor, " residue"]]:
    """Tokens of the row, each chain closed by EOS, and the columns of its residues."""
    row = np.frombuffer(before + b"".join(chain.tokens + bytes([EOS]) for chain in chains), dtype=np.uint8)
    row = row.astype(np.int64)
    columns = len(before) + np.flatnonzero(row[len(before) :] != EOS)
    return torch.from_numpy(row).to(device), torch.from_numpy(columns).to(device)


def _contacts_from_attention(
    model: ProteinLanguageModel, tokens: Int[Tensor, " token"], residues: Int[Tensor, " residue"]
) -> Float[Tensor, "residue residue"]:
    """By the contact head, or the mean over layers of the mean over heads; every layer has as many heads."""
    maps = (
        weights[0][:, residues][:, :, residues].float()
        for weights in model.encoder.attention_maps(tokens[None], torch.ones_like(tokens)[None])
    )
    if model.contact_head is not None:
        contacts: Tensor = model.contact_head(maps)
        return contacts.cpu()
    return unit_scale(torch.stack([contacts_from_attention(of_layer.cpu()) for of_layer in maps]).mean(dim=0))


def _jacobian_scores(
    model: ProteinLanguageModel, tokens: Int[Tensor, " token"], residues: Int[Tensor, " residue"], batch_tokens: int
) -> Float[Tensor, "residue residue"]:
    amino_acids = torch.tensor([RESIDUE_TO_TOKEN[letter] for letter in STANDARD_RESIDUES], device=tokens.device)
    # In a unidirectional model the column before a residue predicts it.
    outputs = residues - 1 if model.config.direction == "unidirectional" else residues

    def logits(rows: Int[Tensor, "row token"]) -> Float[Tensor, "row residue 20"]:
        hidden = model.encoder(rows, torch.ones_like(rows)).hidden[:, outputs]
        return model.logits(hidden)[..., amino_acids].float().cpu()

    exchanged = tokens.repeat(len(residues) * 20, 1)
    changed_column = residues.repeat_interleave(20)
    exchanged[torch.arange(len(exchanged), device=tokens.device), changed_column] = amino_acids.repeat(len(residues))
    rows_at_once = max(1, batch_tokens // len(tokens))
    moved = torch.cat([logits(part) for part in exchanged.split(rows_at_once)])
    jacobian = (moved - logits(tokens[None])).unflatten(0, (len(residues), 20))
    return contacts_from_jacobian(jacobian)
