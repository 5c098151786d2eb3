"""Pieces cover the whole, once, on the threads that torch has, which keep their settings."""

import threading

import pytest
import torch
from block_bytes import MODEST, split
from hypothesis import given
from hypothesis import strategies as st

from gemma4_impl.gguf.pieces import in_pieces


def threads_of_a_new_thread() -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@MODEST
@given(count=st.integers(0, 60), block=st.sampled_from([1, 32]), piece=st.integers(1, 200), threads=st.integers(1, 4))
def test_every_block_once(count, block, piece, threads):
    done = torch.zeros(count, dtype=torch.int64)
    most = 0

    def work(part: slice) -> None:
        nonlocal most
        done[part] += 1
        most = max(most, len(done[part]))

    with split(piece, threads):
        in_pieces(work, count, block)
    assert (done == 1).all()
    assert most <= max(1, piece // block)


def test_workers_do_not_split_their_operations_nor_leave_a_trace():
    both, inside = threading.Barrier(2, timeout=30), []

    def work(part: slice) -> None:
        both.wait()
        inside.append((threading.get_ident(), torch.get_num_threads(), torch.is_inference_mode_enabled()))

    with split(1, threads=2):
        for inference in (False, True):
            inside.clear()
            with torch.inference_mode(inference):
                in_pieces(work, 2, 1)
            assert [(n, mode) for _, n, mode in inside] == [(1, inference)] * 2
            assert len({ident for ident, _, _ in inside}) == 2
            assert torch.get_num_threads() == threads_of_a_new_thread() == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_is_raised(threads):
    def work(part: slice) -> None:
        raise ZeroDivisionError

    with split(1, threads):
        with pytest.raises(ZeroDivisionError):
            in_pieces(work, 4, 1)
        assert torch.get_num_threads() == threads_of_a_new_thread() == threads
