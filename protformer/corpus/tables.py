"""Lines of large tables, plain or compressed, many at a time.

In: a table with tabs between its columns. Out: lists of lines as bytes, with the number of their first line. Memory
is a few blocks.
"""

from collections.abc import Iterator

from protformer.corpus.compression import Source, open_blocks

_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_lines(source: Source) -> Iterator[tuple[int, list[bytes]]]:
    """Consecutive lines without their ends, and the number of the first, from 1. Raises InputError."""
    number = 1
    rest = b""
    for block in open_blocks(source, block_bytes=_BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        if number == 1 and lines:
            lines[0] = lines[0].removeprefix(_BOM)
        if lines:
            yield number, [line.rstrip(b"\r") for line in lines]
            number += len(lines)
    if rest:
        yield number, [rest.removeprefix(_BOM).rstrip(b"\r")]
