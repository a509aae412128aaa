import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.identity import Identity, access_key, is_derived

ACCOUNT = "y47umz2rjm3jhwugrjqlawskmmqe326ulwstdq"


def test_the_wallet_is_made_once_and_kept(tmp_path: Path) -> None:
    wallet = Identity.load(tmp_path / "state").wallet_address
    assert re.fullmatch(r"remes1[a-z0-9]{38}", wallet)
    assert Identity.load(tmp_path / "state").wallet_address == wallet
    assert Identity.load(tmp_path / "other").wallet_address != wallet


def test_only_the_owner_can_read_the_key(tmp_path: Path) -> None:
    Identity.load(tmp_path)
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["node.key"]


def test_processes_that_start_together_have_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        wallets = pool.map(lambda _: Identity.load(tmp_path).wallet_address, range(16))
    assert len(set(wallets)) == 1


def test_a_broken_key_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "node.key").write_text("not a key")
    with pytest.raises(ConfigError, match="private key"):
        Identity.load(tmp_path)
    assert (tmp_path / "node.key").read_text() == "not a key"


def test_the_backends_key_is_made_once_and_its_owners_only(tmp_path: Path) -> None:
    key = access_key(tmp_path / "state")
    assert access_key(tmp_path / "state") == key
    assert access_key(tmp_path / "other") != key
    assert stat.S_IMODE((tmp_path / "state" / "access.key").stat().st_mode) == 0o600


def test_a_broken_backends_key_is_an_error_that_does_not_show_it(tmp_path: Path) -> None:
    (tmp_path / "access.key").write_text("secret but short")
    with pytest.raises(ConfigError, match="access key") as caught:
        access_key(tmp_path)
    assert "secret" not in str(caught.value)


def test_a_derived_wallet_is_known_from_an_accounts_address(tmp_path: Path) -> None:
    assert is_derived(Identity.load(tmp_path).wallet_address)
    # BIP 173's checksum is right; with one letter changed it is not.
    account = "remes1" + ACCOUNT
    assert not is_derived(account)
    assert is_derived(account[:-1] + ("q" if account[-1] != "q" else "p"))
    for other in ("remes1" + "0" * 38, "remes1short", "remes" + "a" * 38):
        assert not is_derived(other)
