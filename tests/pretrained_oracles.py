"""Small models of random weights from `transformers`, the oracle of conversion, written as users have them."""

import json

import torch
from transformers import BertConfig, BertForMaskedLM, EsmConfig, EsmForMaskedLM, RobertaConfig, RobertaForMaskedLM

from protformer.alphabet import MASK, STANDARD_RESIDUES, TOKENS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *STANDARD_RESIDUES)
PROT_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", *STANDARD_RESIDUES, "<mask>")


def esm(folder, **changes):
    """ESM-2 with its contact head; the rotary frequencies of its old checkpoints can be put in by `rounded`."""
    choices = {
        "vocab_size": len(TOKENS),
        "mask_token_id": MASK,
        "pad_token_id": 1,
        "max_position_embeddings": 64,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "emb_layer_norm_before": False,
        "layer_norm_eps": 1e-5,
    }
    return _write(folder, EsmForMaskedLM, EsmConfig(**(SIZES | choices | changes)), TOKENS)


def bert(folder, tokens=BERT_TOKENS, **changes):
    choices = {"vocab_size": len(tokens), "pad_token_id": 0, "max_position_embeddings": 60, "layer_norm_eps": 1e-12}
    return _write(folder, BertForMaskedLM, BertConfig(**(SIZES | choices | changes)), tokens)


def roberta(folder, tokens=ROBERTA_TOKENS, **changes):
    choices = {"vocab_size": len(tokens), "pad_token_id": 1, "max_position_embeddings": 62, "layer_norm_eps": 1e-5}
    return _write(folder, RobertaForMaskedLM, RobertaConfig(**(SIZES | choices | changes)), tokens)


def _write(folder, kind, config, tokens):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return model


def edit_config(folder, **changes):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (tree | changes).items() if v != "remove"}))
