"""An event loop on a thread of its own, for work that must not hold up the caller's loop."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def in_own_loop(make: Callable[[], Coroutine[Any, Any, T]], *, name: str) -> T:
    """The result of `make()`, run there. Cancelling cancels it, and waits until it has ended."""
    here = asyncio.get_running_loop()
    done: asyncio.Future[T] = here.create_future()
    inner: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def main() -> T:
        task = asyncio.create_task(make())
        inner.set_result((asyncio.get_running_loop(), task))
        return await task

    def tell(result: T | None, error: BaseException | None) -> None:
        if isinstance(error, asyncio.CancelledError):
            done.cancel()
        elif error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = asyncio.run(main())
        except BaseException as raised:  # noqa: BLE001 - it is raised again by who waits
            error = raised
        with suppress(RuntimeError):  # the caller's loop may be closed
            here.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        if not done.done():
            loop, task = await asyncio.shield(asyncio.wrap_future(inner))
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
            await asyncio.wait({done})
            if not done.cancelled():
                done.exception()
        raise
