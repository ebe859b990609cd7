"""What schedulers send, taken as Ctrl-C is.

While a command has no better use for them, SIGTERM and SIGUSR1 interrupt it: what it knows how to keep is kept, and it
leaves with code 130 instead of dying where it stands.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for these signals until the block is left or something else listens to them."""
    before = {number: signal.signal(number, _interrupt) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
