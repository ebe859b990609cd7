"""Benchmarks say what they measured: schema, medians, crossovers, floors, readiness figures by their definitions."""

import json
import math
import statistics
from dataclasses import asdict, replace

import pytest
import torch
from reference import exact_weights

from protformer.attention.feature_maps import ExponentialMap
from protformer.attention.random_features import draw_projection
from protformer.benchmark import memory, timing
from protformer.benchmark.analysis import advantages, crossover, crossovers, floors, operations, scaling
from protformer.benchmark.approximation import (
    IID,
    TRIGONOMETRIC,
    exact_attention,
    median_interval,
    output_errors,
    trigonometric_attention,
)
from protformer.benchmark.cases import Case, Grid, Row, attention_cases, model_cases
from protformer.benchmark.measure import Limits, measure
from protformer.benchmark.memory import TooMuchError, probe
from protformer.benchmark.timing import alternate
from protformer.benchmark.workloads import prepare
from protformer.checkpoint import save_model
from protformer.cli import run
from protformer.config import ExactConfig, FavorConfig, ModelConfig
from protformer.decoding import decode
from protformer.errors import ProtformerError
from protformer.evaluation.model_readiness import model_readiness
from protformer.evaluation.readiness import Readiness, measure_readiness
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import ModelDescription

CPU = torch.device("cpu")
CASE = Case(
    implementation="protformer",
    kind="favor",
    direction="bidirectional",
    dtype="fp32",
    batch=1,
    heads=2,
    length=64,
    head_dim=8,
    num_features=16,
    passes="forward",
    device="cpu",
)
EXACT = replace(CASE, kind="exact", num_features=None)
SIZES = ModelConfig(num_layers=2, num_heads=2, hidden_size=16, feed_forward_size=32)
ROW_KEYS = [
    "implementation", "kind", "direction", "dtype", "batch", "heads", "length", "head_dim", "num_features", "pass",
    "seconds", "peak_extra_mb",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    """The rate of products is measured in an instant."""
    monkeypatch.setitem(timing.MATRIX_SIZE, "cpu", 128)


def grid(**changes):
    every = {
        "kinds": ["favor", "exact"],
        "directions": ["bidirectional", "unidirectional"],
        "dtypes": ["fp32", "bf16"],
        "passes": ["forward", "forward+backward"],
        "lengths": [32, 16],
        "batch": 1,
        "device": "cpu",
        "peers": False,
    }
    return Grid(**(every | changes))


def cost(case, seconds, megabytes=1.0):
    return Row(case=case, seconds=seconds, peak_extra_mb=megabytes)


def test_benchmark_attention_prints_the_promised_json(capsys, tmp_path):
    figure = tmp_path / "costs.png"
    arguments = ["--length", "32", "--length", "64", "--heads", "2", "--head-dim", "8", "--num-features", "16"]
    speed = ["--repeats", "1", "--no-memory", "--pass", "forward", "--json", "--plot", str(figure), "--quiet"]
    assert run(["benchmark", "attention", *arguments, *speed]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["device"] == "cpu"
    assert [list(row) for row in found["rows"]] == [ROW_KEYS] * 6
    assert {(row["kind"], row["length"], row["num_features"]) for row in found["rows"]} == {
        ("favor", 32, 16), ("generalized", 32, 16), ("exact", 32, None),
        ("favor", 64, 16), ("generalized", 64, 16), ("exact", 64, None),
    }  # fmt: skip
    assert all(row["seconds"] > 0 and row["peak_extra_mb"] is None for row in found["rows"])
    assert {crossing["kind"] for crossing in found["crossovers"]} == {"favor", "generalized"}
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_benchmark_model_sets_every_kind_beside_an_attention_that_returns_its_values(capsys):
    arguments = ["--config", "tiny", "--kind", "favor", "--length", "16", "--repeats", "1", "--no-memory"]
    assert run(["benchmark", "model", *arguments, "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["kind"], row["num_features"]) for row in rows] == [("favor", 64), ("identity", None)]
    assert run(["benchmark", "model", *arguments, "--quiet"]) == 0
    assert "identity" in capsys.readouterr().out


def test_benchmark_model_wants_sizes_from_one_place():
    assert run(["benchmark", "model", "--quiet"]) == 2


def test_every_combination_of_kind_direction_dtype_and_pass_runs():
    for case in [
        *attention_cases(grid(lengths=[16]), heads=2, head_dim=8, num_features=8),
        *model_cases(grid(), SIZES),
    ]:
        outcome = prepare(case)()
        results = [x for x in (outcome if isinstance(outcome, tuple) else (outcome,)) if x is not None]
        assert results
        assert all(bool(result.isfinite().all()) for result in results)
        if case.passes == "forward":
            (result,) = results
            assert result.shape[-2] == case.length


def test_a_peer_is_only_asked_for_the_kinds_it_has():
    cases = attention_cases(grid(peers=True, lengths=[16]), heads=2, head_dim=8, num_features=8)
    assert {case.kind for case in cases if case.implementation == "performer-pytorch"} == {"favor"}
    assert {case.kind for case in cases if case.implementation == "protformer"} == {"favor", "exact"}


def test_a_case_travels_to_another_process_unchanged():
    case = model_cases(grid(), replace(SIZES, attention=FavorConfig(num_features=8)))[0]
    assert decode(Case, json.loads(json.dumps(asdict(case)))) == case
    assert case.attention_config() == FavorConfig(num_features=8)


def test_repeats_alternate_between_the_rows_and_medians_are_taken(monkeypatch):
    order = []
    clock = {"a": iter([9.0, 1.0, 2.0, 30.0]), "b": iter([9.0, 5.0, 4.0, 6.0])}
    monkeypatch.setattr(timing, "timed", lambda run, device, calls=1: next(clock[run()]))
    runs = [lambda name=name: order.append(name) or name for name in "ab"]
    assert alternate(runs, CPU, repeats=3) == [2.0, 5.0]
    assert order == ["a", "b"] * 4


def test_what_is_fast_is_timed_over_many_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "timed", lambda run, device, calls_=1: calls.append(calls_) or 0.001)
    alternate([lambda: None], CPU, repeats=1)
    assert calls == [1, 20]


def test_the_crossover_lies_on_a_line_between_logarithms():
    relation, length = crossover([1000, 4000], [0.5, 2.0])
    assert relation == "at"
    assert length == pytest.approx(2000)
    # It is from the last rise on that a kind stays faster.
    assert crossover([1, 2, 4, 8], [2.0, 0.5, 0.5, 2.0])[1] == pytest.approx(math.sqrt(32))
    assert crossover([1000, 4000], [1.5, 2.0]) == ("below", 1000)
    assert crossover([1000, 4000], [2.0, 0.9]) == ("above", 4000)


def test_crossovers_compare_with_exact_attention_of_the_same_direction_dtype_and_pass():
    rows = [cost(replace(CASE, length=n), 1.0 * n) for n in (100, 400)]
    rows += [cost(replace(EXACT, length=n), n * n / 200) for n in (100, 400)]
    rows += [cost(replace(EXACT, length=n, dtype="bf16"), 1e-9) for n in (100, 400)]
    (found,) = crossovers(rows)
    assert found.series == ("protformer", "favor", "bidirectional", "fp32", "forward")
    assert found.length == pytest.approx(200)
    assert scaling(rows)[found.series] == pytest.approx(1.0)


def test_floors_count_the_operations_of_every_product():
    # A residue and head, m = 16 and d = 8: W q and W k are 2 x 8 x 16 multiply-adds, K'[V, 1] and Q'S 2 x 9 x 16.
    forward = 2 * (64 * 2) * (2 * 8 * 16 + 2 * 9 * 16)
    backward = 2 * (64 * 2) * (2 * 8 * 16 + 4 * 9 * 16)
    assert operations(CASE) == forward
    assert operations(replace(CASE, passes="forward+backward")) == forward + backward
    assert operations(EXACT) == 2 * (2 * 64 * 64 * 2) * 8
    assert operations(replace(EXACT, passes="forward+backward")) == 3 * operations(EXACT)
    (floor,) = floors([cost(CASE, 3.0)], {"fp32": float(forward)})
    assert floor.seconds == pytest.approx(1.0)
    assert floor.multiple == pytest.approx(3.0)


def test_a_peer_is_compared_with_the_same_case():
    peer = cost(replace(CASE, implementation="performer-pytorch"), 6.0, 8.0)
    (found,) = advantages([cost(CASE, 2.0, 1.0), peer, cost(replace(CASE, length=128), 1.0)])
    assert (found.times_faster, found.memory_share) == (3.0, 0.125)


def test_peak_memory_is_what_a_case_holds_beyond_its_inputs():
    case = replace(CASE, kind="favor", length=32768, num_features=64)
    features = 2 * 32768 * 64 * 4 / 1e6
    output = 2 * 32768 * 8 * 4 / 1e6
    found = probe(case, max_gb=8.0, max_seconds=60.0)
    assert output / 2 < found.peak_extra_mb < 5 * features
    assert found.seconds > 0


def test_a_case_beyond_its_memory_is_left_out_with_the_longer_ones_of_its_series(monkeypatch):
    def fake_probe(case, *, max_gb, max_seconds):
        if case.kind == "exact" and case.length == 32:
            raise TooMuchError("needs more than 8 GB")
        return memory.Probe(peak_extra_mb=1.0, seconds=0.1)

    monkeypatch.setattr("protformer.benchmark.measure.probe", fake_probe)
    cases = [replace(case, length=n) for n in (16, 32, 64) for case in (CASE, EXACT)]
    limits = Limits(repeats=1, with_memory=True, max_seconds=10.0, max_gb=8.0)
    told, done = [], []
    rows = list(measure(cases, limits, tell=told.append, advance=done.append))
    assert [(row.case.kind, row.case.length) for row in rows] == [
        ("favor", 16), ("exact", 16), ("favor", 32), ("favor", 64),
    ]  # fmt: skip
    assert told == ["left out from length 32 on: protformer exact, bidirectional, fp32, forward: needs more than 8 GB"]
    assert sum(done) == 6


@pytest.mark.parametrize(
    ("returncode", "stderr", "error"),
    [
        (1, "RuntimeError: can't allocate memory", TooMuchError),
        (-9, "", TooMuchError),
        (1, "RuntimeError: shapes differ", ProtformerError),
    ],
)
def test_a_process_that_fails_is_told_from_one_that_needs_too_much(monkeypatch, returncode, stderr, error):
    finished = memory.subprocess.CompletedProcess([], returncode, "", stderr)
    monkeypatch.setattr(memory.subprocess, "run", lambda *arguments, **options: finished)
    with pytest.raises(ProtformerError) as raised:
        probe(CASE, max_gb=1.0, max_seconds=1.0)
    assert type(raised.value) is error


def test_readiness_is_what_its_definitions_say():
    torch.manual_seed(0)
    q, k, v, linear = (torch.randn(2, 2, 12, 4, dtype=torch.float64) for _ in range(4))
    segments = torch.tensor([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])
    projection = draw_projection(6, 4, orthogonal=True, row_norms="chi", generator=torch.Generator().manual_seed(1))
    queries = torch.tensor([1, 8, 10])
    for causal in (False, True):
        found = measure_readiness(
            q, k, v, segments, linear=linear, feature_map=features(projection), queries=queries, causal=causal
        )
        expected = naive_readiness(q, k, v, segments, linear, projection.double(), [1, 8, 10], causal)
        assert found.as_json() == pytest.approx(expected, rel=1e-9)
        assert found.num_queries == 2 * (3 + 2)


def features(projection):
    """Positive features of vectors that are not scaled yet."""
    root = projection.shape[1] ** 0.25
    return ExponentialMap(weight=projection.double() / root, bias=None, factor=0.5 / root**2)


def naive_readiness(q, k, v, segments, linear, projection, queries, causal):
    """Query by query, as the docstring of `evaluation.readiness` has it."""
    weights = exact_weights(q, k, segments, causal=causal)
    norms, spreads, tops, effective = [], [], [], []
    errors = {"relative_error": 0.0, "mean_pooling_error": 0.0}
    total = 0.0
    for b, i in ((b, i) for b in range(2) for i in queries if segments[b, i] > 0):
        for h in range(2):
            keys = [j for j in range(12) if segments[b, j] == segments[b, i] and (j <= i or not causal)]
            x, y = q[b, h, i] / 4**0.25, k[b, h, keys] / 4**0.25
            logits = (y @ x).tolist()
            norms += [float((x + other).square().sum()) for other in y]
            spreads.append(statistics.pstdev(logits))
            tops.append(max(logits) - statistics.mean(logits))
            phi_x = torch.exp(projection @ x - x @ x / 2)
            phi_y = torch.exp(y @ projection.T - y.square().sum(-1, keepdim=True) / 2)
            shares = phi_x * phi_y.sum(0)
            effective.append(float(shares.sum() ** 2 / shares.square().sum()))
            exact = weights[b, h, i] @ v[b, h]
            errors["relative_error"] += float((linear[b, h, i] - exact).square().sum())
            errors["mean_pooling_error"] += float((v[b, h, keys].mean(0) - exact).square().sum())
            total += float(exact.square().sum())
    return {
        "num_features": 6,
        "squared_norm": statistics.mean(norms),
        "logit_spread": statistics.mean(spreads),
        "logit_spread_max": max(tops),
        "effective_features": statistics.mean(effective),
        **{name: math.sqrt(error / total) for name, error in errors.items()},
    }


def test_readiness_adds_up_over_batches():
    torch.manual_seed(0)
    q, k, v, linear = (torch.randn(2, 2, 12, 4) for _ in range(4))
    shared = {
        "feature_map": features(
            draw_projection(6, 4, orthogonal=True, row_norms="chi", generator=torch.Generator().manual_seed(1))
        ),
        "queries": torch.arange(12),
        "causal": False,
    }
    segments = torch.ones(2, 12, dtype=torch.int64)
    whole = measure_readiness(q, k, v, segments, linear=linear, **shared)
    parts = [
        measure_readiness(q[r], k[r], v[r], segments[r], linear=linear[r], **shared) for r in (slice(0, 1), slice(1, 2))
    ]
    assert (Readiness(num_features=6) + parts[0] + parts[1]).as_json() == pytest.approx(whole.as_json())


def test_a_model_of_soft_attention_is_ready_and_one_of_sharp_attention_is_not():
    def report(scale, num_features=256):
        torch.manual_seed(0)
        model = ProteinLanguageModel(replace(SIZES, attention=ExactConfig()), seed=0).eval()
        with torch.no_grad():
            for block in model.encoder.blocks:
                block.query_key_value.weight[:32] *= scale
        return model_readiness(
            model, [[5 + i % 20 for i in range(60)]] * 2, num_features=num_features, advance=lambda n: None
        )

    soft, sharp = report(0.3), report(4.0)
    assert [layer.layer for layer in soft] == [1, 2]
    for layer in soft:
        assert layer.readiness.relative_error < 0.7 * layer.readiness.mean_pooling_error
        assert layer.readiness.effective_features > 100
        assert layer.propagated_error < 0.05
    for layer in sharp:
        assert layer.readiness.relative_error > 0.3
        assert layer.readiness.effective_features < 30


def test_readiness_of_a_linear_model_uses_its_own_attention():
    model = ProteinLanguageModel(replace(SIZES, attention=FavorConfig(num_features=8)), seed=0).eval()
    own, more = (model_readiness(model, [[5, 6, 7] * 9], num_features=m, advance=lambda n: None) for m in (None, 4096))
    assert own[0].readiness.num_features == 8
    assert more[0].readiness.relative_error < own[0].readiness.relative_error


def test_readiness_compares_with_exact_attention_of_the_kernel_that_was_learned():
    attention = FavorConfig(num_features=8, covariance="diagonal")
    model = ProteinLanguageModel(replace(SIZES, attention=attention), seed=0).eval()
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.attention.covariance_root.fill_(1e-3)  # hardly any logits are left: nothing is hard to estimate
    for count in (None, 16):
        for layer in model_readiness(model, [[5, 6, 7] * 9], num_features=count):
            assert layer.readiness.logit_spread < 1e-4
            assert layer.readiness.relative_error < 1e-3
            assert layer.propagated_error < 1e-3


def test_benchmark_approximation_reports_on_a_model_and_its_proteins(capsys, tmp_path):
    model = ProteinLanguageModel(replace(SIZES, attention=ExactConfig()), seed=0)
    save_model(tmp_path / "model", model, ModelDescription(model=model.config, residue_counts=[1] * 33))
    fasta = tmp_path / "proteins.fa"
    fasta.write_text(">a\nMKVLAAGIT\n>b\nMSTNPKPQR\n>c\nMAAA\n")
    figure = tmp_path / "readiness.png"
    arguments = ["--model", str(tmp_path / "model"), "--fasta", str(fasta), "--num-proteins", "2", "--quiet"]
    counts = ["--num-features", "16", "--num-features", "32", "--plot", str(figure)]
    assert run(["benchmark", "approximation", *arguments, *counts, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "first 2 proteins" in found["sequences"]
    assert [(layer["layer"], layer["num_features"]) for layer in found["layers"]] == [
        (1, 16),
        (2, 16),
        (1, 32),
        (2, 32),
    ]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert run(["benchmark", "approximation", "--model", str(tmp_path / "model"), "--num-proteins", "1", "-q"]) == 0
    assert "512 random residues" in capsys.readouterr().out


def test_errors_of_attention_shrink_with_the_features_and_name_every_estimator():
    errors = list(output_errors(length=64, head_dim=4, scale=0.5, counts=[8, 512], draws=6, advance=lambda n: None))
    few, many = ({e.variant: e for e in errors if e.num_features == count} for count in (8, 512))
    assert {IID, TRIGONOMETRIC, "positive, orthogonal, sqrt_d"} <= few.keys()
    assert all(many[name].mean_squared.median < few[name].mean_squared.median for name in few)
    assert few[IID].wins_over_iid == 0.0


def test_trigonometric_features_estimate_softmax_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(40, 4) * 0.7 for _ in range(3))
    exact = exact_attention(q, k, v)
    ones = torch.ones(1, 40, dtype=torch.int64)
    weights = exact_weights(q[None, None], k[None, None], ones, causal=False)[0, 0]
    torch.testing.assert_close(exact, (weights @ v.double()).float())
    error = [float((trigonometric_attention(q, k, v, m, seed=1) - exact).norm() / exact.norm()) for m in (64, 16384)]
    assert error[1] < 0.03 < error[0]


def test_the_interval_of_a_median_is_by_ranks():
    interval = median_interval([float(x) for x in range(15, 0, -1)])
    assert (interval.low, interval.median, interval.high) == (4.0, 8.0, 12.0)
    assert median_interval([3.0, 1.0, 2.0]).low == 1.0


@pytest.mark.parametrize("kind", ["favor", "generalized"])
@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
def test_performer_pytorch_is_measured_at_the_same_sizes(kind, direction, capsys):
    pytest.importorskip("performer_pytorch", exc_type=ImportError)
    case = replace(CASE, implementation="performer-pytorch", kind=kind, direction=direction)
    assert prepare(case)().shape == (1, 2, 64, 8)
    assert prepare(replace(case, model=SIZES))().shape == (1, 64, 33)
    assert capsys.readouterr().out == ""  # or the JSON would be spoilt


def test_a_peer_that_is_not_installed_is_a_users_error(monkeypatch, capsys):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    from importlib import metadata

    monkeypatch.setattr(metadata, "version", missing)
    assert run(["benchmark", "attention", "--peers", "--length", "16"]) == 1
    assert "pip install 'protformer[bench]'" in capsys.readouterr().err
