"""OpenAI's own client, against the backend."""

import openai
import pytest

from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import LEGAL_CID, OTHER_CID, Network, StandIn, answers, streams, wallet

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

COMPLETION: dict[str, object] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "legal",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "An agreement."},
        }
    ],
}


def chunk(text: str) -> bytes:
    choice = f'{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":null}}'
    return (
        'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"legal",'
        f'"choices":[{choice}]}}\n\n'
    ).encode()


def client_of(network: Network, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{network.url}/v1",
        api_key=key,
        max_retries=0,
    )


async def test_a_chat_completion(network: Network, start_node: StartNode) -> None:
    node = StandIn(answers(200, COMPLETION))
    await network.register(await start_node(node), "legal")
    async with client_of(network) as client:
        answer = await client.chat.completions.create(
            model="legal", messages=[{"role": "user", "content": "contract?"}]
        )
    assert answer.choices[0].message.content == "An agreement."
    assert node.seen[0].path == "/v1/chat/completions"


async def test_a_streamed_chat_completion(network: Network, start_node: StartNode) -> None:
    pieces = [chunk("An "), chunk("agreement."), b"data: [DONE]\n\n"]
    node = StandIn(streams(*pieces, media_type="text/event-stream"))
    await network.register(await start_node(node), "legal")
    async with client_of(network) as client:
        stream = await client.chat.completions.create(
            model="legal", messages=[{"role": "user", "content": "contract?"}], stream=True
        )
        text = [part.choices[0].delta.content async for part in stream]
    assert text == ["An ", "agreement."]


@pytest.mark.parametrize("path", ["completions", "responses", "embeddings"])
async def test_the_other_routes_go_to_the_same_path_of_the_node(
    network: Network, start_node: StartNode, path: str
) -> None:
    node = StandIn()
    await network.register(await start_node(node), "legal")
    answer = await network.http.post(f"/v1/{path}", json={"model": "legal", "input": "x"})
    assert (answer.status_code, answer.text) == (200, "hello")
    assert node.seen[0].path == f"/v1/{path}"


async def test_a_base_model_goes_to_a_node_that_has_it(
    network: Network, start_node: StartNode
) -> None:
    other, right = StandIn(), StandIn()
    await network.register(await start_node(other), "legal", number=1, base_model="other")
    await network.register(await start_node(right), number=2, base_model=BASE)
    for _ in range(8):
        answer = await network.http.post("/v1/completions", json={"model": BASE, "prompt": "x"})
        assert answer.headers["x-r3mes-node"] == wallet(2)
    network.clock.forward(61)
    late = await network.http.post("/v1/completions", json={"model": BASE, "prompt": "x"})
    assert late.status_code == 503
    assert late.json()["error"]["type"] == "server_error"


async def test_the_models_are_those_with_a_live_holder(
    network: Network, start_node: StartNode
) -> None:
    await network.register_lora("legal", LEGAL_CID)
    await network.register_lora("nobody-holds-it", LEGAL_CID)
    await network.register(
        await start_node(StandIn()), "legal", "unregistered", "b\nad", base_model=BASE
    )
    async with client_of(network) as client:
        models = {model.id: model.to_dict() for model in (await client.models.list()).data}
        one = await client.models.retrieve("legal")
        base = await client.models.retrieve(BASE)
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nobody-holds-it")
    assert set(models) == {BASE, "legal", "unregistered"}
    assert (models["legal"]["parent"], models["legal"]["cid"]) == (BASE, LEGAL_CID)
    assert (models["unregistered"]["parent"], models["unregistered"]["cid"]) == (BASE, None)
    assert (models[BASE]["parent"], models[BASE]["cid"]) == (None, None)
    assert one.to_dict() == models["legal"]
    assert base.id == BASE
    network.clock.forward(61)
    assert (await network.http.get("/v1/models")).json() == {"object": "list", "data": []}


async def test_an_unknown_model_is_what_the_client_calls_not_found(network: Network) -> None:
    async with client_of(network) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.completions.create(model="nonsense", prompt="x")
    error = caught.value
    assert (error.code, error.param, error.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


async def test_a_missing_model_is_named(network: Network) -> None:
    answer = await network.http.post("/v1/chat/completions", json={"messages": []})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == ("model", "invalid_request_error")


async def test_a_wrong_key_is_what_the_client_calls_an_authentication_error(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    network = await start_backend(api_keys=["right"])
    await network.register(await start_node(StandIn(answers(200, COMPLETION))), "legal")
    async with client_of(network, "wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    async with client_of(network, "right") as client:
        assert [model.id for model in (await client.models.list()).data] == ["legal"]


async def test_a_version_that_can_be_asked_for_is_a_model_too(network: Network) -> None:
    await network.register_lora("legal")
    held = {"legal": OTHER_CID}
    await network.register("http://127.0.0.1:1", "legal", adapters=held, base_model=BASE)
    async with client_of(network) as client:
        model = f"legal@{OTHER_CID}"
        found = await client.models.retrieve(model)
        assert (found.id, found.model_extra) == (model, {"parent": BASE, "cid": OTHER_CID})
        assert found.created > 0
        for other in (f"legal@{LEGAL_CID}", f"nobody@{OTHER_CID}", "legal@", f"@{OTHER_CID}"):
            with pytest.raises(openai.NotFoundError, match="is served"):
                await client.models.retrieve(other)
