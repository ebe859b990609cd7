"""UniProt's FASTA files over HTTPS, through bad connections, whole and verified or not at all.

In: the name of a database, and a mirror. Out: the file. `RELEASE.metalink` beside the file gives its size and MD5.
Bytes go to `OUT.<md5>.partial`, which another call for the same release goes on with (HTTP Range); the file gets its
name when size and checksum are right. A connection that breaks is tried again, without end as long as it gets further,
and `MAX_FRUITLESS` times without. Only the standard library is used.
"""

import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

from protformer import __version__
from protformer.errors import InputError, OutputError

DATABASES = {
    "swissprot": "knowledgebase/complete/uniprot_sprot.fasta.gz",
    "trembl": "knowledgebase/complete/uniprot_trembl.fasta.gz",
    "uniref50": "uniref/uniref50/uniref50.fasta.gz",
}
"""Name -> path below a mirror's folder of the current release."""

MIRRORS = {
    "uniprot": "https://ftp.uniprot.org/pub/databases/uniprot/current_release",
    "ebi": "https://ftp.ebi.ac.uk/pub/databases/uniprot/current_release",
    "expasy": "https://ftp.expasy.org/databases/uniprot/current_release",
}

MAX_FRUITLESS = 6
"""Attempts in a row that get no further."""

TIMEOUT_SECONDS = 60.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers of a server that may be another one later."""

_PIECE_BYTES = 1 << 18
_MAX_METALINK_BYTES = 1 << 24

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What a mirror says about a file."""

    version: str
    num_bytes: int
    md5: str


class _BrokenOffError(Exception):
    """The connection ended early, or the server was busy."""


def read_release(database: str, mirror: str, *, tell: Callable[[str], None]) -> Release:
    """Size and checksum of the file as the mirror now has it. Raises InputError."""
    folder, _, wanted = DATABASES[database].rpartition("/")
    url = f"{_base(mirror)}/{folder}/RELEASE.metalink"

    def fetch() -> bytes:
        with _open(url, {}) as response:
            return b"".join(iter(lambda: _read(response), b""))[:_MAX_METALINK_BYTES]

    try:
        root = ElementTree.fromstring(_with_retries(url, fetch, brought=lambda: 0, tell=tell))
    except ElementTree.ParseError as error:
        raise InputError(f"{url}: not a metalink ({error})") from error
    version = next((element.text for element in root.iter() if _tag(element) == "version"), None)
    for file in root.iter():
        if _tag(file) != "file" or file.get("name") != wanted:
            continue
        size = next((element.text for element in file.iter() if _tag(element) == "size"), None) or ""
        hashes = [element.text or "" for element in file.iter() if _tag(element) == "hash"]
        md5 = next((value.strip().lower() for value in hashes if re.fullmatch(r"\s*[0-9a-fA-F]{32}\s*", value)), None)
        if md5 is None or not size.strip().isdigit():
            break
        return Release(version=(version or "unknown").strip(), num_bytes=int(size), md5=md5)
    raise InputError(f"{url}: gives no size and MD5 of {wanted}; try another --mirror")


def download(
    database: str,
    mirror: str,
    out: Path,
    release: Release,
    *,
    progress: Callable[[int], None],
    tell: Callable[[str], None],
) -> None:
    """Bring the file to `out`. Raises InputError and OutputError.

    `progress` is told of bytes, those of an earlier call too, and a negative number where a server starts again.
    """
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another --out, or delete it")
    url = f"{_base(mirror)}/{DATABASES[database]}"
    partial = out.with_name(f"{out.name}.{release.md5}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        transfer = _Transfer(url=url, partial=partial, release=release, progress=progress, tell=tell)
        transfer.run()
        partial.replace(out)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be written: {error.strerror or error}; the next call goes on") from error


class _Transfer:
    """One file on its way: `have` bytes of it are there, `furthest` is the most that ever were."""

    def __init__(
        self, *, url: str, partial: Path, release: Release, progress: Callable[[int], None], tell: Callable[[str], None]
    ) -> None:
        self.url, self.partial, self.release = url, partial, release
        self.progress, self.tell = progress, tell
        self.have = self.furthest = 0
        self.md5 = hashlib.md5(usedforsecurity=False)

    def run(self) -> None:
        self._take_up_earlier()
        if self.have < self.release.num_bytes:
            _with_retries(self.url, self._attempt, brought=lambda: self.furthest, tell=self.tell)
        if self.md5.hexdigest() != self.release.md5:
            self.partial.unlink()
            raise InputError(
                f"{self.url}: the checksum is wrong (MD5 {self.md5.hexdigest()}, the release says {self.release.md5}); "
                "what came was deleted: try again, or another --mirror"
            )
        with self.partial.open("rb+") as file:
            os.fsync(file.fileno())

    def _take_up_earlier(self) -> None:
        if not self.partial.exists():
            return
        if self.partial.stat().st_size > self.release.num_bytes:
            self.partial.unlink()
            return
        with self.partial.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                self._count(piece)
        self.tell(f"{self.partial}: going on behind {self.have:,} of {self.release.num_bytes:,} bytes")

    def _count(self, piece: bytes) -> None:
        self.md5.update(piece)
        self.have += len(piece)
        self.furthest = max(self.furthest, self.have)
        self.progress(len(piece))

    def _start_again(self) -> None:
        self.tell(f"{self.url}: the server does not continue files; starting again")
        self.progress(-self.have)
        self.have = 0
        self.md5 = hashlib.md5(usedforsecurity=False)

    def _attempt(self) -> None:
        """Fetch what is missing. Raises _BrokenOffError if it ended early."""
        headers = {"Range": f"bytes={self.have}-"} if self.have else {}
        with _open(self.url, headers) as response:
            self._check_answer(response)
            with self.partial.open("ab" if self.have else "wb") as file:
                while self.have <= self.release.num_bytes and (piece := _read(response)):
                    file.write(piece)
                    self._count(piece)
        if self.have > self.release.num_bytes:
            self.partial.unlink()
            raise InputError(
                f"{self.url}: sends more than the {self.release.num_bytes:,} bytes that the release gives; "
                "it may have changed just now: try again"
            )
        if self.have < self.release.num_bytes:
            raise _BrokenOffError(f"ended after {self.have:,} of {self.release.num_bytes:,} bytes")

    def _check_answer(self, response: http.client.HTTPResponse) -> None:
        if response.status == 206:
            given = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            is_wanted = given and int(given[1]) == self.have and given[2] in ("*", str(self.release.num_bytes))
            if not is_wanted:
                raise InputError(
                    f"{self.url}: answers with another part of a file (Content-Range "
                    f"{response.headers.get('Content-Range')!r}); it may have changed just now: try again"
                )
        elif self.have:
            self._start_again()


def _with_retries(
    url: str, work: Callable[[], Result], *, brought: Callable[[], int], tell: Callable[[str], None]
) -> Result:
    """What `work` gives, once it does not break off. `brought` counts the bytes that it brought so far."""
    fruitless = 0
    while True:
        before = brought()
        try:
            return work()
        except _BrokenOffError as error:
            fruitless = 0 if brought() > before else fruitless + 1
            if fruitless >= MAX_FRUITLESS:
                raise InputError(
                    f"{url}: {error}; gave up after {MAX_FRUITLESS} attempts that got no further; the same command "
                    "goes on where this one stopped"
                ) from error
            pause = min(FIRST_PAUSE_SECONDS * 2**fruitless, LONGEST_PAUSE_SECONDS)
            tell(f"{url}: {error}; trying again in {pause:.0f} s")
            time.sleep(pause)


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Raises _BrokenOffError for what may pass, InputError for what will not."""
    request = urllib.request.Request(
        url, headers={"User-Agent": f"protformer/{__version__}", "Accept-Encoding": "identity"} | headers
    )
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in WORTH_ANOTHER_TRY:
                raise _BrokenOffError(f"the server answers {error.code} {error.reason}") from error
            raise InputError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise InputError(f"{url}: {reason}") from error
        raise _BrokenOffError(str(reason) or type(reason).__name__) from error
    return response


def _read(response: http.client.HTTPResponse) -> bytes:
    """The next bytes, empty at the end."""
    try:
        return response.read(_PIECE_BYTES)
    except http.client.IncompleteRead as error:
        return error.partial
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from error


def _base(mirror: str) -> str:
    url = MIRRORS.get(mirror, mirror).rstrip("/")
    if not re.match(r"https?://[^/]", url):
        raise InputError(
            f"--mirror {mirror!r}: is neither {', '.join(MIRRORS)} nor an address with http:// or https://"
        )
    return url


def _tag(element: ElementTree.Element) -> str:
    """Without the namespace, which differs between versions of the format."""
    return element.tag.rpartition("}")[2]
