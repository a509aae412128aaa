"""Headers that a middleware puts on every answer."""

from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send


def adding(headers: Mapping[str, str], send: Send) -> Send:
    """`send`, with `headers` on the answer in place of what it has of those names."""

    async def added(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": list(message.get("headers", ()))}
            MutableHeaders(raw=message["headers"]).update(headers)
        await send(message)

    return added
