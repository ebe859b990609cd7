"""Each task has a thread and its share of torch's threads, and nothing is changed behind them; memory is used again."""

import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from protformer.device import in_threads


def test_tasks_run_at_once_and_give_their_results_in_order() -> None:
    meeting = threading.Barrier(3, timeout=30)  # nobody passes unless all three are there

    def task(number: int) -> tuple[int, int, bool]:
        meeting.wait()
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        found = in_threads([lambda n=n: task(n) for n in range(3)])
        assert found == [(0, 2, False), (1, 2, False), (2, 2, False)]
        assert torch.get_num_threads() == 6
        assert in_threads([lambda: threading.get_ident()]) == [threading.get_ident()]
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_is_raised_when_all_have_ended() -> None:
    ended = []

    def fail() -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        in_threads([fail, lambda: ended.append(True)])
    assert ended == [True]


def test_tasks_of_one_level_may_have_tasks_of_another() -> None:
    def inner(number: int) -> int:
        return number

    def outer(number: int) -> list[int]:
        return in_threads([partial(inner, number), partial(inner, number + 1)])

    # In a thread of its own, so that a deadlock fails the test instead of stopping it.
    found: list[list[int]] = []
    work = [partial(outer, 0), partial(outer, 10)]
    thread = threading.Thread(target=lambda: found.extend(in_threads(work, level="batches")), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert found == [[0, 1], [10, 11]]


PAGES_TOUCHED = """
import resource, torch
from protformer.device import keep_freed_memory

keep_freed_memory(torch.device("cpu"))
for repeat in range(60):
    if repeat == 40:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone clears its arrays page by page")
def test_large_arrays_take_up_memory_that_was_freed_before() -> None:
    command = [sys.executable, "-c", PAGES_TOUCHED]
    touched = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert touched < 80_000  # twenty times 64 MiB are 330,000 pages of 4 KiB; glibc takes some repeats to settle
