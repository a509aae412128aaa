"""What a check found, and running many at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from r3mes_vllm.errors import R3mesError

TIMEOUT_S = 10.0
"""For one check."""

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    status: Status
    message: str
    fix: str = ""
    """To be typed."""
    check: str = ""
    seconds: float = 0.0


Check = Callable[[], Awaitable[Finding]]


async def examine(
    checks: Mapping[str, Check],
    told: Callable[[Finding], None] = lambda finding: None,
    *,
    timeout_s: float = TIMEOUT_S,
) -> list[Finding]:
    """All at once, in the order of `checks`; `told` hears of each as it ends. What several fail of
    is said once."""
    failures: dict[str, str] = {}

    async def run(name: str, check: Check) -> Finding:
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                found = await check()
        except TimeoutError:
            found = Finding("fail", f"no result within {timeout_s:g} s", "r3mes-vllm doctor")
        except R3mesError as error:
            found = Finding("fail", str(error), error.hint)
            if (first := failures.setdefault(str(error), name)) != name:
                found = Finding("skip", f"fails as {first!r} does")
        except (OSError, ValueError) as error:
            found = Finding("fail", str(error)[:300] or type(error).__name__)
        found = replace(found, check=name, seconds=round(time.monotonic() - began, 3))
        told(found)
        return found

    return list(await asyncio.gather(*(run(name, check) for name, check in checks.items())))
