"""Each task has a thread and its share of torch's threads, and nothing is changed behind them; memory is used again."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from protformer.device import in_threads


def test_tasks_run_at_once_and_give_their_results_in_order() -> None:
    meeting = threading.Barrier(3, timeout=30)  # nobody passes unless all three are there

    def task(number: int) -> tuple[int, int, bool]:
        meeting.wait()
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    before = torch.get_num_threads()
    try:
        for of_all, shares in {7: (3, 2, 2), 6: (2, 2, 2), 8: (3, 3, 2), 2: (1, 1, 1)}.items():
            torch.set_num_threads(of_all)
            found = in_threads([lambda n=n: task(n) for n in range(3)], level="shares")
            assert found == [(number, share, False) for number, share in enumerate(shares)]
            assert torch.get_num_threads() == of_all
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


LEVELS = """
import threading
from protformer.device import in_threads

inner_is_done = threading.Event()

def inner():
    return threading.current_thread().name

def outer_with_tasks():
    found = in_threads([inner, inner])
    inner_is_done.set()
    return found

def outer_that_waits():
    assert inner_is_done.wait(timeout=60)

for outer in ((outer_with_tasks, outer_that_waits), (outer_that_waits, outer_with_tasks)):
    inner_is_done.clear()
    print(in_threads(outer, level="batches"))

meeting = threading.Barrier(4)  # passed only if each of the two has a thread for its second task

def meet():
    meeting.wait(timeout=60)

print(in_threads([lambda: in_threads([meet, meet])] * 2, level="batches"))
"""


def test_tasks_of_one_level_have_tasks_of_another_while_their_neighbours_work() -> None:
    command = [sys.executable, "-c", LEVELS]  # a process, since threads that wait for each other would never end
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert printed.splitlines() == [
        "[['MainThread', 'attention_0'], None]",
        "[None, ['batches_0', 'attention_0']]",
        "[[None, None], [None, None]]",
    ]


def test_threads_end_with_the_thread_that_they_worked_for() -> None:
    def work() -> None:
        in_threads([threading.get_ident, threading.get_ident], level="of a thread that ends")

    caller = threading.Thread(target=work)
    caller.start()
    caller.join()
    names = [thread.name for thread in threading.enumerate()]
    deadline = time.monotonic() + 30
    while any(name.startswith("of a thread that ends") for name in names) and time.monotonic() < deadline:
        time.sleep(0.01)
        names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("of a thread that ends")]


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
