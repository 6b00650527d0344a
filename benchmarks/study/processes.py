"""Many runs, in this process or in several."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(run: Callable[[Item], Result], items: Sequence[Item], processes: int) -> Iterator[tuple[Item, Result]]:
    """Yield each item with what `run` makes of it, as it finishes.

    Args:
        run: Can be pickled, as its results, where there are several processes.
        items: They are begun in this order.
        processes: How many worker processes of one thread each; 1 runs all in this one.
    """
    if processes == 1:
        torch.set_num_threads(1)
        for item in items:
            yield item, run(item)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(run, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            # After an interrupt what has not begun must not begin.
            pool.shutdown(wait=False, cancel_futures=True)
