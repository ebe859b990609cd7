"""Letters of a sequence to tokens: what is a residue, what is changed and counted, and what is refused.

In: lines of a FASTA sequence as bytes. Out: residue tokens, with the counts of changed letters, or where the
first bad letter is and what it is. J becomes X; gaps (`-`, `.`) are removed; after that one trailing `*` is
dropped and an inner one becomes X.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protformer.alphabet import EOS, INVALID, LETTER_TABLE, NUM_TOKENS, RESIDUE_TO_TOKEN

CLOSE = bytes([EOS])
"""What closes every protein in a run of several."""

ALLOWED = "the letters A to Z in either case, '*', '-' and '.'"

_J, _GAP, _STOP = b"\xfc", b"\xfd", b"\xfe"  # for letters that will be changed; no token is as large


@dataclass(frozen=True, kw_only=True, slots=True)
class LetterChanges:
    """How often each letter was changed."""

    j_to_x: int = 0
    trailing_stop_dropped: int = 0
    inner_stop_to_x: int = 0
    gaps_removed: int = 0


def count_codes(codes: bytes) -> NDArray[np.int64]:
    """(256,) How often each byte occurs. Counting pairs of bytes takes half the time of counting bytes."""
    array = np.frombuffer(codes, np.uint8)
    num_paired = len(array) // 2 * 2
    pairs = array[:num_paired].view(np.uint16)
    table = np.bincount(pairs, minlength=NUM_TOKENS << 8)
    if len(table) > NUM_TOKENS << 8:  # bytes that are no tokens
        table = np.bincount(pairs, minlength=1 << 16)
    table = table.reshape(-1, 256)
    counts: NDArray[np.int64] = table.sum(axis=0)
    counts[: len(table)] += table.sum(axis=1)
    counts[array[num_paired:]] += 1
    return counts


def change_letters(codes: bytes) -> tuple[bytes, LetterChanges]:
    """Tokens of proteins, given as codes of `LETTER_CODES` and each closed by <eos>."""
    residues = codes.replace(_GAP, b"")
    kept = residues.replace(_STOP + CLOSE, CLOSE) if _STOP in residues else residues
    changes = LetterChanges(
        j_to_x=kept.count(_J),
        trailing_stop_dropped=len(residues) - len(kept),
        inner_stop_to_x=kept.count(_STOP),
        gaps_removed=len(codes) - len(residues),
    )
    return kept.translate(_CHANGED_TO_X), changes


def find_bad_letter(body: bytes) -> tuple[int, int, str]:
    """The first letter that is not allowed: its line and column in `body`, both from 0, and what it is."""
    for line, text in enumerate(body.split(b"\n")):
        found = text.strip().translate(LETTER_CODES).find(INVALID)
        if found >= 0:
            column = len(text) - len(text.lstrip()) + found
            return line, column, describe_byte(text[column : column + 4])
    raise ValueError("the sequence has no bad letter")


def describe_byte(text: bytes) -> str:
    """What the first character of `text` is, in words that fit on one line."""
    first = text[:1]
    if first.isspace():
        return {b" ": "a space", b"\t": "a tab", b"\r": "a carriage return"}.get(first, "white space")
    character = text.decode("utf-8", "ignore")[:1]
    if character.isprintable() and character and text.startswith(character.encode()):
        return repr(character)
    return f"binary data (byte 0x{first.hex()})"


def _letter_codes() -> bytes:
    codes = bytearray(LETTER_TABLE)
    for letters, code in ((b"Jj", _J), (b"-.", _GAP), (b"*", _STOP)):
        for letter in letters:
            codes[letter] = code[0]
    return bytes(codes)


LETTER_CODES = _letter_codes()
"""Letter to token, to a code for what will be changed, or to INVALID."""
LETTER_OR_CLOSE_CODES = bytes(EOS if byte == ord(">") else code for byte, code in enumerate(LETTER_CODES))
"""The same, where `>` closes every sequence."""
_CHANGED_TO_X = bytes(RESIDUE_TO_TOKEN["X"] if bytes([t]) in (_J, _STOP) else t for t in range(256))
