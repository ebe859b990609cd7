"""`protformer benchmark`: speed, memory and errors of attention on this machine."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from protformer.benchmark.cases import ATTENTION_CONFIGS, IDENTITY, Case, Dtype, Grid, Pass, Row
from protformer.cli.options import FilePath, device_option, json_option, quiet_option
from protformer.config import Direction

Function = TypeVar("Function", bound=Callable[..., Any])

LENGTHS = (512, 1024, 2048, 4096, 8192)
COUNTS = (16, 32, 64, 128, 256, 512, 1024)
FIGURE_14 = {"num_layers": 12, "num_heads": 8, "hidden_size": 128, "feed_forward_size": 512}
FIGURE_14_RESIDUES, FIGURE_14_COUNTS = 1024, (64, 256, 1024)

plot_option = click.option("--plot", type=FilePath, metavar="FILE", help="Draw the figure as PNG.")


def several(*names: str, default: Sequence[Any], **extra: Any) -> Callable[[Function], Function]:
    """An option that may be given several times."""
    return click.option(*names, multiple=True, default=default, show_default=True, **extra)


def cost_options(*, lengths: Sequence[int], passes: Sequence[Pass]) -> Callable[[Function], Function]:
    """What `attention` and `model` have in common."""
    kinds = tuple(ATTENTION_CONFIGS)
    options = [
        several(
            "--kind", "kinds", default=("favor", "generalized", "exact"), type=click.Choice(kinds), help="Attention."
        ),
        several("--length", "lengths", default=lengths, type=click.IntRange(min=1), metavar="N", help="Residues."),
        click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Rows."),
        several(
            "--direction",
            "directions",
            default=("bidirectional",),
            type=click.Choice(["bidirectional", "unidirectional"]),
            help="All residues, or those before.",
        ),
        several(
            "--dtype", "dtypes", default=("fp32",), type=click.Choice(["fp32", "bf16"]), help="Of inputs and products."
        ),
        several(
            "--pass", "passes", default=passes, type=click.Choice(["forward", "forward+backward"]), help="What is run."
        ),
        click.option("--peers", is_flag=True, help="Measure performer-pytorch beside ours (extra `bench`)."),
        click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="Rounds of timing."),
        click.option("--no-memory", is_flag=True, help="Times only: no fresh process for each case."),
        click.option(
            "--max-seconds", default=60.0, show_default=True, type=float, help="A call that takes longer is left out."
        ),
        click.option(
            "--max-gb",
            default=8.0,
            show_default=True,
            type=float,
            help="Memory a process of a memory measurement may use.",
        ),
        device_option,
        json_option,
        plot_option,
        quiet_option,
    ]

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.group("benchmark")
def command() -> None:
    """Measure attention on this machine: time, memory, error."""


@command.command("attention")
@click.option("--heads", default=8, show_default=True, type=click.IntRange(min=1), help="Attention heads.")
@click.option("--head-dim", default=64, show_default=True, type=click.IntRange(min=2), help="Channels of a head.")
@click.option("--num-features", default=256, show_default=True, type=click.IntRange(min=1), help="Random features.")
@cost_options(lengths=LENGTHS, passes=("forward", "forward+backward"))
def attention(heads: int, head_dim: int, num_features: int, **choices: Any) -> None:
    """Time and peak memory of attention alone against length.

    Times are medians of rounds in which all rows of one length take turns. Memory is measured in a fresh process for
    each row: the peak beyond the inputs. Ends with the length from which on each kind is faster than exact attention,
    and how many times longer it takes than its matrix products alone would at the rate measured for a large one.

    \b
    Example:
      protformer benchmark attention --length 2048 --length 8192 --peers --plot attention.png
    """
    from protformer.benchmark.cases import attention_cases

    cases = attention_cases(_grid(choices), heads=heads, head_dim=head_dim, num_features=num_features)
    sizes = f"batch {choices['batch']}, {heads} heads of {head_dim}, m = {num_features}"
    _measure_costs(cases, title=f"Attention: {sizes}", **choices)


@command.command("model")
@click.option("--config", metavar="NAME", help="Sizes of a configuration, such as tiny or paper-concat.")
@click.option("--model", "model_path", type=FilePath, metavar="MODEL", help="Sizes of a model folder instead.")
@cost_options(lengths=LENGTHS[:-1], passes=("forward+backward",))
def model(config: str | None, model_path: Path | None, **choices: Any) -> None:
    """Time and peak memory of a whole model against length, with each kind of attention.

    Give either --config or --model: it sets the sizes.

    The line `identity` is the same model with an attention that returns its values: what everything else costs.
    Weights are random; dropout is off.
    """
    from protformer.benchmark.cases import model_cases
    from protformer.config import load_run_config

    if (config is None) == (model_path is None):
        raise click.UsageError("give either --config or --model")
    if model_path is None:
        sizes = load_run_config(config).model
    else:
        from protformer.model_description import read_description

        sizes = read_description(model_path).model
    grid = _grid(choices | {"kinds": (*choices["kinds"], IDENTITY)})
    name = f"{sizes.num_layers} layers, {sizes.num_heads} heads, hidden {sizes.hidden_size}"
    _measure_costs(model_cases(grid, sizes), title=f"Model of {name}, batch {grid.batch}", **choices)


@command.command("approximation")
@click.option("--length", default=4096, show_default=True, type=click.IntRange(min=2), help="Residues.")
@click.option("--head-dim", default=16, show_default=True, type=click.IntRange(min=2), help="Channels of a head.")
@click.option("--scale", default=1.0, show_default=True, type=float, help="Standard deviation of queries and keys.")
@click.option(
    "--num-features", "counts", multiple=True, type=click.IntRange(min=2), metavar="M",
    help="Random features; several. Default 16 to 1024, or those of --model.",
)  # fmt: skip
@click.option("--draws", default=15, show_default=True, type=click.IntRange(min=1), help="Draws behind each median.")
@click.option("--model", "model_path", type=FilePath, metavar="MODEL", help="Report on this model's layers instead.")
@click.option("--fasta", metavar="FILE", help="With --model: its proteins; random residues if not given.")
@click.option(
    "--num-proteins", default=32, show_default=True, type=click.IntRange(min=1),
    help="With --model: proteins read, from the start of the file.",
)  # fmt: skip
@device_option
@json_option
@plot_option
@quiet_option
def approximation(
    length: int,
    head_dim: int,
    scale: float,
    counts: tuple[int, ...],
    draws: int,
    model_path: Path | None,
    fasta: str | None,
    num_proteins: int,
    device: str,
    as_json: bool,
    plot: Path | None,
    quiet: bool,
) -> None:
    """Error of the random features against exact attention.

    Without --model: error of the attention output against the number of features, for each estimator, and error of
    the hidden states through 12 layers of random weights. With --model: for each layer, whether its attention is of a
    kind that random features can estimate, whatever attention the model has.

    In the names of estimators: `iid` are independent random projections, `orthogonal` those orthogonal in blocks; `chi`
    draws their norms as independent ones have them, `sqrt_d` makes all norms sqrt(head_dim). With --model, effective
    features are how many of the features carry the estimate: near 1, a single one decides.
    """
    if model_path is not None:
        _report_readiness(model_path, counts, fasta, num_proteins, device, as_json, plot, quiet)
        return
    if fasta is not None:
        raise click.UsageError("--fasta goes with --model")
    from protformer.benchmark.approximation import layer_errors, output_errors
    from protformer.cli.benchmark_tables import error_tables
    from protformer.cli.progress import count_progress
    from protformer.config import ModelConfig
    from protformer.device import choose_device, describe_machine

    with count_progress("draws", quiet=quiet) as advance:
        outputs = list(
            output_errors(
                length=length, head_dim=head_dim, scale=scale, counts=counts or COUNTS, draws=draws, advance=advance
            )
        )
        layers = list(
            layer_errors(
                model=ModelConfig(**FIGURE_14),  # type: ignore[arg-type]
                length=FIGURE_14_RESIDUES,
                counts=counts or FIGURE_14_COUNTS,
                draws=draws,
                advance=advance,
            )
        )
    if plot is not None:
        from protformer.benchmark.figures import plot_errors

        plot_errors(outputs, layers, title=f"{length:,} residues, d = {head_dim}, {draws} draws", path=plot)
    found = {
        "machine": describe_machine(choose_device("cpu")),
        "rows": [error.as_json() for error in outputs],
        "layers": [error.as_json() for error in layers],
    }
    _print(found, as_json, lambda: error_tables(outputs, layers))


def _report_readiness(
    model_path: Path,
    counts: tuple[int, ...],
    fasta: str | None,
    num_proteins: int,
    device: str,
    as_json: bool,
    plot: Path | None,
    quiet: bool,
) -> None:
    from protformer.checkpoint import load_model
    from protformer.cli.benchmark_tables import readiness_table
    from protformer.cli.readiness import proteins_to_report, report_readiness
    from protformer.device import choose_device, describe_machine

    chosen = choose_device(device)
    model, description = load_model(model_path, chosen)
    proteins, sequences = proteins_to_report(description, fasta, num_proteins)
    reports = report_readiness(model, proteins, counts=counts or (None,), quiet=quiet)
    if plot is not None:
        from protformer.benchmark.figures import plot_readiness

        plot_readiness(reports, title=f"{model_path}: {sequences}", path=plot)
    found = {
        "machine": describe_machine(chosen),
        "model": str(model_path),
        "sequences": sequences,
        "layers": [report.as_json() for report in reports],
    }
    _print(found, as_json, lambda: readiness_table(reports, sequences))


def _grid(choices: dict[str, Any]) -> Grid:
    from protformer.device import choose_device

    if choices["peers"]:
        from protformer.benchmark.peers import require_peer

        require_peer()
    directions: tuple[Direction, ...] = choices["directions"]
    dtypes: tuple[Dtype, ...] = choices["dtypes"]
    return Grid(
        kinds=tuple(dict.fromkeys(choices["kinds"])),
        directions=tuple(dict.fromkeys(directions)),
        dtypes=tuple(dict.fromkeys(dtypes)),
        passes=tuple(dict.fromkeys(choices["passes"])),
        lengths=tuple(dict.fromkeys(choices["lengths"])),
        batch=choices["batch"],
        device=choose_device(choices["device"]).type,
        peers=choices["peers"],
    )


def _measure_costs(
    cases: list[Case],
    *,
    title: str,
    repeats: int,
    no_memory: bool,
    max_seconds: float,
    max_gb: float,
    as_json: bool,
    plot: Path | None,
    quiet: bool,
    **_: object,
) -> None:
    from protformer.benchmark.analysis import report
    from protformer.benchmark.measure import Limits, measure
    from protformer.benchmark.timing import matrix_rate
    from protformer.cli.benchmark_tables import cost_tables
    from protformer.cli.progress import StderrConsole, count_progress
    from protformer.device import choose_device, describe_machine

    device = choose_device(cases[0].device)
    limits = Limits(repeats=repeats, with_memory=not no_memory, max_seconds=max_seconds, max_gb=max_gb)
    console = StderrConsole(quiet=quiet)
    rates: dict[str, float] = {
        dtype: matrix_rate(dtype, device) for dtype in dict.fromkeys(case.dtype for case in cases)
    }
    rows: list[Row] = []
    with count_progress("cases", quiet=quiet) as advance:
        rows += measure(cases, limits, tell=console.tell, advance=advance)
    # Again: on a busy machine one moment may be slow, and a floor must be the best that the machine can do.
    rates = {dtype: max(rate, matrix_rate(dtype, device)) for dtype, rate in rates.items()}
    if plot is not None:
        from protformer.benchmark.figures import plot_costs

        plot_costs(rows, title=title, path=plot)
    found = {
        "machine": describe_machine(device),
        "rows": [row.as_json() for row in rows],
        **report(rows, rates),
    }
    _print(found, as_json, lambda: cost_tables(rows, rates, title))


def _print(found: Mapping[str, object], as_json: bool, tables: Callable[[], Sequence[object]]) -> None:
    import json

    if as_json:
        click.echo(json.dumps(found))
        return
    from protformer.cli.readiness import print_tables

    print_tables(tables())
