"""Something that answers on the node's port while the backend is asked to call it."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from r3mes_vllm.identity import Identity
from r3mes_vllm.node import tls
from r3mes_vllm.node.identify import prove
from r3mes_vllm.settings import Settings

_CONNECTION_S = 5.0
_BODY = re.compile(rb'\s*\{\s*"nonce"\s*:\s*"([0-9a-f]{64})"\s*\}\s*')
_BODY_BYTES = 200


@asynccontextmanager
async def answering(settings: Settings, identity: Identity) -> AsyncIterator[None]:
    """Prove the node's key at `POST /identity`, and nothing else. Raises OSError if the port is
    taken, ConfigError for a certificate that can't be used."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_CONNECTION_S):
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: *([0-9]{1,3})\r\n", head)
                size = int(length[1]) if length else 0
                body = await reader.readexactly(size) if size <= _BODY_BYTES else b""
                asked = _BODY.fullmatch(body)
                if asked and head.startswith(b"POST /identity "):
                    proof = prove(identity, asked[1].decode(), settings.public_url)
                    said, status = proof.model_dump_json().encode(), b"200 OK"
                else:
                    said, status = b"", b"404 Not Found"
                writer.write(
                    b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (status, len(said), said)
                )
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    host, port = settings.serving_node_host, settings.serving_node_port
    server = await asyncio.start_server(answer, host, port, ssl=tls.context(settings))
    try:
        yield
    finally:
        server.close()
