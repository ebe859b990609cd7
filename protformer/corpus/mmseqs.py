"""MMseqs2 as a program on the PATH: which proteins are one cluster, and which resemble each other.

In: a token store and an empty folder to work in. Out: arrays of indices into the store. Proteins are handed over under
their indices, so ids need not differ. Steinegger and Soeding 2017 (MMseqs2), 2018 (Linclust, linear in the number of
proteins). Needs disk for the FASTA and MMseqs2's own files: some five times the residues.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import TOKEN_TO_LETTER_TABLE
from protformer.corpus.letters import CLOSE
from protformer.corpus.tables import read_lines
from protformer.corpus.token_store import TokenStore
from protformer.errors import ConfigError, OutputError, ProtformerError

MAX_EVALUE = 1e-3
"""Alignments above it are taken for chance in clustering."""

MAX_SEARCH_EVALUE = 1e-1
"""The same in the search. Its direction changes it by more than a factor: in 137,000 proteins BLE_STRHI and
A0AAC9FVC8_9PSED have 0.025 one way and 0.0007 the other."""

SENSITIVITY = 7.5
"""The most sensitive search that MMseqs2's authors benchmarked."""

SEARCH_MARGIN = 0.05
"""By how much less identity counts in the search. An alignment differs with its direction (MMseqs2 corrects for the
query's composition): HEMN_SALTY and YGGW_ECOLI have 28 % one way and 33 % the other."""

MAX_RESULTS = 1000
"""Candidates a query may bring to alignment; MMseqs2's default of 300 can be used up by a query's own side."""

_PROTEINS_AT_ONCE = 1 << 14


@dataclass(kw_only=True, slots=True)
class MMseqs:
    """One installed MMseqs2; `commands` grows with what was run."""

    program: str
    version: str
    folder: Path
    """Where files are made; the commands name them relative to it."""
    threads: int
    commands: list[str] = field(default_factory=list)

    @classmethod
    def find(cls, folder: Path, *, threads: int) -> "MMseqs":
        """The program on the PATH. Raises ConfigError without one."""
        program = shutil.which("mmseqs")
        if program is None:
            raise ConfigError(
                "mmseqs is not on the PATH; install MMseqs2 (Debian's package mmseqs2, or mmseqs2 of the conda channel "
                "bioconda), or choose --split clusters or --split hash without --search"
            )
        found = cls(program=program, version="", folder=folder, threads=threads)
        found.version = found._call(["version"]).strip()
        return found

    def cluster(self, store: TokenStore, *, mode: str, identity: float, coverage: float) -> NDArray[np.int64]:
        """(protein,) Index of each protein's representative, by `easy-linclust` or `easy-cluster`."""
        self._write_fasta(store, np.arange(len(store)), "proteins.fasta")
        self._run(
            f"easy-{mode} proteins.fasta clusters tmp --min-seq-id {identity:g} -c {coverage:g} --cov-mode 0 "
            f"-e {MAX_EVALUE:g}"
        )
        representatives, members = self._read_pairs("clusters_cluster.tsv", len(store))
        of_protein = np.full(len(store), -1, dtype=np.int64)
        of_protein[members] = representatives
        if len(members) != len(store) or (of_protein < 0).any():
            raise ProtformerError(
                f"mmseqs {self.version} gave clusters for {int((of_protein >= 0).sum()):,} of {len(store):,} proteins; "
                "cluster them by hand and give --split clusters"
            )
        return of_protein

    def search(
        self, store: TokenStore, queries: NDArray[np.int64], targets: NDArray[np.int64], *, identity: float
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(hit,) Pairs of a query and a target that have a significant alignment with this identity, less the margin.

        Low-complexity regions are not masked: a collagen's relatives are found by its repeats only.
        """
        self._write_fasta(store, queries, "queries.fasta")
        self._write_fasta(store, targets, "targets.fasta")
        self._run(
            f"easy-search queries.fasta targets.fasta hits.tsv tmp -s {SENSITIVITY:g} -e {MAX_SEARCH_EVALUE:g} "
            f"--min-seq-id {max(0.0, identity - SEARCH_MARGIN):g} --mask 0 --max-seqs {MAX_RESULTS} "
            "--format-output query,target"
        )
        return self._read_pairs("hits.tsv", len(store))

    def _run(self, arguments: str) -> None:
        arguments = f"{arguments} --threads {self.threads}"
        self.commands.append(f"mmseqs {arguments}")
        self._call([*arguments.split(), "-v", "2"])
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)

    def _call(self, arguments: Sequence[str]) -> str:
        """Run to the end; standard output. The processes that MMseqs2 starts end with ours."""
        process = subprocess.Popen(
            [self.program, *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        if process.returncode != 0:
            said = " / ".join([line.strip() for line in output.splitlines() if line.strip()][-3:])
            raise ProtformerError(f"mmseqs {arguments[0]} failed with exit code {process.returncode}: {said}")
        return output

    def _write_fasta(self, store: TokenStore, indices: NDArray[np.int64], name: str) -> None:
        try:
            with (self.folder / name).open("wb") as file:
                for start in range(0, len(indices), _PROTEINS_AT_ONCE):
                    chosen = indices[start : start + _PROTEINS_AT_ONCE].tolist()
                    letters = CLOSE.join([store.protein(i).tobytes() for i in chosen]).translate(TOKEN_TO_LETTER_TABLE)
                    rows = zip(chosen, letters.split(b"?"), strict=True)
                    file.write(b"".join([b">%d\n%b\n" % row for row in rows]))
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def _read_pairs(self, name: str, num_proteins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The two columns of a table of indices."""
        parts = [np.empty((0, 2), dtype=np.int64)]
        path = self.folder / name
        if path.exists() and path.stat().st_size:
            for _, lines in read_lines(path):
                cells = b"\t".join(lines).split(b"\t")
                parts.append(np.array(cells).astype(np.int64).reshape(-1, 2))
        pairs = np.concatenate(parts)
        if len(pairs) and (pairs.min() < 0 or pairs.max() >= num_proteins):
            raise ProtformerError(f"mmseqs {self.version} wrote numbers of proteins that it was not given")
        return pairs[:, 0], pairs[:, 1]
