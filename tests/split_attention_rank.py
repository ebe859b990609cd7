"""One rank of `test_context_parallel`: attention and a model on slices of windows, beside the same on whole windows.

Run as `python split_attention_rank.py RANK NUM_RANKS FOLDER`. Writes to FOLDER/RANK.json, by case, the largest relative
error of outputs and gradients, and how large it may be. Groups are all ranks, and, for some kinds, each half of them.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from protformer.attention import build_attention
from protformer.attention.sequence_group import SequenceGroup
from protformer.config import AttentionConfig, FavorConfig, GeneralizedConfig, ModelConfig
from protformer.model.masked_lm_head import ProteinLanguageModel

CONFIGS: dict[str, AttentionConfig] = {
    "hyperbolic": FavorConfig(num_features=24),
    "positive": FavorConfig(num_features=24, features="positive", row_norms="chi"),
    "favor++": FavorConfig(num_features=24, features="favor++", row_norms="chi", rescale=True),
    "scaled": FavorConfig(num_features=24, rescale=True, covariance="diagonal"),
    "relu": GeneralizedConfig(num_features=24, projection="orthogonal"),
    "mirrored": GeneralizedConfig(num_features=32),
    "exp": GeneralizedConfig(num_features=24, function="exp", projection="iid"),
    "none": GeneralizedConfig(projection="none", function="elu_plus_one"),
}
FLOAT32_LIMITS = {"exp": 2e-6}
"""Here one key outweighs the others: its gradient is a difference of nearly equal sums, and one process is already 9e-7
from float64."""
LENGTH = 301


def layouts() -> dict[str, Tensor]:
    """Segments of two rows each; slices of 2 ranks meet at 151, of 4 at 76, 151, 226."""

    def row(*lengths: int, padding: int = 0) -> Tensor:
        ids = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
        return torch.cat([ids, torch.zeros(padding, dtype=torch.int64)])

    return {
        "attend": torch.ones(2, LENGTH, dtype=torch.int64),
        "padded": torch.stack([row(LENGTH), row(160, padding=141)]),
        "isolate": torch.stack([row(100, 1, 130, 60, 10), row(20, 56, 75, 75, 75)]),
        "isolate, padded": torch.stack([row(10, 200, padding=91), row(150, 2, 149)]),
        "on one rank each": torch.stack([row(76, 75, 75, 75), row(76, 75, padding=150)]),
    }


def main(rank: int, num_ranks: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    half = num_ranks // 2
    halves = [dist.new_group(range(half)), dist.new_group(range(half, num_ranks))]
    torch.manual_seed(0)
    results: dict[str, tuple[float, float]] = {}
    for ranks in (dist.group.WORLD, halves[rank // half]):
        group = SequenceGroup(ranks)
        kinds = CONFIGS if group.size == num_ranks else {name: CONFIGS[name] for name in ("hyperbolic", "relu")}
        for name, config in kinds.items():
            for causal in (False, True):
                case = f"{group.size} ranks, {name}, {'causal' if causal else 'bidirectional'}"
                for layout, segments in layouts().items():
                    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, FLOAT32_LIMITS.get(name, 1e-6))):
                        whole_and_split = attention_results(group, config, causal, segments, dtype)
                        results[f"{case}, {layout}, {dtype}"] = largest_error(group, *whole_and_split), limit
                shrinking = attention_results(
                    group, config, causal, layouts()["attend"], torch.float64, first_scale=8.0
                )
                results[f"{case}, keys that shrink, float64"] = largest_error(group, *shrinking), 1e-12
        for direction in ("bidirectional", "unidirectional"):
            for layout, segments in layouts().items():
                case = f"{group.size} ranks, model, {direction}, {layout}, float32"
                results[case] = largest_error(group, *model_results(group, direction, segments)), 1e-6
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def attention_results(
    group: SequenceGroup,
    config: AttentionConfig,
    causal: bool,
    segments: Tensor,
    dtype: torch.dtype,
    first_scale: float = 1,
) -> list[list[Tensor]]:
    """Output and gradients of q, k, v and parameters in this rank's slice: in one process, and split over the group."""
    attention = build_attention(config, head_dim=8, num_heads=2, causal=causal, seed=0, layer=0).eval().to(dtype)
    generator = torch.Generator().manual_seed(1)
    for key, buffer in attention.named_buffers():
        if key == "moments.average":
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.1)
    whole = torch.randn(4, 2, 2, LENGTH, 8, generator=generator, dtype=torch.float64)
    whole[1] *= torch.linspace(first_scale, 1, LENGTH, dtype=torch.float64)[:, None]
    mine = slice_of(group, LENGTH)
    results = []
    for split in (None, group):
        part = slice(None) if split is None else mine
        attention.split_over(split)
        q, k, v, direction = whole[:, :, :, part].to(dtype).clone().unbind()
        inputs = [x.contiguous().requires_grad_() for x in (q, k, v)]
        output = attention(*inputs, segments[:, part].contiguous())
        leaves = [*inputs, *attention.parameters()]
        gradients = list(torch.autograd.grad(output, leaves, direction))
        found = [output.detach(), *gradients]
        if split is None:
            found = [x[:, :, mine] if x.shape[2] == LENGTH else x for x in found]
        else:
            found[4:] = [split.total(gradient) for gradient in found[4:]]
        results.append(found)
    return results


def model_results(group: SequenceGroup, direction: str, segments: Tensor) -> list[list[Tensor]]:
    """Hidden states of this rank's slice, and the gradients of all weights summed over ranks."""
    config = ModelConfig(
        num_layers=2, num_heads=2, hidden_size=32, feed_forward_size=64, direction=direction,
        attention=FavorConfig(num_features=24),
    )  # fmt: skip
    torch.manual_seed(0)
    model = ProteinLanguageModel(config, seed=0)
    tokens = torch.randint(4, 24, segments.shape, generator=torch.Generator().manual_seed(2))
    mine = slice_of(group, LENGTH)
    results = []
    for split in (None, group):
        part = slice(None) if split is None else mine
        model.encoder.split_over(split)
        model.zero_grad()
        hidden = model.encoder(tokens[:, part].contiguous(), segments[:, part].contiguous()).hidden
        residues = segments[:, part] > 0
        torch.nn.functional.cross_entropy(
            model.logits(hidden[residues]), tokens[:, part][residues], reduction="sum"
        ).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        if split is None:
            results.append([hidden[:, mine].detach(), *gradients])
        else:
            results.append([hidden.detach(), *(split.total(gradient) for gradient in gradients)])
    return results


def slice_of(group: SequenceGroup, length: int) -> slice:
    bounds = [0, *torch.arange(length).tensor_split(group.size)]
    start = sum(len(part) for part in bounds[1 : group.rank + 1])
    return slice(start, start + len(bounds[group.rank + 1]))


def largest_error(group: SequenceGroup, expected: list[Tensor], found: list[Tensor]) -> float:
    """|found - expected| / |expected| in the Euclidean norm over all slices; a NaN counts as infinite."""
    errors = []
    for wanted, got in zip(expected, found, strict=True):
        squares = torch.stack([x.double().square().sum() for x in (got.double() - wanted.double(), wanted)])
        error, norm = group.total(squares).sqrt().tolist()
        errors.append(error / norm if norm > 0 else error)
    return max(error if error == error else float("inf") for error in errors)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
