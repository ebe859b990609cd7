"""Bytes from a file or standard input, decompressed on the way, in blocks.

In: a path, or `-`. Out: blocks of plain bytes. What the bytes begin with decides how they are read, not the
name: gzip (any number of members, so also BGZF), zstd (any number of frames), or plain. Memory is a few
blocks, however large the file and however well it was compressed. A stream that ends early or does not match
its checksum is an InputError.
"""

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import IO

from protformer.errors import InputError

Source = str | Path
"""A path; `-` is standard input."""

Consumed = Callable[[int], None]
"""Told the number of bytes read from the source (compressed as they are), each time some were read."""

BLOCK_BYTES = 1 << 19
"""Small enough to stay in the caches, and what is made from it: 1 MiB takes 1.07 times as long, 128 KiB 1.2 times."""

_READ_BYTES = 1 << 18
_PIECE_BYTES = 1 << 17
_ZSTD_FEED_BYTES = 1 << 12  # 4 bytes can stand for 128 KiB, and the zstd decoder gives all of it at once
_ZSTD_MAX_WINDOW_BYTES = 1 << 31  # `zstd --long=31`
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BGZF_HEADER_BYTES = 18
_UNREADABLE = {b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "zip"}


def open_blocks(source: Source, *, consumed: Consumed | None = None, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Blocks of the decompressed source, none empty, each of about `block_bytes` and under twice that."""
    name = describe_source(source)
    with readable(source), _open(source) as file:
        raw = _read(file.read, consumed)
        head = next(raw, b"")
        yield from _gather(_decompress(head, chain((head,), raw), name), block_bytes)


def is_plain(source: Source) -> bool:
    """Whether a regular file is neither compressed nor an archive."""
    with readable(source), open(source, "rb") as file:
        head = file.read(_BGZF_HEADER_BYTES)
    return _compression(head) is None


@contextmanager
def readable(source: Source) -> Iterator[None]:
    """Turns what the system says about a source that cannot be read into an InputError."""
    name = describe_source(source)
    try:
        yield
    except IsADirectoryError as error:
        raise InputError(f"{name}: is a folder; give a file") from error
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error


def describe_source(source: Source) -> str:
    """The source as messages name it, always printable and on one line."""
    name = "standard input" if is_stdin(source) else str(source)
    return name if name.isprintable() else ascii(name)


def is_stdin(source: Source) -> bool:
    return str(source) == "-"


def _open(source: Source) -> AbstractContextManager[IO[bytes]]:
    if not is_stdin(source):
        return open(source, "rb")
    if sys.stdin is None:
        raise InputError("standard input: closed; give a file instead of -")
    return nullcontext(sys.stdin.buffer)


def _read(read: Callable[[int], bytes], consumed: Consumed | None) -> Iterator[bytes]:
    while piece := read(_READ_BYTES):
        if consumed is not None:
            consumed(len(piece))
        yield piece


def _decompress(head: bytes, raw: Iterator[bytes], name: str) -> Iterator[bytes]:
    kind = _compression(head)
    if kind in _UNREADABLE.values():
        raise InputError(f"{name}: is {kind}-compressed; give it plain, gzip or zstd")
    if kind == "gzip":
        return _gunzip(raw, name)
    return _unzstd(raw, name) if kind == "zstd" else raw


def _compression(head: bytes) -> str | None:
    for magic, kind in _UNREADABLE.items():
        if head.startswith(magic):
            return kind
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    # pzstd starts with a skippable frame: 0x184D2A5? in little-endian order.
    if head.startswith(_ZSTD_MAGIC) or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return "zstd"
    return None


def _gather(pieces: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    """Pieces joined or cut to blocks; what came before a fault is given out before it is raised."""
    gathered: list[bytes] = []
    size = 0
    fault = None
    try:
        for piece in pieces:
            for start in range(0, len(piece), block_bytes):
                gathered.append(piece[start : start + block_bytes])
                size += len(gathered[-1])
                if size >= block_bytes:
                    yield b"".join(gathered)
                    gathered, size = [], 0
    except InputError as error:
        fault = error
    if gathered:
        yield b"".join(gathered)
    if fault is not None:
        raise fault


def _gunzip(raw: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Members one after another; pieces are at most `_PIECE_BYTES` each.

    A BGZF file ends with an empty member. Where that is missing, the file was cut between two members, which
    the checksums of the members cannot tell.
    """
    inflate = _inflate_module()
    decoder, is_bgzf, member_bytes = None, False, 0
    for data in raw:
        while data:
            if decoder is None:
                if not (data := data.lstrip(b"\0")):  # padding, from tapes and block devices
                    break
                if len(data) < _BGZF_HEADER_BYTES:
                    data += next(raw, b"")
                if data[:2] != _GZIP_MAGIC:
                    raise InputError(f"{name}: corrupt gzip: other data follow the compressed data")
                decoder, is_bgzf, member_bytes = inflate.decompressobj(wbits=31), _is_bgzf(data), 0
            try:
                piece = decoder.decompress(data, _PIECE_BYTES)
            except inflate.error as error:
                raise InputError(f"{name}: corrupt gzip: {error}") from error
            data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            member_bytes += len(piece)
            if decoder.eof:
                decoder = None
            if piece:
                yield piece
    if decoder is not None or (is_bgzf and member_bytes):
        raise InputError(f"{name}: truncated gzip: the end of the compressed data is missing; copy the file again")


def _inflate_module() -> ModuleType:
    """ISA-L's zlib, if the extra `fast` is installed: the same interface, about twice as fast."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib
    module: ModuleType = isal_zlib
    return module


def _is_bgzf(member: bytes) -> bool:
    """Whether a gzip member carries BGZF's extra field (SAM specification, section 4.1)."""
    return member[3:4] == b"\x04" and member[12:16] == b"BC\x02\x00"


def _unzstd(raw: Iterator[bytes], name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"{name}: is zstd-compressed; pip install 'protformer[zstd]' to read it") from error
    factory = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    decoder = None
    for item in raw:
        for start in range(0, len(item), _ZSTD_FEED_BYTES):
            data = item[start : start + _ZSTD_FEED_BYTES]
            while data:
                decoder = decoder or factory.decompressobj()
                try:
                    piece = decoder.decompress(data)
                except zstandard.ZstdError as error:
                    raise InputError(f"{name}: corrupt zstd: {' '.join(str(error).split())}") from error
                data = decoder.unused_data if decoder.eof else b""
                if decoder.eof:
                    decoder = None
                if piece:
                    yield piece
    if decoder is not None:
        raise InputError(f"{name}: truncated zstd: the end of the compressed data is missing; copy the file again")
