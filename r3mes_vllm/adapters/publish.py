"""From an author's folder to a pinned CID on an IPFS daemon."""

import asyncio
import tempfile
from pathlib import Path

from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.vetting import vet
from r3mes_vllm.errors import AdapterError, AdapterRefused, SourceFailed
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.http import exchange
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.ipfs.sources import KuboSource
from r3mes_vllm.ipfs.tree import Limits

_TOTAL_S = 1800.0


async def publish(directory: Path, *, api: str, base: ModelShape | None = None) -> CID:
    """Vet the adapter in `directory`, add it to the daemon at `api` and pin it there.

    Raises AdapterRefused for what no node would serve, and AdapterError when the daemon fails.
    """
    if not directory.is_dir():  # noqa: ASYNC240 - a local file, asked once
        raise AdapterRefused("files_are_there", f"{directory} is not a directory")
    await asyncio.to_thread(vet, directory, base=base)
    with tempfile.TemporaryDirectory() as name:
        packed = Path(name) / "adapter.car"
        cid = await asyncio.to_thread(pack, directory, packed)
        # The daemon answers when it has taken all: until then no byte comes.
        async with exchange(Limits(stall_s=_TOTAL_S, total_s=_TOTAL_S)) as connections:
            daemon = KuboSource(api)
            try:
                await daemon.import_car(packed, connections)
                await daemon.pin(cid, connections)
            except SourceFailed as error:
                raise AdapterError(
                    f"the IPFS daemon did not take {cid}: {error}",
                    hint="is it running? ipfs daemon; --ipfs-api names another",
                ) from error
    return cid
