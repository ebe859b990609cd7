"""The options of `protformer prepare` that say how to split, collected into one argument."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from protformer.cli.options import FilePath

if TYPE_CHECKING:
    from protformer.corpus.split_stores import SplitRequest

_FRACTION = click.FloatRange(min=0, max=1, max_open=True)

_OPTIONS = [
    click.option(
        "--split",
        type=click.Choice(["clusters", "mmseqs", "hash"]),
        help="Also hold proteins out: whole clusters of a table, whole clusters that MMseqs2 makes now, or by a hash "
        "of the sequence, which keeps only identical ones together.",
    ),
    click.option(
        "--clusters", type=FilePath, metavar="TSV", help="representative<TAB>member, as MMseqs2 writes *_cluster.tsv."
    ),
    click.option(
        "--unlisted",
        type=click.Choice(["error", "drop", "single"]),
        help="Proteins that the table does not list: refuse (default), leave out, or a cluster each, which can leak.",
    ),
    click.option(
        "--clustering",
        type=click.Choice(["linclust", "cluster"]),
        help="With --split mmseqs: easy-linclust (default; linear time) or easy-cluster (finds more relatives).",
    ),
    click.option(
        "--identity",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Identity from which two proteins are relatives, for MMseqs2.  [default: 0.3]",
    ),
    click.option(
        "--coverage",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Of both proteins, for a cluster of MMseqs2.  [default: 0.5]",
    ),
    click.option(
        "--search/--no-search",
        default=None,
        help="Drop what a sensitive search by MMseqs2 still finds similar across the split.  [default: with mmseqs]",
    ),
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Of MMseqs2.  [default: 1]"),
    click.option(
        "--families", type=FilePath, metavar="TSV", help="Accessions in column 1, families (Pfam, COG) in column 2."
    ),
    click.option(
        "--family-column", metavar="N|NAME", help="Another column for the family; a name is one in the first line."
    ),
    click.option(
        "--hold-out-families",
        metavar="NAMES|N",
        help="Families that go whole to the store `ood`: names with commas between, or how many to choose among those "
        "with at least 10 proteins here.",
    ),
    click.option(
        "--validation-fraction", type=_FRACTION, metavar="SHARE", help="Of the clusters, or proteins.  [default: 0.02]"
    ),
    click.option("--test-fraction", type=_FRACTION, metavar="SHARE", help="Likewise.  [default: 0.02]"),
    click.option(
        "--split-seed", "seed", type=click.IntRange(0, 2**32 - 1), metavar="S", help="Decides which.  [default: 0]"
    ),
]

_NAMES = (
    "split", "clusters", "unlisted", "clustering", "identity", "coverage", "search", "threads", "families",
    "family_column", "hold_out_families", "validation_fraction", "test_fraction", "seed",
)  # fmt: skip


def split_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the options; the function receives those given as `split`, a dict by name."""

    @functools.wraps(function)
    def collecting(**arguments: Any) -> None:
        taken = {name: arguments.pop(name) for name in _NAMES}
        function(**arguments, split={name: value for name, value in taken.items() if value is not None})

    decorated: Callable[..., None] = collecting
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def split_request(given: dict[str, Any]) -> "SplitRequest | None":
    """The request that these options make, None without any. Raises UsageError for a contradiction."""
    if not given:
        return None
    _refuse_contradictions(given)
    from protformer.corpus.split_stores import SplitRequest

    method = given["split"]
    fields = {name: value for name, value in given.items() if name not in ("split", "clustering")}
    request = SplitRequest(
        method=method,
        linear=given.get("clustering", "linclust") == "linclust",
        **({"search": method == "mmseqs"} | fields),
    )
    if request.validation_fraction + request.test_fraction >= 1:
        raise click.UsageError("--validation-fraction and --test-fraction leave nothing to train on")
    return request


def _refuse_contradictions(given: dict[str, Any]) -> None:
    method = given.get("split")
    if method is None:
        raise click.UsageError(f"--{min(given).replace('_', '-')} needs --split")
    if (method == "clusters") != ("clusters" in given):
        raise click.UsageError("--split clusters and --clusters go together")
    if ("families" in given) != ("hold_out_families" in given):
        raise click.UsageError("--families and --hold-out-families go together")
    if "family_column" in given and "families" not in given:
        raise click.UsageError("--family-column needs --families")
    if "unlisted" in given and method != "clusters":
        raise click.UsageError("--unlisted needs --split clusters")
    for name in ("clustering", "coverage"):
        if name in given and method != "mmseqs":
            raise click.UsageError(f"--{name} needs --split mmseqs")
    for name in ("identity", "threads"):
        if name in given and method != "mmseqs" and not given.get("search"):
            raise click.UsageError(f"--{name} needs --split mmseqs or --search")
