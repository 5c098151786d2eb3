"""Work over the pieces of a tensor, on as many threads as torch itself would use."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

PIECE = 1 << 21
"""Weights at a time: a few MB of scratch, which a processor's cache holds; still, calling the operations takes little
of the time."""
SCRATCH = 16 << 20
"""Bytes: more than a piece needs."""
LEAST = 1 << 15
"""Weights for which another thread is worth its start."""
MOST = 8
"""Threads: more would wait for Python's lock."""


def in_pieces(work: Callable[[slice], None], count: int, block: int) -> None:
    """Calls work(part) for parts that cover `count` blocks of `block` weights, in any order, on at most
    torch.get_num_threads() threads; raises what `work` raises.

    A piece's operations stay on its thread. Torch would rather split each of them, and have the threads wait for each
    other a hundred times a piece: up to a hundred times slower when something else uses a core."""
    torch_threads = torch.get_num_threads()
    threads = min(torch_threads, MOST, -(-count * block // LEAST))
    step = max(1, min(PIECE // block, -(-count // max(threads, 1))))
    starts = iter(range(0, count, step))
    inference = torch.is_inference_mode_enabled()
    # Having seen this much freed at once, glibc keeps what each piece frees, instead of returning it page by page.
    torch.empty(SCRATCH, dtype=torch.uint8)

    def run() -> None:
        with torch.inference_mode(inference):
            for start in starts:
                work(slice(start, start + step))

    if threads <= 1:
        run()
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(run) for _ in range(threads)]:
                done.result()
    finally:
        # A thread made later begins with what was set last, in whichever thread.
        torch.set_num_threads(torch_threads)
