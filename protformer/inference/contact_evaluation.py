"""Contact precision of a model on chains of known structure.

In: a session and `ChainStructure`s. Out: a nested mapping of names to numbers, for a table or JSON.
"""

from collections.abc import Callable, Iterable

from protformer.corpus.structures import ChainStructure
from protformer.evaluation.contacts import contact_precision, mean_precision
from protformer.inference.contacts import ContactMethod, predict_contacts
from protformer.inference.session import InferenceSession


def score_contacts(
    session: InferenceSession,
    chains: Iterable[ChainStructure],
    *,
    method: ContactMethod,
    batch_tokens: int,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, object]:
    """Means over chains, by range."""
    found = []
    for chain in chains:
        predicted = predict_contacts(session, (chain.record,), method=method, batch_tokens=batch_tokens)
        found.append(contact_precision(predicted.contacts, chain.c_beta))
        advance(1)
    return {**mean_precision(found), "num_chains": len(found)}
