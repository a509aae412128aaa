"""What the store knows of an adapter's files: their sizes, their hashes, and whether the disk has
them.

Nobody waits for the disk. An adapter is written through to it in the background, and until that is
done its manifest names the boot of the machine in which it came: in that one the kernel has all of
it, whichever process was killed; in a later one the files are hashed before they are trusted.
"""

import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS

MANIFEST = "manifest.json"
FILES = (CONFIG, WEIGHTS)
_BOOT = "only_written_in_boot"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def write(adapter: Path, cid: str, notes: Sequence[str]) -> None:
    """Of files that are not yet on the disk."""
    manifest = {
        "cid": cid,
        "fetched_at": time.time(),
        "notes": list(notes),
        "files": {name: measured(adapter / name) for name in FILES},
        _BOOT: boot_id(),
    }
    (adapter / MANIFEST).write_text(json.dumps(manifest, indent=1))


def read(adapter: Path) -> dict[str, Any] | None:
    """None if it can't be read."""
    try:
        manifest = json.loads((adapter / MANIFEST).read_bytes())
        complete = set(manifest["files"]) == set(FILES) and isinstance(manifest["notes"], list)
        return manifest if complete and isinstance(manifest["fetched_at"], float) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sizes_are_right(adapter: Path, manifest: dict[str, Any]) -> bool:
    try:
        return all(
            (adapter / name).stat().st_size == manifest["files"][name]["bytes"] for name in FILES
        )
    except (OSError, KeyError, TypeError):
        return False


def is_on_disk(manifest: dict[str, Any]) -> bool:
    return _BOOT not in manifest


def power_went(manifest: dict[str, Any]) -> bool:
    """Before the files were on the disk, perhaps."""
    return bool(manifest.get(_BOOT, boot_id()) != boot_id())


def problem(adapter: Path) -> str:
    """What is wrong with the files, or nothing."""
    manifest = read(adapter)
    if manifest is None:
        return f"its {MANIFEST} can't be read"
    for name in FILES:
        try:
            if measured(adapter / name) != manifest["files"][name]:
                return f"{name} is not what was fetched"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
    return ""


def measured(path: Path) -> dict[str, object]:
    # One thread: blake3's pool of them does not survive a fork, and one does gigabytes a second.
    digest = blake3().update_mmap(path).hexdigest()
    return {"bytes": path.stat().st_size, "blake3": digest}


def synchronise(adapter: Path) -> None:
    """Wait until the disk has it, and note that.

    Raises OSError when the disk can't take it; FileNotFoundError when it is dropped meanwhile.
    """
    folder = os.open(adapter, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        manifest = read(adapter)
        if manifest is None:
            raise FileNotFoundError(adapter / MANIFEST)
        # By the folder, not its path, where another may stand when this one is dropped.
        for name in (*FILES, "."):
            _fsync(name, folder)
        _fsync(adapter.parent)
        manifest.pop(_BOOT, None)
        with suppress(OSError):  # a disk that is full now: another time
            _replace(MANIFEST, json.dumps(manifest, indent=1), folder)
    finally:
        os.close(folder)


def _replace(name: str, text: str, folder: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with open(os.open(f".{name}", flags, 0o644, dir_fd=folder), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f".{name}", name, src_dir_fd=folder, dst_dir_fd=folder)
    _fsync(".", folder)


@cache
def boot_id() -> str:
    """The kernel's; where it can't be read one of each process, which makes it check more."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return str(uuid.uuid4())


def _fsync(path: Path | str, folder: int | None = None) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
