"""How much lies on a disk, and what its errors become."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from r3mes_vllm.errors import AdapterError, DiskFull, R3mesError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Of a disk that takes nothing, and of another user's folder."""

_ELSEWHERE = "point --cache-dir elsewhere"
_FREE_SOME = f"free some disk, or {_ELSEWHERE}"


@contextmanager
def disk_errors_are_said(folder: Path) -> Iterator[None]:
    """Raises DiskFull for the errors of a disk without room, and AdapterError for all others of
    what lies in `folder`."""
    try:
        yield
    except OSError as error:
        if said := _said(error, folder):
            raise said from error
        raise


def no_room(folder: Path, needed: int, *, hint: str = _FREE_SOME) -> DiskFull:
    """`needed` in bytes."""
    free = shutil.disk_usage(folder).free
    return DiskFull(
        f"no room left in {folder}: {needed} bytes are needed, {free} are free", hint=hint
    )


def _said(error: OSError, folder: Path) -> R3mesError | None:
    if error.errno in FULL:
        return DiskFull(f"no room left in {folder}", hint=_FREE_SOME)
    if error.errno is None or isinstance(error, TimeoutError | ConnectionError):
        return None
    if isinstance(error.filename, str) and not Path(error.filename).is_relative_to(folder):
        return None
    if error.errno == errno.EROFS:
        return AdapterError(
            f"the cache {folder} is read-only: nothing can be added to it or removed from it",
            hint=f"r3mes-vllm adapter list says what can be served from it; or {_ELSEWHERE}",
        )
    if error.errno in READ_ONLY:
        return AdapterError(
            f"this user may not use the cache {folder}: {error.filename or folder}: "
            f"{error.strerror}",
            hint=f"start as the user who owns it, or {_ELSEWHERE}",
        )
    return AdapterError(
        f"can't use the cache {folder}: {error.strerror}",
        hint=f"is its disk well? dmesg says more; or {_ELSEWHERE}",
    )


def bytes_in(folder: Path) -> int:
    """On disk, as far as it doesn't go away meanwhile."""
    total = 0
    # `rglob` ends with an error at a folder that another fetch moves away under it
    within = (
        os.path.join(parent, name)
        for parent, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )
    for path in (str(folder), *within):
        with suppress(FileNotFoundError, NotADirectoryError):
            total += os.lstat(path).st_blocks * 512
    return total
