"""What building a token store promises, measured: `python tests/benchmarks/corpus_promises.py FOLDER FILE...`.

FILEs are real FASTA, compressed or not; FOLDER has room for 12 GB and is not on a memory disk. The files are written
there one after another as plain FASTA with fresh ids, for `--large-gb` a good many times. Times are medians of
alternating repeats, those of one process its CPU time, so only ratios are promised; nothing else should run meanwhile.
Needs pyfaidx, Biopython and fair-esm (`pip install fair-esm`). Prints a line for each promise; exits with 1 if one is
missed. `--only NAME` measures one part: speed, scaling, large, kills.
"""

import argparse
import hashlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from protformer.corpus.compression import open_blocks
from protformer.corpus.letters import LETTER_CODES
from protformer.corpus.store_build import build_stores
from protformer.corpus.token_store import TokenStore

PREPARE = [sys.executable, "-m", "protformer", "prepare", "--quiet"]
REPEATS = 7
PEER_REPEATS = 3


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[argparse.Namespace], Iterator[bool]]] = {
        "speed": speed,
        "scaling": scaling,
        "large": large,
        "kills": kills,
    }
    chosen = [parts[arguments.only]] if arguments.only else list(parts.values())
    kept = [is_kept for part in chosen for is_kept in part(arguments)]
    sys.exit(not all(kept))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--large-gb", type=float, default=5.2)
    parser.add_argument("--only", choices=["speed", "scaling", "large", "kills"])
    return parser.parse_args()


def promise(name: str, measured: float, limit: float, *, at_least: bool) -> bool:
    is_kept = measured >= limit if at_least else measured <= limit
    print(
        f"{'kept' if is_kept else 'MISSED':7} {name:75} {measured:8.2f} {'>=' if at_least else '<='} {limit:g}",
        flush=True,
    )
    return is_kept


def tell(name: str, measured: float) -> None:
    print(f"        {name:75} {measured:8.2f}", flush=True)


def speed(arguments: argparse.Namespace) -> Iterator[bool]:
    """One process and its CPU time: ours against one pass of bytes.translate, and against other readers."""
    fasta = repeated(arguments.files, arguments.folder / "speed.fasta", copies=1)
    size = fasta.stat().st_size / 1e6
    content = fasta.read_bytes()
    blocks = [content[start : start + (1 << 18)] for start in range(0, len(content), 1 << 18)]
    del content
    store = arguments.folder / "speed_store"
    jobs: dict[str, Callable[[], object]] = {
        "token store": lambda: build_stores([fasta], [store]),
        "bytes.translate": lambda: [block.translate(LETTER_CODES) for block in blocks],
    }

    def remove_store() -> None:  # replacing an older store is not part of building one
        shutil.rmtree(store, ignore_errors=True)

    times = alternate(jobs, REPEATS, remove_store)
    times |= alternate({"token store again": jobs["token store"]} | peers(fasta), PEER_REPEATS, remove_store)
    for name, seconds in times.items():
        tell(f"{name}: MB/s of FASTA, best {size / min(seconds):.0f}, median", size / statistics.median(seconds))
        if name not in jobs:
            ratio = statistics.median(seconds) / statistics.median(times["token store again"])
            tell(f"{name}: times the token store's time", ratio)
    ratio = statistics.median(times["token store"]) / statistics.median(times["bytes.translate"])
    tell("token store: times the time of bytes.translate", ratio)
    yield promise(
        "token store: MB/s of a core, median", size / statistics.median(times["token store"]), 200, at_least=True
    )
    remove_store()
    fasta.unlink()


def peers(fasta: Path) -> dict[str, Callable[[], object]]:
    import pyfaidx
    from Bio import SeqIO
    from Bio.SeqIO.FastaIO import SimpleFastaParser
    from esm import FastaBatchedDataset

    def biopython() -> None:
        for _ in SeqIO.parse(str(fasta), "fasta"):
            pass

    def biopython_simple() -> None:
        with fasta.open() as file:
            for _ in SimpleFastaParser(file):
                pass

    def faidx() -> None:
        Path(f"{fasta}.fai").unlink(missing_ok=True)
        pyfaidx.Faidx(str(fasta)).close()
        Path(f"{fasta}.fai").unlink()

    return {
        "Biopython SeqIO.parse": biopython,
        "Biopython SimpleFastaParser": biopython_simple,
        "pyfaidx, building its index": faidx,
        "fair-esm FastaBatchedDataset.from_file": lambda: FastaBatchedDataset.from_file(fasta),
    }


def alternate(
    jobs: dict[str, Callable[[], object]], repeats: int, prepare_round: Callable[[], None]
) -> dict[str, list[float]]:
    """CPU seconds of each job, round after round, what prepares a round left out; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        prepare_round()
        for name, job in jobs.items():
            start = time.process_time()
            job()
            times[name].append(time.process_time() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def scaling(arguments: argparse.Namespace) -> Iterator[bool]:
    """Wall time of the command with one and two workers, from a warm cache."""
    fasta = repeated(arguments.files, arguments.folder / "scaling.fasta", copies=12)
    times: dict[int, list[float]] = {1: [], 2: []}
    digests = set()
    for _ in range(3):
        for workers, seconds in times.items():
            out = arguments.folder / f"scaling_{workers}"
            shutil.rmtree(out, ignore_errors=True)
            start = time.monotonic()
            prepare(fasta, out, workers)
            seconds.append(time.monotonic() - start)
    for workers, seconds in times.items():
        digests.add(digest(arguments.folder / f"scaling_{workers}"))
        tell(f"{workers} workers: MB/s of FASTA, wall", fasta.stat().st_size / 1e6 / statistics.median(seconds))
        shutil.rmtree(arguments.folder / f"scaling_{workers}")
    ratio = statistics.median(times[1]) / statistics.median(times[2])
    yield promise("two workers: times faster than one", ratio, 1.6, at_least=True)
    yield promise("different stores of 1 and 2 workers", len(digests), 1, at_least=False)
    fasta.unlink()


def large(arguments: argparse.Namespace) -> Iterator[bool]:
    """Peak memory of all processes together, sampled as proportional set size."""
    fasta = arguments.folder / "large.fasta"
    repeated(arguments.files, fasta, num_bytes=int(arguments.large_gb * 1e9))
    out = arguments.folder / "large_store"
    shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    process = subprocess.Popen([*PREPARE, "--fasta", str(fasta), "--out", str(out)])
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_mb, family(process.pid))))
        time.sleep(0.05)
    seconds = time.monotonic() - start
    assert process.returncode == 0
    tell(f"large file of {fasta.stat().st_size / 1e9:.2f} GB: MB/s, wall", fasta.stat().st_size / 1e6 / seconds)
    tell("millions of proteins", len(TokenStore.open(out)) / 1e6)
    yield promise("large file: peak memory of all processes, MB", peak, 500, at_least=False)
    shutil.rmtree(out)
    fasta.unlink()


def kills(arguments: argparse.Namespace) -> Iterator[bool]:
    """SIGKILL at 20 random moments of one build, then run again."""
    fasta = repeated(arguments.files, arguments.folder / "kills.fasta", copies=8)
    whole, out = arguments.folder / "kills_whole", arguments.folder / "kills_store"
    for folder in (whole, out):
        shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    prepare(fasta, whole, 2)
    seconds = time.monotonic() - start
    rng, num_killed, num_whole = random.Random(0), 0, 0
    while num_killed < 20:
        process = subprocess.Popen([*PREPARE, "--fasta", str(fasta), "--out", str(out), "--workers", "2"])
        start = time.monotonic()
        moment = rng.uniform(0.05, 0.8) * seconds
        while process.poll() is None and time.monotonic() < start + moment:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            num_killed += 1
        else:
            seconds = min(seconds, time.monotonic() - start)
        if out.exists():  # it was faster, or has just been put in its place
            num_whole += digest(out) != digest(whole)
            shutil.rmtree(out)
    prepare(fasta, out, 2)
    yield promise("20 kills: stores that differ at the end", float(digest(out) != digest(whole)), 0, at_least=False)
    yield promise("20 kills: stores that were there before they were whole", float(num_whole), 0, at_least=False)
    left = [entry.name for entry in arguments.folder.iterdir() if entry.name.startswith(".kills")]
    yield promise("20 kills: entries left behind", float(len(left)), 0, at_least=False)
    for folder in (whole, out):
        shutil.rmtree(folder)
    fasta.unlink()


def repeated(files: list[Path], out: Path, *, copies: int | None = None, num_bytes: int = 0) -> Path:
    """The records of all files in one plain file, again and again, each time with other ids."""
    text = b"\n" + b"".join(block for path in files for block in open_blocks(path))
    number = 0
    with out.open("wb") as file:
        while (copies is not None and number < copies) or file.tell() < num_bytes:
            file.write(text.replace(b"\n>", b"\n>%d_" % number)[1:])
            number += 1
    return out


def prepare(fasta: Path, out: Path, workers: int) -> None:
    subprocess.run([*PREPARE, "--fasta", str(fasta), "--out", str(out), "--workers", str(workers)], check=True)


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode())
        for block in open_blocks(path):
            total.update(block)
    return total.hexdigest()


def family(pid: int) -> list[int]:
    """A process and its children's."""
    found = [pid]
    for each in found:
        try:
            children = Path(f"/proc/{each}/task/{each}/children").read_text()
        except OSError:
            continue
        found += map(int, children.split())
    return found


def proportional_mb(pid: int) -> float:
    """Resident memory, shared pages by their share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
