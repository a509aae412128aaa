"""What is decided before the engine starts, and what the node refuses to be."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.plugins import load_endpoint_plugins

from r3mes_vllm.adapters.supply import Obtained, Supply
from r3mes_vllm.engine import launch
from r3mes_vllm.engine.model import shape_of, targets_of
from r3mes_vllm.errors import AdapterRefused, ConfigError
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.node import adapters
from r3mes_vllm.node.app import NodeEndpoints
from r3mes_vllm.settings import Settings, load
from r3mes_vllm.wire import Lora

BAD, GOOD, MORE = (CID.of(RAW, text) for text in (b"bad", b"good", b"more"))


class OneIsBad:
    """A supply that refuses BAD."""

    def __init__(self) -> None:
        self.asked: list[CID] = []

    async def obtain(self, where: IpfsPath, progress: object = None) -> Obtained:
        self.asked.append(where.root)
        if where.root == BAD:
            raise AdapterRefused("finite", "it is full of NaN")
        facts: Any = SimpleNamespace(warnings=(), notes=())
        return Obtained(where.root, cast(Any, None), facts, fetched=True)


async def listed(settings: Settings) -> list[Lora]:
    return [
        Lora(id=number, name=name, ipfs_hash=str(cid))
        for number, (name, cid) in enumerate({"bad": BAD, "good": GOOD, "more": MORE}.items())
    ]


@pytest.mark.parametrize(
    ("policy", "served", "asked"),
    [("first", ["good"], [BAD, GOOD]), ("all", ["good", "more"], [BAD, GOOD, MORE])],
)
async def test_the_first_that_can_be_had_is_served(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    served: list[str],
    asked: list[CID],
) -> None:
    monkeypatch.setattr(adapters, "_registry", listed)
    supply = OneIsBad()
    settings = load({"state_dir": tmp_path, "lora_policy": policy})
    named = await adapters.obtain_all(settings, cast(Supply, supply))
    assert [it.name for it in named] == served
    assert supply.asked == asked


@pytest.mark.parametrize("tasks", [("generate",), ("embed",), ()])
def test_the_guard_stands_before_every_kind_of_model(
    monkeypatch: pytest.MonkeyPatch, tasks: Any
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "r3mes")
    assert [type(it) for it in load_endpoint_plugins(tasks)] == [NodeEndpoints]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--lora-target-modules", "q_proj", "o_proj", "--dtype", "float32"],
        ["--seed=1", "--lora_target_modules", "o_proj", "v_proj"],
        load({"vllm": {"lora_target_modules": ["q_proj", "o_proj"]}}).vllm_arguments,
    ],
)
def test_the_base_model_takes_adapters_where_vllm_was_told(
    tiny_model: Path, options: list[str]
) -> None:
    args = launch._parser().parse_args(["--model", str(tiny_model), *options])
    assert targets_of(options) == args.lora_target_modules  # which is known before vLLM is there
    shape = shape_of(args.model, "tiny", args.lora_target_modules)
    assert shape.modules
    for module in shape.modules:
        assert shape.takes(module) == (not options or "self_attn" in module)


async def test_a_model_that_generates_nothing_is_refused() -> None:
    async def tasks() -> tuple[str, ...]:
        return ("embed",)

    engine = SimpleNamespace(get_supported_tasks=tasks)
    with pytest.raises(ConfigError, match="an-encoder generates no text"):
        await NodeEndpoints().init_state(
            engine, cast(Any, None), Namespace(api_server_count=1, model="an-encoder")
        )
