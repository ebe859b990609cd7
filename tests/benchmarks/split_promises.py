"""Does a split leak? Asked of MMseqs2 in other ways than the split was made: `python split_promises.py SPLIT`.

SPLIT is a folder of `protformer prepare --split`. Prints one line for each question; exits with 1 if a sequence, a
cluster or a family straddles the split. Needs `mmseqs`. Some minutes for 15,000 proteins on one core, an hour for
140,000; `nice` it.

1. Sequences in two stores, by comparing their bytes.
2. Clusters of `mmseqs easy-cluster` (all proteins anew, 30 % identity, mutual coverage of 0.5 and 0.8) in two stores.
3. Hits of `mmseqs easy-search` from each held-out store to those that come before it, with MMseqs2's own masking and
   number of candidates (the split searches unmasked, with more).
4. The same by Smith-Waterman over all pairs, no prefilter, for a sample of the held-out proteins.
5. Proteins of a held-out family outside `ood`, by reading the table again with plain Python.
"""

import argparse
import gzip
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from protformer.alphabet import TOKEN_TO_LETTER_TABLE
from protformer.corpus.token_store import TokenStore

EARLIER = {
    "ood": (),
    "train": ("ood",),
    "validation": ("ood", "train"),
    "test": ("ood", "train", "validation"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sample", type=int, default=20, help="proteins of each held-out store for question 4")
    parser.add_argument("--skip", type=int, nargs="*", default=[], help="questions to leave out")
    asked = parser.parse_args()
    stores = {name: read_store(asked.split / name) for name in EARLIER if (asked.split / name).is_dir()}
    for name, proteins in stores.items():
        print(f"{name}: {len(proteins):,} proteins", flush=True)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="split-promises-") as folder:
        bench = Bench(Path(folder), stores, asked.threads)
        questions = (
            bench.shared_sequences,
            bench.straddling_clusters,
            bench.search_hits,
            lambda: bench.aligned_pairs(asked.sample),
            lambda: stray_family_members(asked.split, stores),
        )
        for number, question in enumerate(questions, start=1):
            if number not in asked.skip:
                failures += question()
    sys.exit(int(failures > 0))


def read_store(folder: Path) -> list[tuple[str, bytes]]:
    store = TokenStore.open(folder)
    return [(store.id(i), store.protein(i).tobytes().translate(TOKEN_TO_LETTER_TABLE)) for i in range(len(store))]


class Bench:
    def __init__(self, folder: Path, stores: dict[str, list[tuple[str, bytes]]], threads: int) -> None:
        self.folder, self.stores, self.threads = folder, stores, threads
        for name in stores:
            self.write(f"{name}.fasta", [name])

    def write(self, file: str, names: list[str], chosen: dict[str, list[int]] | None = None) -> None:
        with (self.folder / file).open("wb") as out:
            for name in names:
                for i in range(len(self.stores[name])) if chosen is None else chosen[name]:
                    out.write(b">%b:%d\n%b\n" % (name.encode(), i, self.stores[name][i][1]))

    def mmseqs(self, command: str) -> None:
        threads = "" if command.startswith("createdb") else f" --threads {self.threads}"
        done = subprocess.run(
            f"mmseqs {command}{threads} -v 1".split(), cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"mmseqs {command}: {done.stdout}{done.stderr}")

    def rows(self, file: str) -> list[list[str]]:
        path = self.folder / file
        return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []

    def shared_sequences(self) -> int:
        found = defaultdict(set)
        for name, proteins in self.stores.items():
            for _, letters in proteins:
                found[letters].add(name)
        shared = sum(len(names) > 1 for names in found.values())
        print(f"1. sequences in two stores: {shared}", flush=True)
        return shared

    def straddling_clusters(self) -> int:
        self.write("all.fasta", list(self.stores))
        total = 0
        for coverage in ("0.5", "0.8"):
            self.mmseqs(f"easy-cluster all.fasta anew tmp --min-seq-id 0.3 -c {coverage} --cov-mode 0")
            sides = defaultdict(set)
            for representative, member in self.rows("anew_cluster.tsv"):
                sides[representative].add(member.split(":")[0])
            straddling = sum(len(names) > 1 for names in sides.values())
            total += straddling
            print(
                f"2. easy-cluster, 30 % identity, coverage {coverage}: {straddling} of {len(sides):,} straddle",
                flush=True,
            )
        return total

    def search_hits(self) -> int:
        total = 0
        for name in ("train", "validation", "test"):
            earlier = [other for other in EARLIER[name] if other in self.stores and other != "train"]
            if name in self.stores and name != "train":
                total += self.search(name, "train")
            for other in earlier:
                total += self.search(other, name)
        return total

    def search(self, query: str, target: str) -> int:
        if query not in self.stores or target not in self.stores:
            return 0
        (self.folder / "hits.tsv").unlink(missing_ok=True)
        self.mmseqs(
            f"easy-search {query}.fasta {target}.fasta hits.tsv tmp -s 7.5 -e 0.001 --min-seq-id 0.3 "
            "--format-output query,target,fident,alnlen,evalue"
        )
        return self.tell(f"3. easy-search -s 7.5, {query} in {target}", self.rows("hits.tsv"))

    def tell(self, what: str, rows: list[list[str]]) -> int:
        queries = {row[0] for row in rows}
        print(f"{what}: {len(rows)} hits of {len(queries)} proteins", flush=True)
        for query, target, identity, length, evalue in rows[:5]:
            names = [self.stores[word.split(":")[0]][int(word.split(":")[1])][0] for word in (query, target)]
            print(f"     {names[0]} and {names[1]}: {identity} over {length}, E-value {evalue}")
        return len(rows)

    def aligned_pairs(self, sample: int) -> int:
        """As `data/README.md` does it: a prefilter result that names every target for each query."""
        total = 0
        for name in ("validation", "test", "ood"):
            if name not in self.stores:
                continue
            count = min(sample, len(self.stores[name]))
            chosen = {name: random.Random(0).sample(range(len(self.stores[name])), count)}
            self.write("sample.fasta", [name], chosen)
            others = [other for other in self.stores if other != name]
            self.write("others.fasta", others)
            for file in self.folder.glob("exact_*"):
                file.unlink()
            self.mmseqs("createdb sample.fasta exact_query")
            self.mmseqs("createdb others.fasta exact_target")
            targets = (self.folder / "exact_target.index").read_bytes()
            (self.folder / "exact_pairs").write_bytes(targets)
            index = (self.folder / "exact_query.index").read_text().splitlines()
            lines = [f"{line.split()[0]}\t0\t{len(targets)}\n" for line in index]
            (self.folder / "exact_pairs.index").write_text("".join(lines))
            (self.folder / "exact_pairs.dbtype").write_bytes(struct.pack("<i", 7))
            self.mmseqs("align exact_query exact_target exact_pairs exact_found -a -e 0.001 --min-seq-id 0.3")
            self.mmseqs(
                "convertalis exact_query exact_target exact_found exact_hits.tsv "
                "--format-output query,target,fident,alnlen,evalue"
            )
            total += self.tell(f"4. all pairs, {count} of {name} with all others", self.rows("exact_hits.tsv"))
        return total


def stray_family_members(split: Path, stores: dict[str, list[tuple[str, bytes]]]) -> int:
    facts = json.loads((split / "split.json").read_text())["families"]
    if facts is None:
        return 0
    table = Path(facts["table"])
    with gzip.open(table, "rt") if table.suffix == ".gz" else table.open() as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    column = facts["column"]
    place = int(column) - 1 if column.isdigit() else rows[0].index(column)
    held_out = set(facts["held_out"])
    members = {row[0] for row in rows if len(row) > place and set(re.split("[;,]", row[place])) & held_out}
    stray = 0
    for name, proteins in stores.items():
        inside = sum(bool({word for word in re.split(r"\|", protein) if word} & members) for protein, _ in proteins)
        print(f"5. members of {len(held_out)} held-out families in {name}: {inside} of {len(proteins):,}", flush=True)
        stray += inside if name != "ood" else len(proteins) - inside
    return stray


if __name__ == "__main__":
    main()
