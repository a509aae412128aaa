"""Unpacking an archive that a stranger made: .tar, .tar.gz or .zip, told by its first bytes.

The standard library reads the formats; where and what is written is decided here. Declared sizes
are not believed: what comes out is counted.
"""

import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from r3mes_vllm.errors import BadArchive, ContentTooLarge
from r3mes_vllm.ipfs import names
from r3mes_vllm.ipfs.tree import Limits

_COPY = 1 << 18
_HEADER_LIMIT = 1 << 16
"""Of a tar's extended header: the library reads it as a whole."""

_GLOBAL_HEADERS = 16

_CATALOG_LIMIT = 16 << 20
"""Of a zip's central directory: the library reads it as a whole."""

_TAR_KINDS = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
_TAR_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1


def kind(path: Path) -> str | None:
    """`tar`, `tar.gz`, `zip`, or None for any other file."""
    with path.open("rb") as file:
        start = file.read(512)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if start[:3] == b"\x1f\x8b\x08":
        return "tar.gz"
    return "tar" if start[257:262] == b"ustar" else None


def unpack(archive: Path, into: Path, limits: Limits) -> None:
    """Unpack `archive` to the new directory `into`, which appears whole or not at all.

    Raises BadArchive, ContentTooLarge, and OSError when the disk fails.
    """
    aside = into.with_name(f".{into.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with _errors_named(archive):
            members = _zip_members(archive) if kind(archive) == "zip" else _tar_members(archive)
            _write(members, aside, limits)
        os.rename(aside, into)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


_Member = tuple[str, int, Callable[[], IO[bytes]] | None]
"""Its name, how many bytes it declares, and its content; None for a directory."""


class _Header(tarfile.TarInfo):
    """Refuses what is not to be read before the library reads it. One subclass an archive."""

    global_headers = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        return cls._checked(super().frombuf(buf, encoding, errors))

    @classmethod
    def _frombuf(cls, *arguments: Any, **named: Any) -> "_Header":
        """What newer CPythons call instead (gh-141707)."""
        return cls._checked(super()._frombuf(*arguments, **named))  # type: ignore[misc]

    @classmethod
    def _checked(cls, header: "_Header") -> "_Header":
        limit = _HEADER_LIMIT if header.type in _TAR_EXTENSIONS else None
        if header.type not in (*_TAR_KINDS, *_TAR_EXTENSIONS):
            raise BadArchive(f"{header.name[:80]!r} is a link, a device or of another unusual kind")
        if header.size < 0 or (limit is not None and header.size > limit):
            raise BadArchive(f"{header.name[:80]!r} has a header of {header.size} bytes")
        if header.type == tarfile.XGLTYPE:  # the library keeps what each of them says
            cls.global_headers += 1
            if cls.global_headers > _GLOBAL_HEADERS:
                raise BadArchive(f"it has more than {_GLOBAL_HEADERS} global headers")
        return header

    def _proc_pax(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """In place of the library's, which takes quadratic time and memory, and reads the map of a
        sparse file without end. Of what such a header says, a name and a size are used."""
        data = archive.fileobj.read(self._block(self.size))  # type: ignore[attr-defined]
        said = _pax_records(data[: self.size])
        if any(key.startswith(b"GNU.sparse.") for key in said):
            raise BadArchive(f"{self.name[:80]!r} is a sparse file")
        member = self.fromtarfile(archive)
        if self.type == tarfile.XGLTYPE:
            return member
        member.offset = self.offset
        if b"path" in said:
            member.name = said[b"path"].decode().rstrip("/")
        if b"size" in said:
            member.size = int(said[b"size"])
            if member.size < 0:
                raise BadArchive(f"{member.name[:80]!r} is of {member.size} bytes")
            content = member._block(member.size) if member.isreg() else 0  # type: ignore[attr-defined]
            archive.offset = member.offset_data + content
        return member


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Each is `LENGTH KEY=VALUE` and a newline, LENGTH that of it all (POSIX.1-2008, pax)."""
    found, at = {}, 0
    while at < len(data):
        space = data.find(b" ", at, at + len(str(_HEADER_LIMIT)) + 1)
        end = at + int(data[at:space])
        key, equals, value = data[space + 1 : end].partition(b"=")
        if not at < space < end <= len(data) or not equals or not value.endswith(b"\n"):
            raise BadArchive("it has a malformed header")
        found[key], at = value[:-1], end
    return found


def _tar_members(path: Path) -> Iterator[_Member]:
    header = type("_HeaderOfOne", (_Header,), {})
    # As a stream: the library can then never be led back to where it was.
    with (
        tarfile.open(path, "r|gz", tarinfo=header, errorlevel=2)
        if kind(path) == "tar.gz"
        else tarfile.open(path, "r|", tarinfo=header, errorlevel=2)
    ) as tar:
        for member in tar:
            if member.issparse() or member.type not in _TAR_KINDS:
                raise BadArchive(f"{member.name[:80]!r} is sparse or of an unusual kind")
            if member.isdir():
                yield member.name, 0, None
            else:
                yield member.name, member.size, partial(_content, tar, member)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    if content is None:
        raise BadArchive(f"{member.name[:80]!r} is no file")
    return content


class _Bounded:
    """A file of which nobody reads too much at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell, self.seekable = file.tell, file.seekable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            raise BadArchive("its list of members leads out of it") from error

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = _CATALOG_LIMIT + 1
        if size > _CATALOG_LIMIT + 1:
            raise BadArchive(f"its list of members is of {size} bytes")
        return self._file.read(size)


def _zip_members(path: Path) -> Iterator[_Member]:
    with path.open("rb") as file, zipfile.ZipFile(cast(IO[bytes], _Bounded(file))) as archive:
        for member in archive.infolist():
            form = stat.S_IFMT(member.external_attr >> 16)
            if form not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise BadArchive(f"{member.filename[:80]!r} is a link or of another unusual kind")
            if member.flag_bits & _ENCRYPTED or member.compress_type not in _ZIP_METHODS:
                raise BadArchive(f"{member.filename[:80]!r} is encrypted or compressed unusually")
            # what follows a NUL is cut from `filename`, so that is not what was written
            if "\0" in member.orig_filename:
                raise BadArchive(f"the name {member.orig_filename[:80]!r} holds control characters")
            if member.is_dir():
                yield member.filename, 0, None
            else:
                yield member.filename, member.file_size, partial(archive.open, member)


def _write(members: Iterable[_Member], folder: Path, limits: Limits) -> None:
    left, count = limits.bytes, 0
    taken: dict[tuple[str, ...], bool] = {}  # by folded names; True for a file
    spelled: dict[tuple[str, ...], str] = {}
    for text, size, content in members:
        count += 1
        if count > limits.files:
            raise ContentTooLarge(f"it holds more than {limits.files} files and folders")
        parts = _parts(text, limits)
        if not parts or any(_is_rubbish(part) for part in parts):
            left = _less(left, size, limits)  # to skip it, it is unpacked all the same
            continue
        key = tuple(names.folded(part) for part in parts)
        written = [taken.get(key[:depth]) for depth in range(1, len(key))]
        here = taken.get(key)
        if True in written or here or (here is False and content is not None):
            raise BadArchive(names.clash(text, spelled.get(key, text)))
        spelled[key] = text
        for depth in range(1, len(key) + (content is None)):
            if key[:depth] not in taken:
                count += depth < len(key)
                taken[key[:depth]] = False
                folder.joinpath(*parts[:depth]).mkdir()
        if content is not None:
            taken[key] = True
            with content() as source:
                left = _copy(source, folder.joinpath(*parts), left, limits)


def _parts(text: str, limits: Limits) -> list[str]:
    if text.startswith(("/", "\\")) or text[1:2] == ":":
        raise BadArchive(f"the name {text[:80]!r} is absolute")
    parts = [part for part in text.rstrip("/").split("/") if part != "."]
    if len(parts) > limits.depth + 1:
        raise ContentTooLarge(f"it is more than {limits.depth} directories deep")
    for part in parts:
        try:
            names.check_name(part, longest=limits.name_length)
        except ValueError as error:
            raise BadArchive(str(error)) from error
    return parts


def _is_rubbish(part: str) -> bool:
    """What macOS and editors leave; Kubo leaves hidden files out too."""
    return part.startswith(".") or part == "__MACOSX"


def _copy(source: IO[bytes], path: Path, left: int, limits: Limits) -> int:
    """The bytes that are left of the limit after it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o644), "wb") as file:
        while data := source.read(_COPY):
            left = _less(left, len(data), limits)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return left


def _less(left: int, size: int, limits: Limits) -> int:
    if size > left:
        raise ContentTooLarge(f"it unpacks to more than {limits.bytes} bytes")
    return left - size


@contextmanager
def _errors_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except (BadArchive, ContentTooLarge) as error:
        raise type(error)(f"{archive.name}: {error}") from error
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
    ) as error:
        raise BadArchive(f"{archive.name} can't be unpacked: {str(error)[:200]}") from error
