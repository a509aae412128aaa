"""`r3mes-vllm config`, and the files to begin with."""

import json
from pathlib import Path

import pytest

from r3mes_vllm.settings import INTERNAL, Settings
from tests.cli.test_cli import run

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.toml"))
PAGES = ("configuration", "node", "backend", "adapters", "python")


def test_each_preset_is_taken_by_us_and_by_vllm(tmp_path: Path) -> None:
    """In one file, since asking vLLM's parser takes seconds."""
    assert {it.stem for it in PRESETS} == {
        *("laptop", "gpu-24gb", "gpu-80gb", "gpus-8", "ray", "backend"),
    }
    together = tmp_path / "together.toml"
    lines: dict[str, str] = {}
    for preset in PRESETS:
        found = run("config", "show", "--json", "--config", str(preset), cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        vllm = json.loads(found.stdout)["vllm"]["value"]
        lines |= {name: f"{name} = {json.dumps(value)}" for name, value in vllm.items()}
    together.write_text("\n".join(["[vllm]", *lines.values()]))
    found = run("config", "check", str(together), cwd=tmp_path)
    assert (found.returncode, found.stdout) == (0, f"{together}: ok\n")
    assert "without an API key" in found.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = 3\nlora = 'legal'\n", "model: Input should be a valid string"),
        ("model = 3\nlora = 'legal'\n", "unknown setting 'lora': did you mean loras?"),
        ("model = \n", "line 1"),
        ("[vllm]\nmax_loras = 3\n", "max_loras is set by `max_loras`"),
        ("[vllm]\nmax-model-length = 3\n", "did you mean max-model-len?"),
        ("[vllm]\nmax_model_len = 'many'\n", "--max-model-len: invalid"),
    ],
)
def test_a_mistake_in_a_file_is_said(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(text)
    found = run("config", "check", str(file), cwd=tmp_path)
    assert found.returncode == 2
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_it_shows_where_each_value_is_from(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('model = "m"\nbackend_port = 1\nloras = ["a"]\nadmin_key = "secret-1"\n')
    found = run(
        *("config", "show", "--json", "--config", str(file)),
        cwd=tmp_path,
        R3MES_LORAS="b,c",
        BACKEND_PORT="2222",
        R3MES_FALLBACK_KEY="secret-2",
        R3MES_IPFS_GATEWAYS="https://u:secret-3@gw.example/ipfs?token=secret-4",
    )
    shown = json.loads(found.stdout)
    assert shown["model"] == {"value": "m", "origin": str(file)}
    assert shown["loras"] == {"value": ["b", "c"], "origin": "R3MES_LORAS"}
    assert shown["backend_port"] == {"value": 2222, "origin": "BACKEND_PORT"}
    assert shown["load_wait"] == {"value": 20.0, "origin": "default"}
    assert shown["admin_key"]["value"] == shown["fallback_key"]["value"] == "***"
    assert shown["ipfs_gateways"]["value"] == ["https://gw.example/ipfs"]
    assert "secret" not in found.stdout
    assert not shown.keys() & set(INTERNAL)


def test_every_setting_is_written_of() -> None:
    text = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in PAGES)
    missing = [
        name
        for name in Settings.model_fields
        if name not in INTERNAL and name not in text and f"R3MES_{name.upper()}" not in text
    ]
    assert not missing
