"""What the readers of files raise (standard library, NumPy, torch, h5py, pyarrow) where bytes are missing or wrong.

Each has a handful of these: damaged text is a ValueError, a damaged pickle of weights anything from IndexError to
TypeError, and a changed byte of a `.npz` can ask for a password (RuntimeError) or a compression that is not there.
"""

import pickle
import tokenize
import zipfile
import zlib

UNREADABLE: tuple[type[Exception], ...] = (
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""To be caught around the reading of a file and nothing else."""


def reason(error: Exception) -> str:
    """The words of a library, on one line and of a bounded length."""
    words = f"no {error}" if isinstance(error, KeyError) else str(error)  # which says a name and no more
    return " ".join(words.split())[:200] or type(error).__name__
