"""Work that a request waits for only a little while: it goes on meanwhile, and a later request finds it done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import Any, TypeVar

PATIENCE = 0.05  # seconds
Found = TypeVar("Found")

_workers = ThreadPoolExecutor(2, thread_name_prefix="retort reading")
_going: dict[Hashable, Future[Any]] = {}
_lock = threading.Lock()


def soon(key: Hashable, what: str, work: Callable[[], Found]) -> Found:
    """What `work()` gives, or raises. BlockingIOError, which names `what`, where that takes longer than a moment.

    key: whoever asks by the same key meanwhile waits for the same work.
    """

    def done(future: Future[Any]) -> None:
        with _lock:
            if _going.get(key) is future:
                del _going[key]

    with _lock:
        future = _going.get(key)
        if future is None:
            future = _going[key] = _workers.submit(work)
    # Not within the lock: what is done already is told at once.
    future.add_done_callback(done)
    try:
        return future.result(PATIENCE)
    except LateError:
        raise BlockingIOError(f"{what} is large and is being read: ask again in a moment") from None
