"""Keeps the view as the database is, whichever backend changes it.

PostgreSQL tells of each change (LISTEN); besides, and on SQLite only so, this looks twice a second
whether there was one. Only rows that are new since the last look are read.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from r3mes_vllm.backend.database import ERRORS, Errors, LoraRow, NodeRow
from r3mes_vllm.backend.known import known, known_lora
from r3mes_vllm.backend.view import View
from r3mes_vllm.backend.writing import CHANNEL, revision_of

log = logging.getLogger(__name__)

_LORAS: Any = LoraRow.__table__
_NODES: Any = NodeRow.__table__

_TROUBLE: Errors = (*ERRORS, ValidationError)

_LOOK_S = 0.5
_PAUSE_S = 0.05
"""Between two looks, so that many changes are read together."""
_LOOK_TIMEOUT_S = 5.0
_AGAIN_S = 1.0


class Follower:
    """`by` is what this backend calls itself where it tells the others. Close with `aclose`."""

    def __init__(
        self, engine: AsyncEngine, view: View, clock: Callable[[], datetime], by: str
    ) -> None:
        self._engine = engine
        self._view = view
        self._clock = clock
        self._by = by
        self._answered = clock()
        """When the database last did."""
        self._told = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Read everything, and follow. Raises what a database that does not answer raises."""
        async with self._engine.connect() as connection:
            await self._read(connection)
        self._answered = self._clock()
        work = [self._look_again_and_again()]
        if self._engine.dialect.name == "postgresql":
            work.append(self._listen())
        self._tasks = [asyncio.create_task(it, name="registry") for it in work]

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def look(self) -> None:
        """Bring the view up to date, or note that the database does not answer."""
        outages = self._view.outages
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT_S), self._engine.connect() as connection:
                await self._read(connection)
        except _TROUBLE as error:
            if not outages.since:
                log.warning("the registry's database does not answer: %r", error)
            outages.begin(self._answered)
            return
        self._answered = self._clock()
        if outages.since:
            log.warning("the registry's database answers again")
        outages.end(self._answered)

    async def _read(self, connection: AsyncConnection) -> None:
        revision = await revision_of(connection)
        if revision == self._view.revision:
            return
        # Another database has come in its place, such as a backup of this one.
        anew = revision < self._view.revision or self._view.revision < 0
        found = []
        for table in (_NODES, _LORAS):
            query = select(table).order_by(table.c.id)
            if not anew:
                query = query.where(table.c.revision > self._view.revision)
            found.append((await connection.execute(query)).mappings().all())
        nodes = [known(dict(row)) for row in found[0]]
        loras = [known_lora(dict(row)) for row in found[1]]
        if anew:
            self._view.replace(nodes, loras)
        else:
            for node in nodes:
                self._view.put_node(node)
            for lora in loras:
                self._view.put_lora(lora)
        self._view.revision = revision

    async def _look_again_and_again(self) -> None:
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._told.wait()
                self._told.clear()
                await self.look()
                await asyncio.sleep(_PAUSE_S)
        finally:  # whatever it is: nobody looks any more
            self._view.outages.begin(self._answered)

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except ERRORS as error:
                log.info("not listening to the database: %r", error)
            await asyncio.sleep(_AGAIN_S)

    async def _listen_once(self) -> None:
        """Until the connection ends."""
        async with self._engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            ended = asyncio.Event()
            driver.add_termination_listener(lambda _: ended.set())
            try:
                await driver.add_listener(CHANNEL, self._heard)
                self._told.set()  # of what was missed until now
                await ended.wait()
            finally:
                await connection.invalidate()

    def _heard(self, _connection: object, _pid: int, _channel: str, by: str) -> None:
        if by != self._by:
            self._told.set()
