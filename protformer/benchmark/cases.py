"""What `protformer benchmark` measures: one case is one attention or model, at one length, in one direction and dtype.

In: what the user chose on the command line. Out: `Case`s, which are measured by `measure`, in this process for the time
and in a fresh one each for the memory (a case travels there as JSON), and `Row`s, the results. No torch here.
"""

import itertools
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from protformer import __version__
from protformer.config import AttentionConfig, Direction, ModelConfig

Dtype = Literal["fp32", "bf16"]
Pass = Literal["forward", "forward+backward"]
Implementation = Literal["protformer", "performer-pytorch"]

ATTENTION_CONFIGS: dict[str, Any] = {
    typing.get_args(typing.get_type_hints(config)["kind"])[0]: config for config in typing.get_args(AttentionConfig)
}
"""Kind -> the dataclass of its configuration."""
IDENTITY = "identity"
"""Attention that returns V: what everything but attention costs (Choromanski et al. 2021, fig. 3, the line "OPT")."""
PEER = "performer-pytorch"
PEER_VERSION = "1.1.4"
PEER_KINDS = ("favor", "generalized")
"""Kinds of ours that performer-pytorch has as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing to measure."""

    implementation: Implementation
    kind: str
    direction: Direction
    dtype: Dtype
    batch: int
    heads: int
    length: int
    head_dim: int
    num_features: int | None
    """None where there are none."""
    passes: Pass
    device: str
    model: ModelConfig | None = None
    """A whole model of this size instead of attention alone; its own kind of attention is not looked at."""

    def attention_config(self) -> AttentionConfig:
        """The configuration of this case's kind: the model's own where it is of this kind, else defaults."""
        if self.model is not None and self.model.attention.kind == self.kind:
            return self.model.attention
        config = ATTENTION_CONFIGS[self.kind]
        made: AttentionConfig = config() if self.num_features is None else config(num_features=self.num_features)
        return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case and what it cost."""

    case: Case
    seconds: float
    """Median over repeats that alternate with those of the rows it is compared with."""
    peak_extra_mb: float | None
    """Most memory held beyond the inputs, in units of 1e6 bytes; None if it was not measured."""

    def as_json(self) -> dict[str, object]:
        case = self.case
        return {
            "implementation": implementation_name(case.implementation),
            "kind": case.kind,
            "direction": case.direction,
            "dtype": case.dtype,
            "batch": case.batch,
            "heads": case.heads,
            "length": case.length,
            "head_dim": case.head_dim,
            "num_features": case.num_features,
            "pass": case.passes,
            "seconds": self.seconds,
            "peak_extra_mb": self.peak_extra_mb,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Every combination of these is a case."""

    kinds: Sequence[str]
    directions: Sequence[Direction]
    dtypes: Sequence[Dtype]
    passes: Sequence[Pass]
    lengths: Sequence[int]
    batch: int
    device: str
    peers: bool


def implementation_name(implementation: Implementation) -> str:
    return f"{PEER} {PEER_VERSION}" if implementation == PEER else f"protformer {__version__}"


def attention_cases(grid: Grid, *, heads: int, head_dim: int, num_features: int) -> list[Case]:
    """Attention alone, at every combination of the grid, shortest lengths first."""
    return [
        Case(
            implementation=implementation,
            kind=kind,
            direction=direction,
            dtype=dtype,
            batch=grid.batch,
            heads=heads,
            length=length,
            head_dim=head_dim,
            num_features=num_features if has_features(kind) else None,
            passes=passes,
            device=grid.device,
        )
        for length, direction, dtype, passes, kind, implementation in _combinations(grid)
    ]


def model_cases(grid: Grid, model: ModelConfig) -> list[Case]:
    """A whole model with each kind of attention in turn, without dropout, at every combination of the grid."""
    return [
        Case(
            implementation=implementation,
            kind=kind,
            direction=direction,
            dtype=dtype,
            batch=grid.batch,
            heads=model.num_heads,
            length=length,
            head_dim=model.head_dim,
            num_features=_model_features(model, kind),
            passes=passes,
            device=grid.device,
            model=replace(model, dropout=0.0, direction=direction),
        )
        for length, direction, dtype, passes, kind, implementation in _combinations(grid)
    ]


def has_features(kind: str) -> bool:
    return kind != IDENTITY and any(field.name == "num_features" for field in fields(ATTENTION_CONFIGS[kind]))


def _combinations(grid: Grid) -> Iterator[tuple[int, Direction, Dtype, Pass, str, Implementation]]:
    implementations: tuple[Implementation, ...] = ("protformer", "performer-pytorch") if grid.peers else ("protformer",)
    choices = itertools.product(
        sorted(grid.lengths), grid.directions, grid.dtypes, grid.passes, grid.kinds, implementations
    )
    return (choice for choice in choices if choice[-1] == "protformer" or choice[-2] in PEER_KINDS)


def _model_features(model: ModelConfig, kind: str) -> int | None:
    """The number of the model's own attention, also for other kinds with features, so that all have the same."""
    if not has_features(kind):
        return None
    own = model.attention.kind
    count = getattr(model.attention, "num_features") if has_features(own) else ATTENTION_CONFIGS[kind]().num_features  # noqa: B009
    return int(count)
