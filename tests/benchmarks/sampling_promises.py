"""What the sampler promises at the size of TrEMBL: `python tests/benchmarks/sampling_promises.py FOLDER`.

FOLDER gets some 6 GB of files while this runs and is emptied afterwards: a store of 3 GB of random tokens, and one that
claims 250 million proteins and 90 GB (offsets in full, tokens a hole in a sparse file). Prints a line for each promise;
exits with 1 if one is missed. Each figure is the median of processes started anew; the throughput's store was read once
before, so that it is in the page cache. Tokens are copied out of the store into rows that are the process's own.

Resident memory is what Linux says in /proc/self/status: RssAnon is the process's own, RssFile the pages of mapped files
(libraries, and a store if it were mapped). Their sum is promised.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np

from protformer.alphabet import EOS, FINGERPRINT, FIRST_RESIDUE, NUM_TOKENS
from protformer.config import DataConfig
from protformer.corpus.fasta import FastaReport
from protformer.corpus.packing import build_packing
from protformer.corpus.row_stream import SamplerPosition, row_plans
from protformer.corpus.sampling import Corpus
from protformer.corpus.store_manifest import FORMAT_VERSION, StoreManifest
from protformer.corpus.token_store import MANIFEST_FILE, OFFSETS_FILE, TOKENS_FILE, TokenStore

WINDOW = 8192
PROTEIN_TOKENS = 360
WARM_PROTEINS, LARGE_PROTEINS = 8_333_333, 250_000_000
WINDOWS_READ = 60_000
ROWS = 8
"""Of a batch of 65,536 tokens."""
ROWS_READ = {"attend": 100_000, "isolate": 20_000}
REPEATS = 5


def main() -> None:
    folder = Path(sys.argv[1])
    warm, large = folder / "warm_store", folder / "large_store"
    try:
        make_store(warm, WARM_PROTEINS, is_sparse=False)
        make_store(large, LARGE_PROTEINS, is_sparse=True)
        sys.exit(not report(warm, large))
    finally:
        shutil.rmtree(warm, ignore_errors=True)
        shutil.rmtree(large, ignore_errors=True)


def report(warm: Path, large: Path) -> bool:
    """Measure and print; whether all promises are kept."""
    for path in (warm / TOKENS_FILE, large / OFFSETS_FILE):
        read_through(path)
    windows, copies = [], []
    for _ in range(REPEATS):  # in turns, so that other work on the machine falls on both
        windows.append(in_process("windows", warm))
        copies.append(in_process("copies", warm))
    starts = {packing: [in_process(packing, large) for _ in range(REPEATS)] for packing in ("attend", "isolate")}
    print(f"       plain copies from the mapped store: {median(copies, 'gb_per_second'):.2f} GB/s of wall time")
    print(f"       random windows: {median(windows, 'gb_per_cpu_second'):.2f} GB/s of processor time")
    memory = f"RssAnon {median(windows, 'anon_mb'):.0f} MB, RssFile {median(windows, 'file_mb'):.0f} MB"
    print(f"       random windows: {memory}")
    kept = [
        promise("random windows of 8192, GB/s of tokens", median(windows, "gb_per_second"), 1.0, at_least=True),
        promise("random windows of 8192, resident MB", median(windows, "rss_mb"), 100.0, at_least=False),
    ]
    for packing, rows in starts.items():
        name = f"{packing} over {LARGE_PROTEINS:,} proteins"
        print(f"       {name}: RssAnon {median(rows, 'anon_mb'):.0f} MB, RssFile {median(rows, 'file_mb'):.0f} MB")
        kept.append(promise(f"{name}, start of an epoch, ms", median(rows, "start_ms"), 100.0, at_least=False))
        kept.append(
            promise(
                f"{name}, resident MB after {ROWS_READ[packing]:,} rows", median(rows, "rss_mb"), 100.0, at_least=False
            )
        )
    return all(kept)


def promise(name: str, measured: float, limit: float, *, at_least: bool) -> bool:
    is_kept = measured >= limit if at_least else measured <= limit
    print(f"{'kept' if is_kept else 'MISSED':7}{name:70} {measured:8.2f} {'>=' if at_least else '<='} {limit:g}")
    return is_kept


def median(rows: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def in_process(what: str, store: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--measure", what, str(store)], stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(what: str, folder: Path) -> dict[str, float]:
    figures = {"windows": measure_windows, "copies": measure_copies}.get(what, measure_start)(what, folder)
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            figures[{"RssAnon": "anon_mb", "RssFile": "file_mb"}[name]] = int(value.split()[0]) / 1024
    return figures | {"rss_mb": figures["anon_mb"] + figures["file_mb"]}


def measure_windows(what: str, folder: Path) -> dict[str, float]:
    """Rows of 8192 in the order of an epoch, each copied into memory of its own."""
    packing = build_packing(
        Corpus(stores=(TokenStore.open(folder),)), DataConfig(max_residues=WINDOW, packing="attend"), seed=0
    )
    plans = row_plans(packing, SamplerPosition())
    wall, processor = time.perf_counter(), time.process_time()
    num_tokens = sum(packing.assemble(list(islice(plans, ROWS))).tokens.size for _ in range(WINDOWS_READ // ROWS))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"gb_per_second": num_tokens / wall / 1e9, "gb_per_cpu_second": num_tokens / processor / 1e9}


def measure_copies(what: str, folder: Path) -> dict[str, float]:
    """The least that could be done: copies of windows at random places of the mapped file, places drawn beforehand."""
    tokens = TokenStore.open(folder).tokens.view(np.ndarray)
    places = np.random.default_rng(0).integers(0, len(tokens) - WINDOW, WINDOWS_READ).tolist()
    begin = time.perf_counter()
    for place in places:
        tokens[place : place + WINDOW].copy()
    return {"gb_per_second": WINDOW * WINDOWS_READ / (time.perf_counter() - begin) / 1e9}


def measure_start(packing_name: str, folder: Path) -> dict[str, float]:
    """From the path of a store to the first row of an epoch in the middle of a run, then 100,000 rows more."""
    begin = time.perf_counter()
    store = TokenStore.open(folder)
    config = DataConfig(max_residues=WINDOW, packing=packing_name)
    packing = build_packing(Corpus(stores=(store,)), config, seed=0)
    plans = row_plans(packing, SamplerPosition(unit=3 * packing.units_per_epoch))
    packing.assemble([next(plans)])
    start_ms = 1000 * (time.perf_counter() - begin)
    for _ in range(ROWS_READ[packing_name] // ROWS):
        packing.assemble(list(islice(plans, ROWS)))
    return {"start_ms": start_ms}


def make_store(folder: Path, num_proteins: int, *, is_sparse: bool) -> None:
    """A store of proteins of one length; its tokens are random residues, or nothing but a hole."""
    folder.mkdir(parents=True)
    num_tokens = num_proteins * PROTEIN_TOKENS
    offsets = np.lib.format.open_memmap(folder / OFFSETS_FILE, "w+", "<i8", (num_proteins + 1,))
    for first in range(0, num_proteins + 1, 1 << 22):
        part = offsets[first : first + (1 << 22)]
        part[:] = np.arange(first, first + len(part)) * PROTEIN_TOKENS
    offsets.flush()
    rng = np.random.default_rng(0)
    with (folder / TOKENS_FILE).open("wb") as file:
        while not is_sparse and file.tell() < num_tokens:
            file.write(rng.integers(4, 24, 1 << 24, dtype=np.uint8).tobytes())
        file.truncate(num_tokens)
    counts = [0] * NUM_TOKENS
    counts[EOS], counts[FIRST_RESIDUE] = num_proteins, num_tokens - num_proteins
    manifest = StoreManifest(
        format_version=FORMAT_VERSION,
        alphabet=FINGERPRINT,
        sources=(),
        num_proteins=num_proteins,
        num_residues=num_tokens - num_proteins,
        residue_counts=tuple(counts),
        report=FastaReport(),
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def read_through(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
