"""Archives that a stranger made: unpacked under limits, whole or not at all, and nowhere else."""

import gc
import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r3mes_vllm.errors import BadArchive, ContentTooLarge
from r3mes_vllm.ipfs import archive, names
from r3mes_vllm.ipfs.tree import Limits

LIMITS = Limits(bytes=1 << 20, files=20, depth=4, name_length=50)
Entries = dict[str, bytes | None]


def tar(path: Path, entries: Entries, mode: str = "w") -> Path:
    with tarfile.open(path, "w:gz" if mode == "w:gz" else "w") as made:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type = tarfile.DIRTYPE
            else:
                entry.size = len(content)
            made.addfile(entry, io.BytesIO(content or b""))
    return path


def targz(path: Path, entries: Entries) -> Path:
    return tar(path, entries, "w:gz")


def zipped(path: Path, entries: Entries) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in entries.items():
            made.writestr(zipfile.ZipInfo(name), content or b"")
    return path


MAKERS = pytest.mark.parametrize("make", [tar, targz, zipped])
Make = Callable[[Path, Entries], Path]


def unpacked(path: Path, limits: Limits = LIMITS) -> dict[str, bytes]:
    into = path.with_name("into")
    archive.unpack(path, into, limits)
    return {str(it.relative_to(into)): it.read_bytes() for it in into.rglob("*") if it.is_file()}


def refused(path: Path, error: type[Exception] = BadArchive, match: str = ".") -> None:
    with pytest.raises(error, match=match) as caught:
        archive.unpack(path, path.with_name("into"), LIMITS)
    assert path.name in str(caught.value)
    assert [it.name for it in path.parent.iterdir()] == [path.name]


@MAKERS
def test_what_was_packed_comes_out(make: Make, tmp_path: Path) -> None:
    entries: Entries = {"a/": None, "a/b/c": b"x" * 1000, "./d": b"", "a..b": b"1", "Größe": b"2"}
    assert unpacked(make(tmp_path / "x", entries)) == {
        "a/b/c": b"x" * 1000,
        "d": b"",
        "a..b": b"1",
        "Größe": b"2",
    }


@MAKERS
def test_what_systems_leave_in_archives_is_left_out(make: Make, tmp_path: Path) -> None:
    entries: Entries = {"a": b"1", "._a": b"2", ".DS_Store": b"3", "__MACOSX/a": b"4"}
    assert unpacked(make(tmp_path / "x", entries)) == {"a": b"1"}


@MAKERS
@pytest.mark.parametrize(
    "bad",
    ["../x", "a/../../x", "/etc/x", "C:/x", "a\\b", "a/..", "a\nb", "x" * 51, "\\\\host\\x"],
)
def test_names_that_lead_elsewhere_are_refused(make: Make, bad: str, tmp_path: Path) -> None:
    refused(make(tmp_path / "x", {"ok": b"1", bad: b"2"}))


@MAKERS
def test_with_the_check_off_such_a_name_would_be_written(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "check_name", lambda name, longest: None)
    assert unpacked(make(tmp_path / "x", {"a\nb": b"1"})) == {"a\nb": b"1"}


@MAKERS
@pytest.mark.parametrize(
    ("twins", "said"),
    [
        (("a", "a"), "'a' stands twice"),
        (("readme.md", "README.md"), r"'README\.md' differs only by case .* from 'readme\.md'"),
        (("é", "e\u0301"), "differs only"),
        (("a/b", "A/B"), "differs only"),
        (("a", "a/b"), "'a/b' stands twice"),
        (("a/b", "a"), "'a' stands twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_that_are_one_file_are_refused(
    make: Make, twins: tuple[str, str], said: str, tmp_path: Path
) -> None:
    refused(
        make(tmp_path / "x", dict.fromkeys(twins, b"1"))
        if twins[0] != twins[1]
        else _doubled(make, tmp_path / "x"),
        match=said,
    )


def _doubled(make: Make, path: Path) -> Path:
    if make is zipped:
        with zipfile.ZipFile(path, "w") as made:
            made.writestr("a", b"1")
            made.writestr("a", b"2")
        return path
    with tarfile.open(path, "w:gz" if make is targz else "w") as tared:
        for _ in range(2):
            entry = tarfile.TarInfo("a")
            entry.size = 1
            tared.addfile(entry, io.BytesIO(b"1"))
    return path


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"S"],
)
def test_links_devices_and_the_like_are_refused(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x", "w") as made:
        entry = tarfile.TarInfo("a")
        entry.type, entry.linkname = kind, "/etc/passwd"
        made.addfile(entry)
    refused(tmp_path / "x", match="kind")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as made:
        entry = zipfile.ZipInfo("a")
        entry.external_attr = 0o120777 << 16
        made.writestr(entry, "/etc/passwd")
    refused(tmp_path / "x", match="link")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression_is_refused(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w", method) as made:
        made.writestr("a", "1" * 1000)
    refused(tmp_path / "x", match="compressed")


@MAKERS
@pytest.mark.parametrize(
    "entries",
    [
        {"a": b"x" * ((1 << 20) + 1)},
        {str(i): b"x" * (1 << 17) for i in range(9)},
        {str(i): b"" for i in range(21)},
        {"1/2/3/4/5/6": b""},
        {"/".join("abcde"): b"", **{str(i): b"" for i in range(18)}},
    ],
    ids=["one large", "many", "files", "deep", "folders count"],
)
def test_the_limits_hold(make: Make, entries: Entries, tmp_path: Path) -> None:
    refused(make(tmp_path / "x", entries), ContentTooLarge)


class Memory:
    """Python's peak within, in bytes."""

    def __enter__(self) -> "Memory":
        gc.collect()
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a", ".left-out"])
def test_a_bomb_stops_at_the_limit_and_stays_small(name: str, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "x", "wb", compresslevel=9) as file:
        header = tarfile.TarInfo(name)
        header.size = 1 << 28
        file.write(header.tobuf())
        for _ in range(256):
            file.write(bytes(1 << 20))
    with Memory() as memory:
        refused(tmp_path / "x", ContentTooLarge)
    assert memory.peak < 64 << 20


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_gigabytes_is_refused_before_it_is_read(kind: bytes, tmp_path: Path) -> None:
    header = tarfile.TarInfo("a")
    header.type, header.size = kind, 1 << 31
    with (tmp_path / "x").open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 31)
    with Memory() as memory:
        refused(tmp_path / "x", match="header of")
    assert memory.peak < 4 << 20


def test_global_headers_without_end_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        for number in range(100):
            file.write(tarfile.TarInfo.create_pax_global_header({f"k{number}": "v" * 10_000}))
        file.write(bytes(1024))
    refused(tmp_path / "x", match="global headers")


def test_headers_are_checked_by_newer_pythons_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the library calls `_frombuf`, past `frombuf` (gh-141707)."""
    monkeypatch.setattr(tarfile.TarInfo, "_frombuf", tarfile.TarInfo.frombuf, raising=False)
    header = tarfile.TarInfo("a")
    header.type = tarfile.FIFOTYPE
    with pytest.raises(BadArchive, match="unusual kind"):
        archive._Header._frombuf(header.tobuf(), "utf-8", "strict")


def test_a_list_of_members_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 1 << 30, 4, 0)
    with (tmp_path / "x").open("wb") as file:
        file.write(b"PK\3\4")
        file.seek((1 << 30) + 4)
        file.write(end)
    with Memory() as memory:
        refused(tmp_path / "x")
    assert memory.peak < 40 << 20


@MAKERS
def test_one_that_is_cut_short_is_refused(make: Make, tmp_path: Path) -> None:
    whole = make(tmp_path / "x", {"a": bytes(range(256)) * 200}).read_bytes()
    (tmp_path / "x").write_bytes(whole[: len(whole) // 2 if make is not tar else 30_000])
    refused(tmp_path / "x")


def test_a_zip_whose_content_is_damaged_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as made:
        made.writestr("a", b"content" * 100)
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data.replace(b"content", b"c0ntent", 1))
    refused(tmp_path / "x")


@pytest.mark.parametrize("data", [b"", b"x", b"PK\5\6", b"\x1f\x8b\x08", b"\x7fELF" + bytes(600)])
def test_what_is_no_archive(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    if archive.kind(tmp_path / "x") is not None:
        refused(tmp_path / "x")


@MAKERS
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1))
def test_a_changed_one_is_unpacked_or_refused_and_nothing_else_appears(
    make: Make, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    path = make(tmp_path / "x", {"a/b": b"content" * 50, "c": b"", "d/": None})
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at % len(data)] = value
    path.write_bytes(data)
    into = tmp_path / "into"
    try:
        archive.unpack(path, into, LIMITS)
    except (BadArchive, ContentTooLarge):
        assert not into.exists()
    else:
        for it in sorted(into.rglob("*"), reverse=True):
            it.unlink() if it.is_file() else it.rmdir()
        into.rmdir()
    assert {it.name for it in tmp_path.iterdir()} == {"x"}
    path.unlink()


def with_pax(path: Path, data: bytes, content: bytes = b"12345") -> Path:
    """A tar.gz of one file with the extended header `data`."""
    header, entry = tarfile.TarInfo("././@PaxHeader"), tarfile.TarInfo("short")
    header.type, header.size, entry.size = tarfile.XHDTYPE, len(data), len(content)
    with gzip.open(path, "wb") as file:
        for it, body in ((header, data), (entry, content)):
            file.write(it.tobuf() + body + bytes(-len(body) % 512))
        file.write(bytes(1024))
    return path


def record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    length = len(text) + len(str(len(text) + 3))
    return f"{length}".encode() + text


def test_a_long_name_and_a_size_in_an_extended_header_count(tmp_path: Path) -> None:
    data = record("mtime", "1.5") + record("path", "a/Größe") + record("size", "5")
    assert unpacked(with_pax(tmp_path / "x", data)) == {"a/Größe": b"12345"}


@pytest.mark.parametrize("key", ["major", "map", "size", "realsize"])
def test_sparse_files_are_refused_before_their_map_is_read(key: str, tmp_path: Path) -> None:
    data = record("GNU.sparse.minor", "0") + record(f"GNU.sparse.{key}", "1")
    refused(with_pax(tmp_path / "x", data, b"9999\n" + b"0\n" * 10_000), match="sparse")


@pytest.mark.parametrize(
    "data",
    [
        b"2 " * 32_000 + b"=",  # for the library, 32,000 keys of up to 64 KB
        b"9" * 65_000,
        b"0 a=b\n",
        b"-6 a=b\n",
        b"7 a=b\n",
        b"a=b\n",
        record("size", "-1"),
    ],
    ids=range(7),
)
def test_a_malformed_extended_header_is_refused_at_once(data: bytes, tmp_path: Path) -> None:
    with Memory() as memory:
        refused(with_pax(tmp_path / "x", data))
    assert memory.peak < 4 << 20
