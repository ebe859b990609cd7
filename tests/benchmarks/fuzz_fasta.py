"""Mutated real FASTA against the reader and the store builder: `python tests/benchmarks/fuzz_fasta.py FILE...`.

Each case is some records of the files, mutated, perhaps compressed and then damaged. The reader must give records or
one printable line, never another exception; reading in blocks and building in ranges of odd sizes must agree with
reading at once; and where Biopython can read the case too, the residues must be the same, but for the changes that were
counted. Runs for the CPU time asked for, prints the seed of a failing case, and exits with 1 if there was one.
"""

import argparse
import gzip
import io
import random
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard
from Bio.SeqIO.FastaIO import SimpleFastaParser

from protformer.corpus.compression import open_blocks
from protformer.corpus.fasta import FastaReport, read_fasta
from protformer.corpus.store_build import build_stores
from protformer.corpus.token_store import TokenStore
from protformer.errors import InputError

Outcome = tuple[list[tuple[str, str, int]], str | None]


def main() -> None:
    arguments = parse_arguments()
    texts = [b"".join(open_blocks(path)) for path in arguments.files]
    started, number, kinds = time.process_time(), arguments.first, Counter[str]()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        while time.process_time() - started < 60 * arguments.minutes:
            try:
                kinds[check(make_case(random.Random(number), texts), random.Random(number), Path(folder))] += 1
            except Exception:  # noqa: BLE001 the very thing that is looked for
                failures += 1
                print(f"case {number}:", file=sys.stderr)
                traceback.print_exc()
            number += 1
            if number % 5000 == 0:
                print(f"{number - arguments.first:,} cases, {dict(kinds)}, {failures} failures", flush=True)
    print(f"{number - arguments.first:,} cases, {dict(kinds)}, {failures} failures")
    sys.exit(failures > 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="of CPU time")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    return parser.parse_args()


def make_case(rng: random.Random, texts: list[bytes]) -> bytes:
    text = rng.choice(texts)
    start = max(0, text.find(b"\n>", rng.randrange(len(text))) + 1)
    content = text[start : start + rng.choice([50, 500, 3000, 20_000])]
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 5])):
        content = rng.choice(MUTATIONS)(content, rng)
    if rng.random() < 0.25:
        content = rng.choice([gzip.compress, zlib.compress, zstandard.compress, two_members])(content)
        if rng.random() < 0.5:
            content = rng.choice([flip, cut_end, insert_bytes])(content, rng)
    return content


def two_members(content: bytes) -> bytes:
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


def flip(content: bytes, rng: random.Random) -> bytes:
    array = bytearray(content or b"\0")
    array[rng.randrange(len(array))] = rng.randrange(256)
    return bytes(array)


def cut_end(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def cut_start(content: bytes, rng: random.Random) -> bytes:
    return content[rng.randrange(min(len(content), 200) + 1) :]


def remove(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice([1, 2, 10, 100]) :]


def repeat(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[: start + rng.choice([1, 2, 10, 100])] + content[start:]


def insert_bytes(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.choice(PIECES) + content[start:]


def insert_at_line_start(content: bytes, rng: random.Random) -> bytes:
    start = content.find(b"\n", rng.randrange(len(content) + 1)) + 1
    return content[:start] + rng.choice(PIECES) + content[start:]


def change_line_ends(content: bytes, rng: random.Random) -> bytes:
    return content.replace(b"\n", rng.choice([b"\r\n", b"\n\n", b"\r", b" \n", b"\n ", b"\r\r\n"]))


def lower(content: bytes, rng: random.Random) -> bytes:
    return content.lower()


def exchange_letter(content: bytes, rng: random.Random) -> bytes:
    return content.replace(rng.choice(b"ACLK").to_bytes(1, "big"), rng.choice(b"JjX*-.Uu1").to_bytes(1, "big"))


PIECES = [
    b">", b">\n", b"\n>", b"> a\n", b"\r", b"\n", b"\n\n", b" ", b"\t", b"*", b"-", b".", b"J", b"*\n", b"\0", b"\xff",
    b"\xef\xbb\xbf", b"\xc2\xa0", b"\xc3\xa9", b"\xe2\x80\x83", b"\x1c", b"\x85", b";", b"1", b">x y\nMK\n",
    b"\x0b\x0c",
]  # fmt: skip
MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flip, cut_end, cut_start, remove, repeat, insert_bytes, insert_at_line_start, change_line_ends, lower,
    exchange_letter,
]  # fmt: skip


def check(content: bytes, rng: random.Random, folder: Path) -> str:
    """The kind of case; AssertionError or any other exception is a finding."""
    path = folder / "case.fa"
    path.write_bytes(content)
    report = FastaReport()
    records, message = read(path, report)
    assert (records, message) == read(path, FastaReport(), rng.choice([1, 7, 100, 1000, 5000]))
    if message is not None:
        assert message.isprintable(), message
        assert message.startswith(f"{path}: "), message
    assert_store_agrees(path, records, message, report, rng, folder)
    if message is not None:
        return "refused"
    theirs = biopython_residues(path)
    changed = report.gaps_removed + report.trailing_stop_dropped
    assert len(theirs) == len(records), "Biopython reads another number of records"
    assert sum(map(len, theirs)) - changed == sum(len(sequence) for _, sequence, _ in records) == report.residues
    if not changed:
        assert [sequence.translate({ord("J"): "X", ord("*"): "X"}) for sequence in theirs] == [r[1] for r in records]
    return "changed letters" if report.summary() else "read"


def read(path: Path, report: FastaReport, block_bytes: int = 1 << 18) -> Outcome:
    records = []
    try:
        for record in read_fasta(path, on_duplicate="allow", report=report, _block_bytes=block_bytes):
            records.append((record.id, record.sequence, record.line))
    except InputError as error:
        return records, str(error)
    return records, None


def assert_store_agrees(
    path: Path,
    records: list[tuple[str, str, int]],
    message: str | None,
    report: FastaReport,
    rng: random.Random,
    folder: Path,
) -> None:
    manifest, told = None, None
    try:
        (manifest,) = build_stores([path], [folder / "store"], _range_bytes=rng.choice([1, 30, 300, 2000, 10**6]))
    except InputError as error:
        told = str(error)
    assert told == message
    if manifest is None:
        return
    assert manifest.report == report
    store = TokenStore.open(folder / "store")
    assert [store.id(i) for i in range(len(store))] == [name for name, _, _ in records]
    assert store.num_tokens - len(store) == report.residues
    assert np.bincount(store.tokens, minlength=33).tolist() == list(manifest.residue_counts)


def biopython_residues(path: Path) -> list[str]:
    text = b"".join(open_blocks(path)).removeprefix(b"\xef\xbb\xbf").lstrip().decode("latin-1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ["".join(sequence.split()).upper() for _, sequence in SimpleFastaParser(io.StringIO(text))]


if __name__ == "__main__":
    main()
