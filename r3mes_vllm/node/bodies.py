"""A request's body, read by a middleware and there again for what comes after."""

from starlette.types import Message, Receive


async def read(receive: Receive, most: int | None = None) -> bytes | None:
    """The whole body; None if the client went away. Raises OverflowError over `most` bytes."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(part := message.get("body", b""))
        size += len(part)
        if most is not None and size > most:
            raise OverflowError
        if not message.get("more_body"):
            return b"".join(parts)


class Replay:
    """`receive` for what comes after: the body that was read, then the client itself."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
