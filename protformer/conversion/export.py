"""Our model to a folder that `transformers` loads as an ESM model.

In: a model and its description. Out: `config.json`, `model.safetensors`, the tokenizer's files and a card, with the
outputs of the original: token numbers are the same, as our alphabet is ESM's. Only an architecture that transformers'
ESM computes can be written: softmax attention, pre-LN, rotary positions, without normalised queries and keys.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from protformer import __version__
from protformer.alphabet import MASK, NUM_TOKENS, PAD, TOKENS
from protformer.checkpoint import save_safetensors
from protformer.config import ModelConfig
from protformer.conversion.layouts import Layout, find_layout
from protformer.errors import ConfigError, OutputError
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model.rotary import rotary_frequencies
from protformer.model_description import ModelDescription
from protformer.whole_file import write_whole

UNUSED_POSITIONS = 1026
"""ESM's configuration asks for a number of positions, which rotary ones do not use; this is ESM-2's."""


def export_model(folder: Path, model: ProteinLanguageModel, description: ModelDescription) -> tuple[str, ...]:
    """Write the folder; gives what its user should know. Raises ConfigError for another architecture than ESM-2's."""
    _require_esm_shape(model.config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists already; choose another --out or remove it")
    config = _esm_config(model.config, has_lm_head=description.has_lm_head)
    notes = tuple(_notes(description))
    special = {f"{name}_token": f"<{name}>" for name in ("cls", "pad", "eos", "unk", "mask")}
    texts = {
        "vocab.txt": "\n".join(TOKENS),
        "tokenizer_config.json": _as_json({"tokenizer_class": "EsmTokenizer", **special}),
        "special_tokens_map.json": _as_json(special),
        "README.md": _card(model.config, description, notes),
        "config.json": _as_json(config),
    }
    tensors = dict(_tensors(model, find_layout(config, ["esm."], str(folder)), description))
    # The configuration last: without it the folder is not taken for a model.
    write_whole(folder / "model.safetensors", partial(save_safetensors, tensors, metadata={"format": "pt"}))
    for name, text in texts.items():
        write_whole(folder / name, partial(_write_text, text))
    return notes


def _require_esm_shape(model: ModelConfig) -> None:
    needed = {
        "attention.kind": (model.attention.kind, "exact"),
        "direction": (model.direction, "bidirectional"),
        "norm": (model.norm, "pre"),
        "positions": (model.positions, "rotary"),
        "qk_norm": (model.qk_norm, False),
    }
    for name, (value, allowed) in needed.items():
        if value != allowed:
            raise ConfigError(
                f"model.{name} is {value!r}: transformers' ESM, which export writes, computes {allowed!r} only"
            )


def _esm_config(model: ModelConfig, *, has_lm_head: bool) -> dict[str, object]:
    return {
        "architectures": ["EsmForMaskedLM" if has_lm_head else "EsmModel"],
        "model_type": "esm",
        "attention_probs_dropout_prob": 0.0,
        "emb_layer_norm_before": model.embedding_norm,
        "hidden_act": "gelu",
        "hidden_dropout_prob": model.dropout,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.feed_forward_size,
        "layer_norm_eps": model.norm_epsilon,
        "mask_token_id": MASK,
        "max_position_embeddings": UNUSED_POSITIONS,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "pad_token_id": PAD,
        "position_embedding_type": "rotary",
        "tie_word_embeddings": True,
        "token_dropout": model.token_dropout,
        "torch_dtype": "float32",
        "vocab_size": NUM_TOKENS,
    }


def _tensors(
    model: ProteinLanguageModel, layout: Layout, description: ModelDescription
) -> Iterator[tuple[str, Tensor]]:
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    yield layout.token_embedding, ours["encoder.embedding.weight"]
    for name, theirs in layout.sources.items():
        for part, tensor in zip(theirs, ours[name].chunk(len(theirs)), strict=True):
            yield part, tensor.contiguous()
    if model.contact_head is not None:
        yield f"{layout.contact_head}.weight", ours["contact_head.weight"].view(1, -1)
        yield f"{layout.contact_head}.bias", ours["contact_head.bias"]
    if description.has_lm_head:
        for part, where in layout.lm_head.parts.items():
            for kind in ("weight", "bias"):
                yield f"{where}.{kind}", ours[f"head.{part}.{kind}"]
        yield layout.lm_head.bias, ours["head.bias"]
    # One a layer, where all versions of transformers find them; each a copy, as no two may share memory in the file.
    for layer in range(model.config.num_layers):
        name = f"{layout.prefix}encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
        yield name, rotary_frequencies(model.config.head_dim, model.config.rotary_rounding)


def _notes(description: ModelDescription) -> Iterator[str]:
    if description.model.framing != "cls_eos":
        yield (
            "trained on proteins without <cls>, which transformers' EsmTokenizer puts before each: leave the first"
            " token out of input_ids to get the results that protformer gives"
        )
    if not description.model.contact_head:
        yield "no contact head: predict_contacts of transformers would use random weights"
    if not description.has_lm_head:
        yield "no masked-LM head: load it as EsmModel"


def _card(model: ModelConfig, description: ModelDescription, notes: tuple[str, ...]) -> str:
    kind = "EsmForMaskedLM" if description.has_lm_head else "EsmModel"
    data = ", ".join(description.training.sources)
    origin = ", then ".join(part for part in (description.converted_from, data) if part) or "unknown"
    told = "".join(f"- {note[0].upper()}{note[1:]}.\n" for note in notes)
    return f"""---
library_name: transformers
tags: [protein, esm]
---

# A protein language model

{model.num_layers} layers, {model.num_heads} heads, hidden size {model.hidden_size}. Written by `protformer export`
{__version__} for transformers:

```python
from transformers import {kind}, EsmTokenizer

model = {kind}.from_pretrained("FOLDER")
tokenizer = EsmTokenizer.from_pretrained("FOLDER")
```

- Trained on, or converted from: {origin}. The licence follows from there and is not stated here.
- Steps of training in protformer: {description.training.steps:,}, on proteins packed as `{description.packing}`.
{told}"""


def _as_json(tree: dict[str, object] | dict[str, str]) -> str:
    return json.dumps(tree, indent=2) + "\n"


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
