"""What a full disk becomes."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r3mes_vllm.errors import StorageFull

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def full_disk_is_said(folder: Path) -> Iterator[None]:
    """Raises StorageFull for the errors of a disk without room."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFull(
            f"no room left in {folder}",
            hint="free some disk, or point --cache-dir elsewhere; what came so far is kept",
        ) from error
