"""The dashboard in a real browser: how it looks, by keyboard, and for a screen reader."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.backend.browsing import Pair, Speaker, ask, spotless
from tests.backend.conftest import StartNode
from tests.backend.signing import SigningNode
from tests.backend.stand_ins import LEGAL_CID, OTHER_CID, Network, StandIn, unused_port
from tests.peers.chromium import Page

CONTRAST = """(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((it) => it / 255)
    .map((it) => (it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4))
    .reduce((sum, it, index) => sum + it * [0.2126, 0.7152, 0.0722][index], 0);
  const over = (top, under) => {
    const alpha = top[3] ?? 1;
    return under.map((it, index) => top[index] * alpha + it * (1 - alpha));
  };
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    return over(channels(getComputedStyle(element).backgroundColor), behind(element.parentElement));
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((it) => it.nodeType === 3 && it.data.trim());
    if (!own && !element.matches("input, textarea")) continue;
    if (!element.checkVisibility() || element.matches(":disabled, noscript")) continue;
    const style = getComputedStyle(element);
    const ground = behind(element);
    const [a, b] = [light(channels(style.color)), light(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([Number(ratio.toFixed(2)), element.tagName, element.className, element.textContent]);
  }
  return found;
})()"""
"""Ratio by https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio of each element with a text."""

AA = 4.5


async def crowd(network: Network, start_node: StartNode) -> None:
    """One node of each health."""
    await network.register_lora("legal", OTHER_CID, description="On contracts", category="law")
    await network.register_lora("legal", LEGAL_CID, description="On contracts", category="law")
    await network.register_lora("medical", OTHER_CID, description="On fevers", category="health")
    held = {"adapters": {"legal": LEGAL_CID}, "base_model": "SmolLM2-135M-Instruct"}
    known: dict[str, Any] = {"version": "0.1.0", **held}
    await network.register("http://127.0.0.1:1", number=6, **known)
    network.clock.forward(75)
    await network.register(f"http://127.0.0.1:{unused_port()}", "ghost", number=5)
    await network.http.post("/chat", json={"message": "hi", "lora_name": "ghost"})
    network.clock.forward(1)
    speaker = Speaker(("A contract ", "is an agreement ", "that binds."))
    speaker.go.set()
    node = await start_node(StandIn(speaker))
    await network.register(node, "legal", "medical", number=1, **known)
    other = known | {"adapters": {"legal": OTHER_CID}}
    await network.register("http://127.0.0.1:2", "legal", number=2, **other)
    await network.register("http://127.0.0.1:3", "legal", number=3, **known)
    await network.beat(3, status="draining", current_load=4)
    signing = SigningNode(network)
    await signing.register(f"http://127.0.0.1:{unused_port()}", "legal", **known)
    await signing.settled()


@pytest.mark.parametrize(
    ("look", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)]
)
async def test_it_is_readable_in_every_light_and_on_a_phone(
    network: Network, start_node: StartNode, page: Page, tmp_path: Path, look: str, width: int
) -> None:
    await crowd(network, start_node)
    await page.like(width=width, prefers_color_scheme=look)
    await page.go(network.url)
    healths = {"live", "stale", "draining", "unproven", "ejected"}
    assert set(await page.texts(".health")) == healths
    await page.until("document.querySelector('.line').getAttribute('d')?.length > 100")
    await ask(page, "legal", "SmolLM2-135M-Instruct")
    await page.until("document.querySelectorAll('.answer[aria-busy=false]').length === 2")
    await page.picture(tmp_path / f"{look}-{width}.png")
    ratios = await page.evaluate(CONTRAST)
    assert len(ratios) > 50
    assert [it for it in ratios if it[0] < AA] == []
    widths = "[innerWidth, document.documentElement.scrollWidth <= innerWidth]"
    assert await page.evaluate(widths) == [width, True]
    cells = "[...document.querySelectorAll('tbody td')].map((it) => it.clientWidth)"
    assert min(await page.evaluate(cells)) > (300 if width < 400 else 60)
    dark = await page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor")
    assert (dark == "rgb(15, 19, 18)") == (look == "dark")
    spotless(page, network)


async def test_the_theme_can_be_chosen_and_is_kept(pair: Pair, page: Page) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    await page.like(prefers_color_scheme="light")
    await page.go(pair.network.url)
    system = await page.evaluate(ground)
    seen = []
    for _ in range(3):
        await page.evaluate("document.querySelector('#theme').click()")
        seen.append((await page.texts("#theme"), await page.evaluate(ground) == system))
    assert seen == [(["Theme: light"], True), (["Theme: dark"], False), (["Theme: system"], True)]
    await page.evaluate("document.querySelector('#theme').click()")
    await page.evaluate("document.querySelector('#theme').click()")
    await page.go(pair.network.url + "/?again")
    assert await page.texts("#theme") == ["Theme: dark"]
    assert await page.evaluate(ground) != system


async def test_motion_is_reduced_for_whom_it_should_be(pair: Pair, page: Page) -> None:
    moving = """[...document.querySelectorAll("*")].flatMap((it) => {
      const style = getComputedStyle(it);
      return [style.transitionDuration, style.scrollBehavior];
    }).filter((it) => !/^(0s|auto)/.test(it)).length"""
    for asked, some in (("no-preference", True), ("reduce", False)):
        await page.like(prefers_reduced_motion=asked)
        await page.go(f"{pair.network.url}/?{asked}")
        assert bool(await page.evaluate(moving)) == some


async def test_the_tables_are_there_without_javascript(pair: Pair, page: Page) -> None:
    await page.call("Emulation.setScriptExecutionDisabled", value=True)
    await page.call("Page.navigate", url=pair.network.url)
    await wait_for_role(page, "noscript")
    tree = await page.tree()
    text = " ".join(name for _, name in tree)
    for part in (
        "legal",
        "On contracts",
        "tiny-base",
        "live",
        "http://127.0.0.1",
        "need JavaScript",
    ):
        assert part in text
    assert [name for role, name in tree if role == "table"] == ["Nodes", "Adapters"]
    assert not {"textbox", "button"} & {role for role, _ in tree}


async def wait_for_role(page: Page, what: str) -> None:
    async with asyncio.timeout(20):
        while not any("need JavaScript" in name for _, name in await page.tree()):
            await asyncio.sleep(0.05)


NAMED = {"button", "textbox", "spinbutton", "checkbox", "link", "img", "image", "table", "region"}
NAMED |= {"navigation", "columnheader", "rowheader"}


@pytest.mark.parametrize("width", [1280, 390])
async def test_a_screen_reader_finds_its_way(pair: Pair, page: Page, width: int) -> None:
    await page.like(width=width)
    await page.go(pair.network.url)
    await page.until("document.querySelector('.line').getAttribute('d')?.length > 100")
    tree = await page.tree()
    assert [it for it in tree if it[0] in NAMED and not it[1]] == []
    roles = [role for role, _ in tree]
    for landmark in ("banner", "main", "navigation", "contentinfo"):
        assert roles.count(landmark) == 1
    names = [name for role, name in tree if role == "region"]
    assert [name.split()[0] for name in names] == ["Throughput", "Nodes", "Adapters", "Playground"]
    assert [name for role, name in tree if role == "table"] == ["Nodes", "Adapters"]
    headers = [name for role, name in tree if role == "columnheader"]
    assert headers[:6] == ["Node", "Health", "Load", "Adapters", "Version", "Last beat"]
    assert len([role for role in roles if role == "rowheader"]) == 3
    plots = [name for role, name in tree if role in ("img", "image") and "five minutes" in name]
    assert len(plots) == 3
    assert "Requests a second, the last five minutes: now 0/s" in plots[0]
    boxes = [name for role, name in tree if role == "textbox"]
    assert boxes == ["Prompt", "API key"]
    assert ("button", "Copy the CID of legal") in tree
    assert ("checkbox", "legal adapter") in tree
    assert ("group", "Who answers up to four") in tree
    live = await page.evaluate(
        "[...document.querySelectorAll('[aria-live], [role=status], [role=alert], output')]"
        ".map(it => it.getAttribute('role'))"
    )
    assert live == ["status", "status"]  # both polite


FOCUS = """(() => {
  const it = document.activeElement;
  const ring = it.closest(".choice") ?? it;
  const style = getComputedStyle(ring);
  return [it.id || it.name || it.textContent.trim(), style.outlineStyle, style.outlineWidth];
})()"""


async def test_all_of_it_works_by_keyboard(pair: Pair, page: Page) -> None:
    await page.go(pair.network.url)
    walked = []
    for _ in range(40):
        await page.press("Tab")
        name, style, thickness = await page.evaluate(FOCUS)
        assert (style, thickness) == ("solid", "3px"), name
        walked.append(name)
        if name == "Ask":
            break
    assert walked[0] == "Skip to the content"
    assert walked[1:6] == ["Throughput", "Nodes", "Adapters", "Playground", "theme"]
    end = ["model", "model", "model", "prompt", "max-tokens", "temperature", "key", "Ask"]
    assert walked[-len(end) :] == end
    await page.press(*["Shift+Tab"] * 4)
    assert (await page.evaluate(FOCUS))[0] == "prompt"
    await page.press("Shift+Tab", " ")  # the third model, which was not chosen
    chosen = "document.querySelectorAll('[name=model]:checked').length"
    assert await page.evaluate(chosen) == 3
    await page.press(" ", "Tab")
    await page.write("Who is it? ")
    await page.press("Ctrl+Enter")
    await page.until("document.querySelectorAll('.answer').length === 2")
    await page.press(*["Tab"] * 5)
    assert (await page.evaluate(FOCUS))[0] == "stop"
    await page.press("Enter")
    await page.until("document.querySelector('#progress').textContent.includes('stopped')")
    assert (await page.evaluate(FOCUS))[0] == "Ask"  # the focus is not lost with the button
    pair.go()
    await page.press("Enter")
    await page.until("document.querySelector('#progress').textContent.includes('3 tokens')")


async def test_the_page_keeps_itself_up_to_date(
    pair: Pair, start_node: StartNode, page: Page
) -> None:
    network = pair.network
    await page.go(network.url)
    await page.until("document.querySelector('.line').getAttribute('d')?.length > 100")
    await page.evaluate("document.querySelector('#node-rows').firstElementChild.id = 'same'")
    network.clock.forward(30)
    await network.beat(2)
    network.clock.forward(31)
    await network.register_lora("new", OTHER_CID)
    await page.until("document.querySelector('#node-rows [data-health=stale]')")
    await page.until("document.querySelectorAll('#adapter-rows > tr').length === 2")
    assert await page.texts("h1") == ["1 of 2 nodes takes requests"]
    assert await page.texts("#same [data-field=reason]") == ["Taken for dead: no beat for 61 s."]
    pair.go()
    await ask(page, "legal")
    await page.until("document.querySelector('.answer[aria-busy=false]')")
    await page.until(
        "document.querySelector('#adapter-rows [data-label=Requests]').textContent === '1'"
    )
    highest = "document.querySelector('[data-series=bytes] svg').ariaLabel"
    await page.until(f"/at most [1-9]/.test({highest})")
    spotless(page, network)


async def test_it_says_so_when_the_router_is_gone(network: Network, page: Page) -> None:
    await network.register_lora("legal")
    await page.go(network.url)
    await page.call("Network.setBlockedURLs", urls=["*/dashboard/data"])
    await page.until("document.querySelector('#notice').textContent.includes('be reached')")
    assert "legal" in (await page.texts("#adapter-rows"))[0]
    await page.call("Network.setBlockedURLs", urls=[])
    await page.until("document.querySelector('#notice').textContent === ''")


@pytest.mark.parametrize("secure", [True, False])
async def test_a_cid_can_be_copied_in_full(pair: Pair, page: Page, secure: bool) -> None:
    allowed = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    await page.call("Browser.grantPermissions", permissions=allowed, browserContextId=page.profile)
    await page.go(pair.network.url)
    await page.evaluate("window.clipboard = navigator.clipboard, clipboard.writeText('')")
    if not secure:  # as a page is without https, on another machine
        await page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined}), 0")
    await page.evaluate("document.querySelector('.copy').focus()")
    await page.press("Enter")
    await page.until("document.querySelector('.copy').textContent === 'Copied'")
    assert await page.evaluate("window.clipboard.readText()") == LEGAL_CID
    assert await page.evaluate("document.activeElement === document.querySelector('.copy')")
