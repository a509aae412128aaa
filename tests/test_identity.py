import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.identity import Identity


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
