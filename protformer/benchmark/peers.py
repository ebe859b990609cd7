"""Other people's implementations, built at the sizes of ours: performer-pytorch, the Performer that most people use.

Its causal attention runs by its own fallback without compiled code, as it does wherever that is not installed.
"""

import contextlib
import io
import warnings
from importlib import metadata
from types import ModuleType

from torch import nn

from protformer.alphabet import NUM_TOKENS
from protformer.benchmark.cases import PEER, PEER_VERSION, Case
from protformer.errors import ConfigError


def require_peer() -> None:
    """Raise ConfigError unless performer-pytorch can be measured, in the version that reports name."""
    try:
        version = metadata.version(PEER)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(f"--peers: {PEER} is not installed; pip install 'protformer[bench]'") from error
    if version != PEER_VERSION:
        raise ConfigError(f"--peers: {PEER} is {version}, expected {PEER_VERSION}; pip install 'protformer[bench]'")
    _performer_pytorch()


def peer_attention(case: Case) -> nn.Module:
    """FastAttention: (q, k, v) of shape (batch, head, residue, head_dim) to the same."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a remark about its compiled code
        module: nn.Module = _performer_pytorch().FastAttention(
            dim_heads=case.head_dim,
            nb_features=case.num_features,
            causal=case.direction == "unidirectional",
            generalized_attention=case.kind == "generalized",
        )
    return module


def peer_model(case: Case) -> nn.Module:
    """PerformerLM of the same sizes: tokens (batch, residue) to logits."""
    assert case.model is not None
    with contextlib.redirect_stdout(io.StringIO()):
        module: nn.Module = _performer_pytorch().PerformerLM(
            num_tokens=NUM_TOKENS,
            max_seq_len=case.length,
            dim=case.model.hidden_size,
            depth=case.model.num_layers,
            heads=case.heads,
            dim_head=case.head_dim,
            causal=case.direction == "unidirectional",
            ff_mult=case.model.feed_forward_size // case.model.hidden_size,
            nb_features=case.num_features,
            generalized_attention=case.kind == "generalized",
            qkv_bias=True,
            attn_out_bias=True,
        )
    return module


def _performer_pytorch() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated torch and distutils names, at import
            import performer_pytorch
    except ImportError as error:
        raise ConfigError(f"--peers: {PEER} cannot be imported ({error}); pip install 'protformer[bench]'") from error
    module: ModuleType = performer_pytorch
    return module
