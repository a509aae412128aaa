"""The short form of `python -m tests.killed_nodes`: the clients of killed nodes don't notice."""

from pathlib import Path

import psutil

from tests.killed_nodes import Pair, asked, assert_whole, busy, certain, kill


async def test_nobody_notices_a_killed_node_while_there_is_another(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        expected = await certain(pair.backend)

        async with asked(pair.backend) as streams:
            processes = kill(pair.nodes.pop(await busy(streams)))
        _, alive = psutil.wait_procs(processes, timeout=15)
        assert not alive
        assert sum(it.moved for it in streams) >= 4
        assert_whole(streams, expected)

        async with asked(pair.backend) as streams:
            kill(pair.nodes.pop(await busy(streams)))
        broken = [it for it in streams if it.tokens is None]
        assert len(broken) >= 4
        assert not any(it.ended for it in broken)
