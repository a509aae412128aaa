"""What names have stood for, as text. The database is asked when an adapter has changed."""

from collections.abc import Collection
from contextlib import suppress

from r3mes_vllm import wire
from r3mes_vllm.backend.known import KnownLora
from r3mes_vllm.backend.refusals import DatabaseDown
from r3mes_vllm.backend.registry import Registry

SHOWN = 20


class History:
    def __init__(self) -> None:
        self._read: dict[str, tuple[int, list[str]]] = {}
        """By name: the adapter's revision then, and its versions."""

    async def versions(
        self, registry: Registry, loras: Collection[KnownLora]
    ) -> dict[str, list[str]]:
        """By name, the latest first; none while the database does not answer and nothing is
        known."""
        before = {lora.name: self._read.get(lora.name, (-1, [])) for lora in loras}
        changed = [lora for lora in loras if before[lora.name][0] != lora.revision]
        read = {}
        with suppress(DatabaseDown):
            found = await registry.latest_versions(changed, SHOWN) if changed else {}
            read = {
                lora.name: (lora.revision, [_line(it) for it in found[lora.name]])
                for lora in changed
            }
        self._read = before | read
        return {name: lines for name, (_, lines) in self._read.items()}


def _line(version: wire.LoraVersion) -> str:
    since = f"{version.registered_at:%Y-%m-%d %H:%M} UTC"
    return f"{version.ipfs_hash} · {version.version} · {since}" + " · now" * version.current
