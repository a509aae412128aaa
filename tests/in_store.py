"""Adapters in a node's store that nobody has named to it."""

from pathlib import Path

from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.supply import Supply


async def put_in_store(cache: Path, adapter: Path) -> str:
    """Its CID; `cache` is the node's, and nothing is written there any more."""
    supply = Supply(store := Store(cache), ipfs_api="http://127.0.0.1:9", gateways=[])
    obtained = await supply.import_path(adapter)
    obtained.lease.release()
    store.synchronise()
    return str(obtained.cid)
