"""Threads: each task in one of its own, with its share of torch's threads, and nothing changed behind them."""

import threading

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
