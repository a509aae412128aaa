"""Keys: by their digest, from settings and from a file that is followed."""

import hashlib
import os
from pathlib import Path

import pytest

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.keys import Keys, presented


def hashed(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def test_a_file_holds_keys_as_they_are_or_hashed(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nplain\n  {hashed('secret')}\n")
    keys = Keys(["given", ""], file)
    assert len(keys) == 3
    assert all(map(keys.accept, (b"plain", b"secret", b"given")))
    assert not any(map(keys.accept, (b"", b"# ours", hashed("secret").encode(), b"other")))


def test_the_file_is_followed_and_opens_no_door_when_it_is_emptied(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = Keys((), file)
    another = tmp_path / "another"
    another.write_text(hashed("new"))
    os.replace(another, file)
    assert keys.accept(b"new")
    assert not keys.accept(b"old")
    file.write_text("")
    assert not keys.accept(b"new")
    assert keys.needed


@pytest.mark.parametrize("bad", ["sha256:12", "\xff"])
def test_a_file_that_got_unreadable_changes_nothing(
    tmp_path: Path, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text("key\n")
    keys = Keys((), file)
    file.write_bytes(bad.encode("latin-1"))
    assert all(keys.accept(b"key") for _ in range(3))
    assert capsys.readouterr().err.count("valid still") == 1
    file.unlink()
    assert keys.accept(b"key")
    with pytest.raises(ConfigError, match="can't read"):
        Keys((), file)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key\nsha256:XYZ\n")
    with pytest.raises(ConfigError, match="line 2"):
        Keys((), file)


def test_no_key_is_no_key(tmp_path: Path) -> None:
    """The SHA-256 of an unset variable in the file lets nobody in."""
    file = tmp_path / "keys"
    file.write_text(f"sha256:{hashlib.sha256(b'').hexdigest()}\n")
    with pytest.raises(ConfigError, match="line 1: that is the SHA-256 of an empty key"):
        Keys((), file)


def test_the_key_of_a_request() -> None:
    assert presented({"authorization": "Bearer a ", "x-api-key": "b"}) == b"a"
    assert presented({"authorization": "Basic a", "x-api-key": "b"}) == b"b"
    assert presented({"x-api-key": "sch\xfc"}) == b"sch\xfc"
