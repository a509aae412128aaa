"""From an author's folder to its CID, pinned on an IPFS daemon."""

import asyncio
import re
import tempfile
from pathlib import Path

from r3mes_vllm.adapters.manifest import FILES
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.vetting import Adapter, vet
from r3mes_vllm.errors import AdapterError, AdapterRefused, ConfigError, SourceFailed
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.http import exchange
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.ipfs.sources import KuboSource
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.wire import SYSTEM_PROMPT_CHARACTERS

_TOTAL_S = 1800.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9._-]{1,96})?")


async def publish(
    directory: Path, *, api: str | None, base: ModelShape | None = None
) -> tuple[CID, Adapter]:
    """Vet the adapter in `directory`, add it to the daemon at `api`, if one is given, and pin it
    there; its CID, and what vetting read.

    Raises AdapterRefused for what no node would serve, and AdapterError when the daemon fails.
    """
    if not directory.is_dir():  # noqa: ASYNC240 - a local file, asked once
        raise AdapterRefused(
            "files_are_there",
            f"{directory} is not a directory",
            hint="give the folder that PEFT's save_pretrained wrote",
        )
    facts = await asyncio.to_thread(vet, directory, base=base, follow_links=True)
    with tempfile.TemporaryDirectory() as name:
        packed = Path(name) / "adapter.car"
        cid = await asyncio.to_thread(pack, directory, packed, linked=FILES)
        if api is not None:
            await _pinned(cid, packed, api)
    return cid, facts


async def _pinned(cid: CID, packed: Path, api: str) -> None:
    """Raises AdapterError."""
    # The daemon answers when it has taken all: until then no byte comes.
    async with exchange(Limits(stall_s=_TOTAL_S, total_s=_TOTAL_S)) as connections:
        daemon = KuboSource(api)
        try:
            await daemon.import_car(packed, connections)
            await daemon.pin(cid, connections)
        except SourceFailed as error:
            raise AdapterError(
                f"the IPFS daemon did not take {cid}: {error}",
                hint="is it running? ipfs daemon; --ipfs-api names another, and --no-daemon does "
                "without",
            ) from error


def read_system_prompt(given: str) -> str:
    """The text itself, or that of the file after an `@`. Raises ConfigError."""
    if given.startswith("@"):
        try:
            given = Path(given[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: `~nobody`
            raise ConfigError(
                f"can't read the system prompt: {error}", hint="--system-prompt @FILE, in UTF-8"
            ) from error
    if len(given) > SYSTEM_PROMPT_CHARACTERS:
        raise ConfigError(
            f"the system prompt has {len(given)} characters, {SYSTEM_PROMPT_CHARACTERS} are allowed"
        )
    return given


def public_name(base_model: str) -> str | None:
    """The name of a base model as anybody may know it; None for a folder of the author's."""
    return base_model if _HUB_NAME.fullmatch(base_model) else None
