"""The state directory: a number says how it is laid out, and one node at a time uses it.

What is in it can't be fetched again: the node's key, hence its wallet. A step to a newer layout may
be broken off by a power cut at any point, and is then made again from its beginning.
"""

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from r3mes_vllm.errors import ConfigError, StateInUse

_VERSION = "version"
_LOCK = "node.lock"
_PLACE = "node.json"
_HINT = "set R3MES_STATE_DIR to a writable folder"

Step = Callable[[Path], None]

STEPS: Sequence[Step] = (
    # from 0, before there was a number, to 1: nothing else is different
    lambda folder: None,
)
"""The first brings version 0 to version 1, and so on. Each may be made twice."""


def prepare(folder: Path, steps: Sequence[Step] = STEPS) -> None:
    """Make the directory, or bring it to this version's layout.

    Raises ConfigError, with nothing touched, for one of a later version.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # another start may be at it
        found = refuse_newer(folder, steps)
        for number, step in enumerate(steps[found:], found + 1):
            step(folder)
            _write(folder, _VERSION, str(number))
            os.fsync(held)
    except OSError as error:
        raise _unusable(folder, error) from error
    finally:
        os.close(held)


def refuse_newer(folder: Path, steps: Sequence[Step] = STEPS) -> int:
    """The number of its layout, 0 where there is none. Raises ConfigError for a later version's."""
    found = _found(folder)
    if found > len(steps):
        raise ConfigError(
            f"{folder} was made by a newer r3mes-vllm: its layout is {found}, and {len(steps)} "
            "is the newest that this one knows",
            hint="upgrade r3mes-vllm, or set R3MES_STATE_DIR to another folder",
        )
    return found


@contextmanager
def used_by_a_node(folder: Path) -> Iterator[None]:
    """Raises StateInUse while another node uses it: two can't share a wallet; ConfigError.

    The lock is the process's own, so that neither children nor `exec` keep it.
    """
    try:
        held = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise _unusable(folder, error) from error
            other = os.read(held, 20).decode(errors="replace").strip() or "unknown"
            raise StateInUse(
                f"another node runs with the state directory {folder}: process {other}",
                hint="stop that one, or set R3MES_STATE_DIR and --port for a second node",
            ) from error
        os.ftruncate(held, 0)
        os.write(held, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(held)


def note_place(folder: Path, place: Mapping[str, object]) -> None:
    """Where the node of this folder listens: the settings that say so."""
    with suppress(OSError):  # on a full disk `status` has to be told
        _write(folder, _PLACE, json.dumps(place))


def noted_place(folder: Path) -> dict[str, object]:
    """What the last node of this folder noted; empty if there is nothing that can be read."""
    try:
        found = json.loads((folder / _PLACE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"can't use the state directory {folder}: {error.strerror}", hint=_HINT)


def _found(folder: Path) -> int:
    try:
        text = (folder / _VERSION).read_text(errors="replace").strip()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _unusable(folder, error) from error
    if not text.isascii() or not text.isdigit():
        raise ConfigError(
            f"{folder / _VERSION} is not the number of a layout: {text[:40]!r}",
            hint="restore it from a backup; without it the folder is taken for the oldest layout",
        )
    return int(text)


def _write(folder: Path, name: str, text: str) -> None:
    for left in folder.glob(f".{name}.*"):  # by a start that was broken off
        left.unlink()
    fd, aside = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    with open(fd, "w") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, folder / name)
