"""Debian's Chromium without a window, driven over its DevTools protocol
(https://chromedevtools.github.io/devtools-protocol/). It can reach loopback addresses only.

One browser for all tests, in which each page has a profile of its own.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.programs import wait_until

PATIENCE_S = 20.0
_STARTS_S = 60
_KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "ArrowDown": (40, "")}
_MODIFIERS = {"Ctrl": 2, "Shift": 8}
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-port=0"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL at which the browser takes commands."""
    folder = tmp_path_factory.mktemp("chromium")
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [_program(), *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            env={k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = folder / "profile" / "DevToolsActivePort"
    try:
        wait_until(lambda: _lines(address) == 2, _STARTS_S, f"Chromium, see {log}")
        port, path = address.read_text().splitlines()
        yield f"ws://127.0.0.1:{port}{path}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _program() -> str:
    if not shutil.which("chromium") and os.geteuid() == 0:
        wait = "-oDPkg::Lock::Timeout=600"
        for what in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-qq", wait, *what], capture_output=True, timeout=900)
    found = shutil.which("chromium")
    if not found:
        pytest.fail("the tests need a browser: apt-get install chromium")
    return found


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


class Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[str] = []
        """What the console shows as an error: exceptions, failed requests, breaches of policy."""
        self.requests: list[str] = []
        """Their URLs."""
        self._socket = socket
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: dict[str, str] = {}

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(
            {"id": number, "method": method, "params": parameters, **self._session}
        )
        async with asyncio.timeout(PATIENCE_S):
            result: dict[str, Any] = await answer
            return result

    async def attach(self, target: str, profile: str) -> None:
        self.profile = profile
        found = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            await self.call(f"{domain}.enable")

    async def go(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def evaluate(self, expression: str) -> Any:
        found = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until it is true in the page."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not await self.evaluate(f"Boolean({expression})"):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"not within {PATIENCE_S} s: {expression}\n{text}") from None

    async def texts(self, selector: str) -> list[str]:
        """What is shown of each element."""
        quoted = json.dumps(selector)
        found: list[str] = await self.evaluate(
            f"[...document.querySelectorAll({quoted})].map(it => it.innerText.trim())"
        )
        return found

    async def press(self, *keys: str) -> None:
        """`Tab`, `Shift+Tab`, `a`, ..."""
        for each in keys:
            *held, key = each.split("+") if len(each) > 1 else [each]
            number, text = _KEYS.get(key, (ord(key[0].upper()), key))
            stroke = {
                "key": key,
                "windowsVirtualKeyCode": number,
                "modifiers": sum(_MODIFIERS[modifier] for modifier in held),
            }
            await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **stroke)
            await self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)

    async def write(self, text: str) -> None:
        """As if typed into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def like(self, *, width: int = 1280, **media: str) -> None:
        """A screen so many CSS pixels wide; `prefers_color_scheme="dark"`, ..."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": k.replace("_", "-"), "value": v} for k, v in media.items()]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def picture(self, file: Path) -> None:
        """All of the page, as PNG."""
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    async def tree(self) -> list[tuple[str, str]]:
        """Role and name of all that a screen reader finds."""
        nodes = (await self.call("Accessibility.getFullAXTree"))["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    async def listen(self) -> None:
        async for message in self._socket:
            said = message.json()
            if answer := self._waiting.pop(said.get("id", 0), None):
                if "error" in said:
                    answer.set_exception(AssertionError(said["error"]))
                else:
                    answer.set_result(said["result"])
            elif "method" in said:
                self._note(said["method"], said["params"])

    def _note(self, event: str, it: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(it["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(it["exceptionDetails"]))
        elif (event == "Runtime.consoleAPICalled" and it["type"] in ("error", "assert")) or (
            event == "Log.entryAdded" and it["entry"]["level"] == "error"
        ):
            self.errors.append(str(it))


@asynccontextmanager
async def opened(browser: str) -> AsyncIterator[Page]:
    """A blank page with a profile of its own, in the browser at `browser`."""
    async with (
        aiohttp.ClientSession(trust_env=False) as http,
        http.ws_connect(browser, max_msg_size=0) as socket,
    ):
        page = Page(socket)
        listening = asyncio.create_task(page.listen())
        try:
            profile = (await page.call("Target.createBrowserContext"))["browserContextId"]
            target = await page.call(
                "Target.createTarget", url="about:blank", browserContextId=profile
            )
            await page.attach(target["targetId"], profile)
            yield page
            page._session = {}
            await page.call("Target.disposeBrowserContext", browserContextId=profile)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
