"""The weights of a hub's model on their way: vLLM fetches them at its start, without a word."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_FIRST = (".safetensors", ".bin")
"""The kinds of weights, in the order in which vLLM looks for them."""
_ELSEWHERE = ("--download-dir", "--load-format")
"""With these of vLLM's options it looks into another folder, or fetches others."""
_ASKING_S = 5.0
_LINE_S = 15.0
_STILL = 20
"""Lines' times without a byte after which nothing more is expected."""


def follow(model: str, command_line: Sequence[str], say: Callable[[str], None]) -> None:
    """Say what vLLM with this `command_line` has yet to fetch of `model`, and from then on how far
    that is; nothing where the weights are here."""
    if Path(model).is_dir() or any(it.startswith(_ELSEWHERE) for it in command_line):
        return
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(HF_HUB_CACHE, repo_folder_name(repo_id=model, repo_type="model"))
    if HF_HUB_OFFLINE or are_here(folder):
        return
    total = size_at_hub(model)
    of = f"{total / 1e9:.1f} GB of weights" if total else "the weights"
    say(f"engine: first {of} of {model} are fetched into {HF_HUB_CACHE}")
    threading.Thread(
        target=watch, args=(folder / "blobs", total, say), name="weights", daemon=True
    ).start()


def are_here(folder: Path) -> bool:
    """In `folder`, of one model in the hub's cache, all of them."""
    begun = any(folder.glob("blobs/*.incomplete"))
    return not begun and any(any(folder.glob(f"snapshots/*/*{kind}")) for kind in _FIRST)


def size_at_hub(model: str, endpoint: str | None = None) -> int | None:
    """Bytes of weights; None if the hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        found = HfApi(endpoint=endpoint).model_info(model, files_metadata=True, timeout=_ASKING_S)
    except (HTTPError, OSError, ValueError):
        return None
    files = [it for it in found.siblings or () if "/" not in it.rfilename]
    for kind in _FIRST:
        if size := sum(it.size or 0 for it in files if it.rfilename.endswith(kind)):
            return size
    return None


def watch(
    blobs: Path, total: int | None, say: Callable[[str], None], *, every_s: float = _LINE_S
) -> None:
    """Say how much is in `blobs`, as long as it grows, until that is `total` bytes."""
    before, still, pause = -1, 0, threading.Event()
    while still < _STILL and (total is None or before < total):
        pause.wait(every_s)
        now = _bytes(blobs)
        still = 0 if now > before else still + 1
        if now > max(before, 0):
            of = f" of {total / 1e9:.1f}" if total else ""
            say(f"  weights: {now / 1e9:.1f}{of} GB")
        before = max(now, before)


def _bytes(blobs: Path) -> int:
    """On the disk: a file that is being fetched may have its whole length from the beginning."""
    found = 0
    for it in blobs.glob("*"):
        with suppress(FileNotFoundError):  # it has come whole, and got its name
            found += it.stat().st_blocks * 512
    return found
