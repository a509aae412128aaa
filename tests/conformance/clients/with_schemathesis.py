"""Requests that a document allows and requests that it does not, several at once.

    python with_schemathesis.py DOCUMENT URL REQUESTS SEED

Prints as JSON the counts by status and what no client should ever see.
"""

import json
import random
import re
import sys
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.errors import SchemathesisError

AT_ONCE = 8
MOST_TOKENS, MOST_ANSWERS = 4, 2
SHARES = {
    "/v1/chat/completions": 30,
    "/v1/completions": 25,
    "/v1/responses": 20,
    "/chat": 15,
    "/v1/embeddings": 3,
    "/adapters": 2,
}
NEGATIVE = 0.6
NEARLY_RIGHT = 0.6
"""Of the bodies, so many are right ones with up to three fields of what was drawn."""
HI = [{"role": "user", "content": "hi"}]
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "legal", "messages": HI},
    "/v1/completions": {"model": "legal", "prompt": "hi"},
    "/v1/responses": {"model": "legal", "input": "hi"},
    "/chat": {"message": "hi"},
}
SWEPT = 0.5
"""Of the requests, so many are right ones with one field of an awkward value."""
AWKWARD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308),
    *("", "x", "1", "none", "auto", "\0", "\u202e", "x" * 5000, "{", "(", "[" * 1000),
    *([], [None], [0], [-1], [2**64], ["x"], [[]], [{}], [["x"]], [0.5], [True]),
    *({}, {"": None}, {"x": 1}, {"x": "y"}, {"type": "x"}, {"type": None}, {"1": 2**70}),
    {"kv_transfer_params": "x", "ec_transfer_params": "x"},
    {"type": "function", "function": {"name": "x"}},
    [{"type": "function", "function": {"name": "x", "parameters": {"type": "x"}}}],
    {"type": "json_schema", "json_schema": {"name": "x"}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/x"}}},
    {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}},
    {"json": {"$ref": "#"}},
    {"regex": "(?<x>a)"},
    {"choice": []},
    {"grammar": "root ::= "},
    {"structural_tag": "{}"},
    [{"role": "user"}],
    [{"role": "x", "content": "y"}],
    [{"role": "user", "content": [{"type": "x"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
    [{"role": "assistant", "content": None, "tool_calls": [None]}],
    [{"type": "function_call_output", "call_id": "x", "output": "y"}],
    [{"type": "reasoning", "summary": []}],
    [{"type": "item_reference", "id": "x"}],
]
REFUSALS = {"busy", "draining", "adapter_not_ready"}
"""Codes of a 503 that is no failure."""
SILENT = "the model answered nothing"
"""Of this random model that is true: `/chat` has no empty answers."""
_ATTEMPTS = 20
TIMEOUT_S = 60


class Run:
    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self._chance = random.Random(seed)
        self.statuses: Counter[str] = Counter()
        self.sent = 0
        self.findings: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._room = threading.Semaphore(2 * AT_ONCE)
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._local = threading.local()
        self._asked: list[Future[None]] = []

    def sweep(self, document: dict[str, Any], count: int) -> None:
        """Send right requests in which one field has an awkward value."""
        asked = [
            (path, field, value, stream)
            for path, right in RIGHT.items()
            if path in document["paths"]
            for field in fields(document, path)
            for value in AWKWARD
            for stream in (False, True)
        ]
        for path, field, value, stream in self._chance.sample(asked, min(len(asked), count)):
            body = {**RIGHT[path], "stream": stream, field: value}
            tame(body)
            self._submit(f"POST {path}", {"method": "POST", "url": self.url + path, "json": body})

    def send(self, case: Any) -> None:
        right = RIGHT.get(case.path)
        if right and isinstance(case.body, dict) and self._chance.random() < NEARLY_RIGHT:
            names = sorted(case.body)
            some = self._chance.sample(names, min(len(names), self._chance.randint(1, 3)))
            case.body = right | {name: case.body[name] for name in some}
        tame(case.body)
        self._submit(f"{case.method} {case.path}", case.as_transport_kwargs(base_url=self.url))

    def _submit(self, operation: str, sent: dict[str, Any]) -> None:
        self._room.acquire()
        self._asked.append(self._pool.submit(self._send, operation, sent))
        self.sent += 1

    def close(self) -> None:
        """Raises what went wrong with the checks themselves."""
        self._pool.shutdown()
        for asked in self._asked:
            asked.result()

    def _send(self, operation: str, sent: dict[str, Any]) -> None:
        try:
            if not hasattr(self._local, "session"):
                self._local.session = requests.Session()
            answer = self._local.session.request(**sent, timeout=TIMEOUT_S)
        except (requests.RequestException, ValueError) as error:
            self._note(operation, "none", sent, repr(error), "no whole answer")
            return
        finally:
            self._room.release()
        kind = f"{operation} {answer.status_code}"
        if answer.status_code == 503:
            kind += f" {SILENT if SILENT in answer.text else code_of(answer)}"
        with self._lock:
            self.statuses[kind] += 1
        if wrong := complaint(operation, answer):
            self._note(operation, str(answer.status_code), sent, answer.text, wrong)

    def _note(self, operation: str, status: str, sent: Any, told: str, wrong: str) -> None:
        alike = re.sub(r"[0-9a-f]{8,}|\d+", "N", told)[:160]
        with self._lock:
            found = self.findings.setdefault(
                f"{operation} {status} {alike}",
                {"wrong": wrong, "operation": operation, "status": status, "times": 0},
            )
            found["times"] += 1
            found["answer"] = told[:600]
            body = sent.get("json", sent.get("data"))
            text = body if isinstance(body, str) else json.dumps(body, default=repr)
            if len(text) < len(found.get("body", text + " ")):
                found["body"] = text


def tame(body: Any) -> None:
    """Valid numbers that would only cost time become small ones; invalid ones stay."""
    if not isinstance(body, dict):
        return
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        value = body.get(field)
        if value is None or (type(value) is int and value > MOST_TOKENS):
            body[field] = MOST_TOKENS
    if type(body.get("n")) is int and body["n"] > MOST_ANSWERS:
        body["n"] = MOST_ANSWERS


def complaint(operation: str, answer: requests.Response) -> str | None:
    _, path = operation.split(" ", 1)
    if answer.status_code == 503 and (code_of(answer) in REFUSALS or SILENT in answer.text):
        return None
    if answer.status_code >= 500:
        return "a failure of the server"
    if answer.status_code >= 400:
        return misshapen(path, answer)
    if path.startswith("/v1/") and 'data: {"error"' in answer.text:
        return "an error with status 200"
    return None


def misshapen(path: str, answer: requests.Response) -> str | None:
    try:
        error = answer.json()["error"]
    except (ValueError, LookupError, TypeError):
        return "an error in no known shape"
    known = {"message", "type", "param", "code"} if path.startswith("/v1/") else {"code", "message"}
    if not isinstance(error, dict) or not known <= error.keys():
        return "an error without its fields"
    if not isinstance(error["message"], str) or not isinstance(error["code"], str):
        return "an error whose fields are no texts"
    if path.startswith("/v1/") and not isinstance(error["param"], str | None):
        return "an error whose field is no text"
    return None


def code_of(answer: requests.Response) -> object:
    try:
        return answer.json()["error"]["code"]
    except (ValueError, LookupError, TypeError):
        return None


def fields(document: dict[str, Any], path: str) -> list[str]:
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = content["schema"].get("$ref", "").rpartition("/")[2]
    described = document["components"]["schemas"][name] if name else content["schema"]
    return sorted(described.get("properties", {}))


def fuzz(document: dict[str, Any], run: Run, total: int, chosen: int) -> None:
    drawn_ones = total * (1 - SWEPT)
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations()]
    rest = [it for it in operations if it.path not in SHARES]
    for operation in operations:
        share = SHARES.get(operation.path, (100 - sum(SHARES.values())) / max(1, len(rest)))
        for mode, part in (
            (GenerationMode.NEGATIVE, NEGATIVE),
            (GenerationMode.POSITIVE, 1 - NEGATIVE),
        ):
            count = round(drawn_ones * share / 100 * part)
            # what takes nothing can be asked in no wrong way
            if count and (operation.body or mode is GenerationMode.POSITIVE):
                drawn(operation, mode, count, chosen, run)
    run.sweep(document, total - run.sent)  # of some there are not so many


def drawn(operation: Any, mode: GenerationMode, count: int, chosen: int, run: Run) -> None:
    """Send `count` of them, or as many as there are."""
    whole = run.sent + count
    for attempt in range(_ATTEMPTS):
        try:
            send_some(operation, mode, whole - run.sent, chosen + attempt, run)
            return
        except (Unsatisfiable, SchemathesisError) as error:
            why = str(error)
        if run.sent >= whole:
            return
    where = f"{operation.method.upper()} {operation.path} {mode.value}"
    print(
        f"{where}: {whole - run.sent} of {count} could not be drawn: {why}"[:300], file=sys.stderr
    )


def send_some(operation: Any, mode: GenerationMode, count: int, chosen: int, run: Run) -> None:
    """Raises Unsatisfiable, and SchemathesisError where the part of the document that it came to
    is one of those that it can't contradict."""

    @seed(chosen)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        run.send(case)

    send()


def main() -> None:
    document, url, total, chosen = sys.argv[1:]
    run = Run(url, int(chosen))
    fuzz(json.loads(Path(document).read_text()), run, int(total), int(chosen))
    run.close()
    print(
        json.dumps(
            {
                "requests": run.sent,
                "statuses": dict(sorted(run.statuses.items())),
                "findings": list(run.findings.values()),
            }
        )
    )


if __name__ == "__main__":
    main()
