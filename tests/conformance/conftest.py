"""Each test that takes `url` runs against the node and through the backend."""

from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest

from tests.conftest import Network


@pytest.fixture(scope="session", autouse=True)
def grammars(network: Network) -> None:
    """vLLM takes what compiles the first form that it is asked for, for all later ones too."""
    body = {"model": "legal", "prompt": "x", "structured_outputs": {"regex": "[ab]"}}
    httpx.post(f"{network.node.url}/v1/completions", json=body, timeout=60).raise_for_status()


@pytest.fixture(params=["node", "backend"])
def url(request: pytest.FixtureRequest, network: Network) -> str:
    program = network.node if request.param == "node" else network.backend
    return f"{program.url}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client
