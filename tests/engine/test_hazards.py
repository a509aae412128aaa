"""Of the table in docs/engine.md, what needs no engine of its own to be shown."""

from pathlib import Path

import pytest
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.platforms import current_platform

from r3mes_vllm.engine import launch, plugin
from r3mes_vllm.engine.sizes import Sizes
from r3mes_vllm.errors import UnknownAdapter
from r3mes_vllm.ipfs.cid import CID, RAW
from tests.engine.test_life import World

ROOT = Path(__file__).parents[2]
A = CID.of(RAW, b"a")


async def test_what_is_given_to_the_engine() -> None:
    """An absolute path with the CID in it, as in the name; and no loading in place."""
    world = World()
    version = await world.host.put("a", A)
    request = version.request
    assert request.lora_name == f"a@{A}"
    assert Path(request.lora_path).is_absolute()
    assert str(A) in request.lora_path
    assert not request.load_inplace
    await world.host.aclose()


@pytest.mark.parametrize("name", ["../x", "/etc", ".", "a/b", "~", "a@../x"])
async def test_a_path_is_no_name(name: str) -> None:
    world = World()
    with pytest.raises(UnknownAdapter):
        await world.host.load(name)
    assert not world.network.fetches
    plugin.register()
    assert not LoRAResolverRegistry.get_supported_resolvers()
    await world.host.aclose()


def test_nothing_is_pinned() -> None:
    """There is no RPC to unpin, and the engine dies when every slot is pinned."""
    sources = (ROOT / "r3mes_vllm").rglob("*.py")
    assert not [path for path in sources if "pin_lora" in path.read_text()]


def test_streams_have_time_to_end() -> None:
    line = launch.arguments(
        model="m", served_name="m", host="h", port=1, sizes=Sizes(1, 1, 8, ""), passed_on=[]
    )
    assert int(line[line.index("--shutdown-timeout") + 1]) >= 15


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU's wrapper")
def test_the_plugin_names_the_cpus_wrapper() -> None:
    plugin.register()
    assert current_platform.get_punica_wrapper() == plugin.CPU_WRAPPER
