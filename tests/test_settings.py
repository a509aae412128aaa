"""Option over environment over file over default, and mistakes said with the nearest name."""

from pathlib import Path

import pytest

from r3mes_vllm import settings
from r3mes_vllm.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKEND_PORT", "R3MES_BACKEND_URL", "R3MES_MODEL", "R3MES_LORAS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text('model = "from-file"\nbackend_port = 1111\n[chat.keywords]\nlegal = ["sue"]\n')
    return path


def test_each_layer_wins_over_the_next(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.load().model is None
    assert settings.load(config=file).model == "from-file"
    monkeypatch.setenv("R3MES_MODEL", "from-environment")
    assert settings.load(config=file).model == "from-environment"
    assert settings.load({"model": "option"}, file).model == "option"
    assert settings.load({"model": None}, file).model == "from-environment"


def test_the_backends_port_is_a_setting_like_the_others(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.load().backend == "http://localhost:8000"
    assert settings.load(config=file).backend == "http://localhost:1111"
    monkeypatch.setenv("BACKEND_PORT", "2222")
    assert settings.load(config=file).backend == "http://localhost:2222"
    assert settings.load({"backend_port": 3333}, file).backend == "http://localhost:3333"
    monkeypatch.setenv("R3MES_BACKEND_URL", "https://network.example/")
    assert settings.load().backend == "https://network.example"


def test_an_empty_variable_is_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings.load().model_dump()
    for name in ("MODEL", "MAX_LORAS", "VLLM", "LORAS", "STATE_DIR", "ON_DEMAND", "CACHE_SIZE"):
        monkeypatch.setenv(f"R3MES_{name}", "")
    assert settings.load().model_dump() == before
    assert settings.load(config=file).model == "from-file"


def test_another_process_loads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings.load(
        {
            "loras": "a=bafy,b",
            "backend_port": 1234,
            "fallback": [],
            "cache_size": "2G",
            "insecure": True,
            "heartbeat_interval": 1.5,
            "chat": {"keywords": {"legal": ["sue"]}},
        }
    )
    for name, value in given.environ().items():
        monkeypatch.setenv(name, value)
    assert settings.load().model_dump() == given.model_dump()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("512M", 512 << 20), ("20G", 20 << 30), ("1.5 GiB", 3 << 29)],
)
def test_sizes(text: str, size: int) -> None:
    assert settings.load({"cache_size": text}).cache_size == size


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_size", "many"),
        ("cache_size", "1"),
        ("cache_size", "inf"),
        ("serving_node_port", "99999"),
        ("serving_node_port", "http"),
        ("heartbeat_interval", "60"),
        ("backend_url", "localhost:8000"),
        ("ipfs_gateways", "ipfs.io"),
        ("ipfs_gateways", "https://"),
        ("wallet_address", "0xabc"),
        ("max_lora_rank", "0"),
        ("cache_dir", "~nobody-here/x"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        settings.load({name: value})
    assert value in str(caught.value)


def test_a_wrong_key_is_never_printed() -> None:
    with pytest.raises(ConfigError) as caught:
        settings.load({"admin_key": ["hunter2"]})
    assert "hunter2" not in str(caught.value)


def test_a_token_in_a_gateways_url_is_never_printed() -> None:
    for wrong in ("ipfs.io?token=hunter2", "user:hunter2@ipfs.io", "http://ok/?a=hunter2,ipfs.io"):
        with pytest.raises(ConfigError, match="must begin with http") as caught:
            settings.load({"ipfs_gateways": wrong})
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["model = ", "modle = 'x'", "[chat]\nkeywords = 5"])
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings.load(config=path)
    assert str(path) in f"{caught.value} {caught.value.hint}"
    if "modle" in text:
        assert "did you mean model?" in str(caught.value)


def test_a_misspelt_variable_is_reported_with_the_nearest_name() -> None:
    said = settings.misspelt({"R3MES_BACKND_URL": "x", "R3MES_MODEL": "y", "HOME": "/"})
    assert said == ["unknown variable R3MES_BACKND_URL: did you mean R3MES_BACKEND_URL?"]


def test_the_public_url_is_found_from_host_and_port() -> None:
    assert settings.load().public_url == "http://localhost:8081"
    here = settings.load({"serving_node_host": "::1", "serving_node_port": 9})
    assert here.public_url == "http://[::1]:9"
    given = settings.load({"serving_node_url": "https://me.example/"})
    assert given.public_url == "https://me.example"


def test_a_mistake_is_told_in_its_own_words() -> None:
    with pytest.raises(ConfigError) as caught:
        settings.load({"cache_size": "12Q"})
    assert str(caught.value).startswith("cache_size: '12Q' is not a size such as 512M or 20G")
