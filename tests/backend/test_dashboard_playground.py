"""The dashboard's playground in a real browser, and strangers' texts there."""

import json

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from r3mes_vllm.backend.dashboard import page as html
from r3mes_vllm.backend.dashboard import routes
from tests.backend.browsing import HOSTILE, Pair, Speaker, ask, choose, event, spotless
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.elsewhere import TEXT, Elsewhere
from tests.backend.stand_ins import LEGAL_CID, DiesAfter, Network, StandIn
from tests.peers.chromium import Page


async def test_answers_stream_side_by_side(pair: Pair, page: Page) -> None:
    await page.go(pair.network.url)
    assert await page.texts(".choice") == [
        "other-base\nbase model",
        "tiny-base\nbase model",
        "legal\nadapter",
    ]
    await ask(page, "tiny-base", "legal")
    partial = "[...document.querySelectorAll('.text')].map(it => it.textContent).join() === 'Ba,Le'"
    await page.until(partial)
    busy = "document.querySelectorAll('.answer[aria-busy=true]').length"
    assert await page.evaluate(busy) == 2
    assert await page.texts("#progress") == ["tiny-base and legal: answering"]
    pair.go()
    await page.until("document.querySelectorAll('.answer[aria-busy=false]').length === 2")
    assert await page.texts(".text") == ["Base.", "Legal advice."]
    assert await page.texts(".answer h3") == ["tiny-base", "legal"]
    assert await page.texts("#progress") == ["tiny-base: 2 tokens. legal: 3 tokens"]
    assert await page.texts("dd[data-field=tokens]") == ["2", "3"]
    for text in await page.texts("dd[data-field=first]"):
        assert text.removesuffix(" ms").isdecimal()
    for text in await page.texts("dd[data-field=rate]"):
        assert float(text) > 0
    assert [it.split("0")[0] for it in await page.texts(".from")] == ["from remes1"] * 2
    spotless(page, pair.network)


async def test_one_of_two_may_fail(pair: Pair, start_node: StartNode, page: Page) -> None:
    """And be told as text: a refusal, an end without an end, an error within the stream."""
    begun = event({"choices": [{"index": 0, "delta": {"content": "Once"}}]}).encode()
    events = {"content-type": "text/event-stream"}
    error = event({"error": {"message": f"broken {HOSTILE}"}}).encode()

    async def breaks_off(request: Request) -> Response:
        return Response(begun, headers=events)

    async def is_wrong(request: Request) -> Response:
        return Response(begun + error, headers=events)

    async def dies(request: Request) -> Response:
        return DiesAfter(begun, headers=events)

    async def refuses(request: Request) -> Response:
        return JSONResponse({"error": {"message": f"not that {HOSTILE}"}}, 400)

    bad = {"ends": breaks_off, "errs": is_wrong, "dies": dies, "refuses": refuses}
    for number, (name, behaviour) in enumerate(bad.items(), 3):
        url = await start_node(StandIn(behaviour))
        await pair.network.register(url, name, number=number)
    pair.go()
    await page.go(pair.network.url)
    await page.until("document.querySelectorAll('.choice').length === 7")
    await ask(page, *bad)
    await page.until("document.querySelectorAll('.answer[aria-busy=false]').length === 4")
    said = dict(
        zip(await page.texts(".answer h3"), await page.texts(".answer .error"), strict=True)
    )
    assert said["ends"] == "Error: the answer broke off before its end"
    assert said["errs"] == f"Error: broken {HOSTILE}"
    assert said["dies"].startswith("Error: ")
    assert said["refuses"] == f"Error: not that {HOSTILE}"
    assert (await page.texts("#progress"))[0].count("failed") == 4
    assert await page.evaluate("window.pwned === undefined")
    await ask(page, "legal")
    await page.until("document.querySelectorAll('.answer[aria-busy=false]').length === 1")
    assert await page.texts(".answer .error") == [""]


async def test_an_answer_from_elsewhere_says_so(
    start_backend: StartBackend, start_node: StartNode, page: Page
) -> None:
    network = await start_backend(fallback_url=await start_node(Elsewhere()))
    await network.register_lora("legal")
    await page.go(network.url)
    await ask(page, "legal")
    await page.until("document.querySelector('.answer[aria-busy=false]')")
    assert await page.texts(".answer .text") == [TEXT]
    assert await page.texts(".from") == ["not from the network: from url, big"]


async def test_no_more_than_four_answer_at_once(
    network: Network, start_node: StartNode, page: Page
) -> None:
    await network.register(await start_node(StandIn()), *"abcde")
    await page.go(network.url)
    await choose(page, *"abcd")
    await page.evaluate("document.querySelector('[value=e]').click()")
    assert not await page.evaluate("document.querySelector('[value=e]').checked")
    assert await page.texts("#progress") == ["At most 4 answer at a time."]
    await ask(page)
    assert await page.texts("#progress") == ["Choose who answers."]


async def test_a_key_is_used_and_kept_nowhere(
    start_backend: StartBackend, start_node: StartNode, page: Page
) -> None:
    network = await start_backend(api_keys=["client-key"])
    speaker = Speaker(("Hello",))
    await network.register(await start_node(StandIn(speaker)), "legal")
    await page.go(network.url)
    await ask(page, "legal")
    await page.until("document.querySelector('.error')?.textContent.includes('key')")
    await page.evaluate("document.querySelector('#key').focus()")
    await page.write("client-key")
    await ask(page, "legal")
    await page.until("document.querySelector('.text')?.textContent === 'Hello'")
    kept = (
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    )
    assert "client-key" not in await page.evaluate(kept)
    assert await page.evaluate("document.querySelector('#key').type") == "password"
    await page.go(network.url + "/?again")
    assert await page.evaluate("document.querySelector('#key').value") == ""


COUNT_INTRUDERS = "document.querySelectorAll('main img, main script, svg svg').length"


@pytest.mark.parametrize("protected", [True, False])
async def test_strangers_texts_stay_texts(
    network: Network,
    start_node: StartNode,
    page: Page,
    monkeypatch: pytest.MonkeyPatch,
    protected: bool,
) -> None:
    """The twin: without the server's escaping and its policy they run."""
    if not protected:
        monkeypatch.setattr(html, "escape", lambda text: text)
        monkeypatch.setitem(routes._HEADERS, "Content-Security-Policy", "")
    speaker = Speaker((f"Well, {HOSTILE}",))
    speaker.go.set()
    name = HOSTILE[:128]
    await network.register_lora(
        "legal", LEGAL_CID, description=HOSTILE, category=HOSTILE, version=HOSTILE
    )
    node = await start_node(StandIn(speaker))
    await network.register(node, "legal", name, base_model=HOSTILE, version=HOSTILE)
    await network.beat(2)  # nobody
    await page.go(network.url)
    if not protected:
        await page.until("window.pwned === true")
        return
    assert await page.evaluate("document.body.innerText.includes('<script>')")
    # Once as the server made it, and once as the script does, for one more of each.
    network.clock.forward(1)
    await network.register_lora("other", LEGAL_CID, description=HOSTILE, category=HOSTILE)
    await network.register(node, "other", name, number=2, base_model=HOSTILE, version=HOSTILE)
    await network.beat(2, status=HOSTILE[:32])
    await page.until("document.querySelectorAll('#node-rows > tr').length === 2")
    await ask(page, HOSTILE)
    await page.until("document.querySelector('.answer[aria-busy=false]')")
    assert await page.texts(".answer h3") == [HOSTILE]
    assert await page.texts(".answer .text") == [f"Well, {HOSTILE}"]
    assert await page.evaluate(COUNT_INTRUDERS) == 0
    assert await page.evaluate("window.pwned === undefined")
    spotless(page, network)


async def test_the_script_could_not_make_html_of_a_text(pair: Pair, page: Page) -> None:
    await page.go(pair.network.url)
    refused = await page.evaluate(
        f"try {{ document.body.innerHTML = {json.dumps(HOSTILE)}; '' }} catch (it) {{ it.name }}"
    )
    assert refused == "TypeError"
