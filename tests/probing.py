"""A probe that asks a port again and again, each time on a new connection."""

import http.client
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

EVERY_S = 0.01


@dataclass
class Probe:
    """What `GET /health` came to, from the first time that somebody listened."""

    port: int
    tls: ssl.SSLContext | None = None
    statuses: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def changes(self) -> list[int]:
        """The statuses in their order, without repetitions."""
        pairs = zip([0, *self.statuses], self.statuses, strict=False)
        return [now for before, now in pairs if now != before]

    def ask(self) -> None:
        began = time.monotonic()
        try:
            self.statuses.append(self._status())
        except (OSError, http.client.HTTPException) as error:
            if self.statuses:
                self.failures.append(repr(error))
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def _status(self) -> int:
        connection: http.client.HTTPConnection
        if self.tls:
            connection = http.client.HTTPSConnection(
                "localhost", self.port, timeout=30, context=self.tls
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()


@contextmanager
def probed(port: int, tls: ssl.SSLContext | None = None) -> Iterator[Probe]:
    """Every 10 ms, in a thread, as long as the context lasts."""
    probe, over = Probe(port, tls), threading.Event()

    def run() -> None:
        while not over.wait(EVERY_S):
            probe.ask()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield probe
    finally:
        over.set()
        thread.join()
