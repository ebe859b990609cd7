"""The alphabet: ESM's 33 tokens in ESM's order, and the tables between letters and tokens.

In: nothing. Out: constants. ESM-2's order makes conversion from and export to ESM-2 free of a mapping. Tokens that no
protein uses (`<unk>`, `.`, `-`, `<null_1>`) keep their places and are never produced by the FASTA reader. A token fits
one byte, so a letter table is 256 bytes and `bytes.translate` is the tokenizer.

Source of the order: `esm/constants.py` and `esm/data.py` of facebookresearch/esm (ESM-1b alphabet).
"""

import hashlib

TOKENS: tuple[str, ...] = (
    "<cls>", "<pad>", "<eos>", "<unk>",
    "L", "A", "G", "V", "S", "E", "R", "T", "I", "D", "P", "K", "Q", "N", "F", "Y", "M", "H", "W", "C",
    "X", "B", "U", "Z", "O",
    ".", "-", "<null_1>", "<mask>",
)  # fmt: skip

NUM_TOKENS = len(TOKENS)
CLS, PAD, EOS, UNK = 0, 1, 2, 3
MASK = TOKENS.index("<mask>")

STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 standard amino acids, in alphabetical order of their one-letter codes."""

FIRST_RESIDUE, LAST_RESIDUE = TOKENS.index("L"), TOKENS.index("O")
"""Tokens of residues (the 20 standard ones, then X B U Z O) are exactly those from FIRST_RESIDUE to LAST_RESIDUE."""

RESIDUES = "".join(TOKENS[FIRST_RESIDUE : LAST_RESIDUE + 1])
"""The 25 letters that are tokens of their own, in the order of their tokens."""

RESIDUE_TO_TOKEN: dict[str, int] = {letter: FIRST_RESIDUE + i for i, letter in enumerate(RESIDUES)}

INVALID = 255
"""What `LETTER_TABLE` gives for a byte that is no residue letter."""

LETTER_TABLE: bytes = bytes(
    RESIDUE_TO_TOKEN.get(chr(byte).upper(), INVALID) if byte < 128 else INVALID for byte in range(256)
)
"""For `bytes.translate`: upper- or lower-case residue letter to token, any other byte to INVALID."""

TOKEN_TO_LETTER_TABLE: bytes = bytes(
    ord(RESIDUES[t - FIRST_RESIDUE]) if FIRST_RESIDUE <= t <= LAST_RESIDUE else ord("?") for t in range(256)
)
"""For `bytes.translate`: residue token to upper-case letter, any other token to `?`."""

FINGERPRINT: str = hashlib.sha256("\n".join(TOKENS).encode()).hexdigest()[:16]
"""Identifies this alphabet in token stores and model folders; another one is refused."""
