"""Work on many items in threads, a few at a time."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def as_finished(
  work: Callable[[Item], Result], items: Iterable[Item], at_once: int
) -> Iterator[tuple[Item, Result]]:
  """Each item with its result, in the order in which the work on them ends.

  Args:
    items: the next one is taken when there is room for it. An iterator that ends
      early therefore stops the work after what is in progress.
    at_once: number of items in progress.

  Raises:
    Exception: the first one that `work` raised, after what was in progress has ended.
  """
  waiting = iter(items)
  running: dict[concurrent.futures.Future[Result], Item] = {}
  crash: BaseException | None = None
  with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    while True:
      if crash is None:
        for item in itertools.islice(waiting, at_once - len(running)):
          running[pool.submit(work, item)] = item
      if not running:
        break
      ended, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in ended:
        item = running.pop(future)
        crash = crash or future.exception()
        if future.exception() is None:
          yield item, future.result()
  if crash is not None:
    raise crash
