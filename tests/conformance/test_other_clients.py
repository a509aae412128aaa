"""Other clients of OpenAI's API, unmodified: for JavaScript, LangChain, LiteLLM, curl."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.peers import installed

HERE = Path(__file__).parent
CLIENTS = HERE / "clients"
BODY = {
    "model": "legal",
    "messages": [{"role": "user", "content": "What is a contract?"}],
    "max_tokens": 8,
}


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_openais_client_for_javascript(url: str) -> None:
    modules = installed.npm("openai-node", HERE)
    run("node", str(CLIENTS / "with_node.mjs"), str(modules), url)


@pytest.mark.parametrize("script", ["with_langchain.py", "with_litellm.py"])
def test_clients_in_an_environment_of_their_own(url: str, script: str) -> None:
    run(
        str(installed.environment("clients", HERE / "requirements.txt")), str(CLIENTS / script), url
    )


class TestCurl:
    def curl(self, url: str, *options: str, body: object = BODY) -> tuple[str, str]:
        """What came, and `STATUS VERSION` as curl saw it."""
        if not shutil.which("curl"):
            pytest.fail("the tests need curl: apt-get install curl")
        text = run(
            *("curl", "--silent", "--show-error", "--max-time", "60"),
            *("--header", "Content-Type: application/json", "--data", json.dumps(body)),
            *("--write-out", "\n%{http_code} %{http_version}", *options, url),
        )
        answer, _, status = text.rpartition("\n")
        return answer, status

    def test_a_whole_answer(self, url: str) -> None:
        answer, status = self.curl(f"{url}/chat/completions")
        assert status == "200 1.1"
        assert json.loads(answer)["choices"][0]["message"]["content"]

    def test_a_stream(self, url: str) -> None:
        answer, status = self.curl(
            f"{url}/chat/completions", "--no-buffer", body=BODY | {"stream": True}
        )
        assert status == "200 1.1"
        events = answer.strip().split("\n\n")
        assert all(event.startswith("data: ") for event in events)
        assert events[-1] == "data: [DONE]"

    @pytest.mark.parametrize("stream", [False, True])
    def test_http_1_0(self, url: str, stream: bool) -> None:
        answer, status = self.curl(
            f"{url}/chat/completions", "--http1.0", body=BODY | {"stream": stream}
        )
        # servers answer with the version that they speak
        assert status.startswith("200 1.")
        assert ("[DONE]" in answer) == stream

    def test_a_body_that_waits_to_be_asked_for(self, url: str) -> None:
        long = [{"role": "user", "content": "x"}] * 3
        answer, status = self.curl(
            f"{url}/chat/completions",
            *("--header", "Expect: 100-continue"),
            body=BODY | {"messages": long},
        )
        assert status == "200 1.1"
        assert json.loads(answer)["usage"]["completion_tokens"] == 8

    def test_errors(self, url: str) -> None:
        answer, status = self.curl(f"{url}/chat/completions", body=BODY | {"model": "nobody"})
        assert status == "404 1.1"
        assert json.loads(answer)["error"]["code"] == "model_not_found"
        answer, status = self.curl(f"{url}/nothing")
        assert status == "404 1.1"
        assert json.loads(answer)["error"]["type"] == "invalid_request_error"

    def test_a_form_is_refused(self, url: str) -> None:
        text = run("curl", "--silent", "--data", json.dumps(BODY), f"{url}/chat/completions")
        # curl's own content type; existing R3MES clients set theirs
        assert json.loads(text)["error"]["type"] == "invalid_request_error"
