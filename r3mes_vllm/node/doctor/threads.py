"""Threads that nobody waits for.

A name server that never answers keeps the thread that asks it for minutes. Python would wait for it
before it ends, long after the doctor has said all that it found.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """As `asyncio.run`, and what still runs in a thread then ends with the process."""
    with asyncio.Runner() as runner:
        runner.get_loop().set_default_executor(_Daemons())
        return runner.run(main)


class _Daemons(ThreadPoolExecutor):  # asyncio takes no other kind
    def submit(
        self, function: Callable[..., Result], /, *arguments: Any, **named: Any
    ) -> Future[Result]:
        future = Future[Result]()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*arguments, **named))
            except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
                future.set_exception(error)

        threading.Thread(target=work, name="r3mes-doctor", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass
