"""What is taken for a web page of another site, or for one whose name leads to loopback by now."""

from typing import Any

import pytest

from r3mes_vllm.cross_site import Pages, names
from r3mes_vllm.settings import load

APP = "https://app.example"
OTHERS: list[dict[str, str]] = [
    {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
    {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site"},  # a form, where the page hides its origin
    {"origin": "null", "sec-fetch-site": "cross-site"},
    {"origin": "https://evil.example"},  # browsers tell plain http beyond loopback no more
    {"origin": "null"},
    {"origin": "http://127.0.0.1:8000.evil.example"},
    {"origin": "http://127.0.0.1"},
    {"origin": "https://app.example.evil"},
    {"origin": ""},
]
OWN: list[dict[str, str]] = [
    {},  # no browser
    {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
    {"origin": "http://127.0.0.1:8000"},
    {"origin": "https://behind.example", "sec-fetch-site": "same-origin"},  # proxies change Host
    {"sec-fetch-site": "none"},
    {"origin": APP, "sec-fetch-site": "cross-site"},
    {"origin": APP},
]


def objection(pages: Pages, method: str = "POST", **headers: str) -> str:
    """Its code."""
    given = {"host": "127.0.0.1:8000", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()]
    error = pages.objection({"type": "http", "method": method, "headers": raw})
    assert error is None or error.status == 403
    return error.code if error else ""


@pytest.mark.parametrize("headers", OTHERS, ids=str)
def test_another_sites_page_changes_nothing(headers: dict[str, str]) -> None:
    pages = Pages([APP])
    for method in ("POST", "PUT", "PATCH", "DELETE", "ANYTHING"):
        assert objection(pages, method, **headers) == "cross_site"
    for method in ("GET", "HEAD", "OPTIONS"):
        assert not objection(pages, method, **headers)


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_its_own_pages_named_ones_and_programs_may(headers: dict[str, str]) -> None:
    assert not objection(Pages([APP]), **headers)


@pytest.mark.parametrize(
    ("host", "code"),
    [
        *((it, "") for it in ("127.0.0.1:8000", "[::1]:8000", "[::ffff:127.0.0.1]", "10.0.0.1")),
        *((it, "") for it in ("localhost:8000", "LOCALHOST", "localhost.", "r3mes.localhost:1")),
        *((it, "") for it in ("node.example:8443", "Node.Example", "backend:8000", "")),
        ("host.docker.internal:8000", ""),
        *((it, "unknown_host") for it in ("evil.example", "evil.example:8000", "evil.example.")),
        *((it, "unknown_host") for it in ("127.0.0.1.evil.example", "evil.node.example", "1.2.3")),
        *((it, "unknown_host") for it in ("localhost.evil.example", "xlocalhost.example")),
    ],
)
def test_on_loopback_without_keys_it_is_called_by_names_no_page_has(host: str, code: str) -> None:
    settings = load({"serving_node_url": "https://node.example:8443/r3mes"})
    pages = Pages(known=names(settings, "127.0.0.1"))
    for method in ("GET", "POST"):
        assert objection(pages, method, host=host) == code
        assert not objection(Pages(), method, host=host)


def test_a_rebound_page_is_no_own_page() -> None:
    pages = Pages(known=names(load(), "127.0.0.1"))
    headers = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
    assert objection(pages, **headers) == "unknown_host"


@pytest.mark.parametrize(
    ("given", "listens", "any_name"),
    [
        ({}, "127.0.0.1", False),
        ({}, "::1", False),
        ({}, "localhost", False),
        ({"open_chat": True, "cors_origins": [APP]}, "127.0.0.1", False),
        ({}, "0.0.0.0", True),
        ({}, "192.168.1.5", True),
        ({"insecure": True}, "127.0.0.1", True),
        ({"api_keys": ["k"]}, "127.0.0.1", True),
        ({"api_keys_file": "keys"}, "127.0.0.1", True),
        ({"admin_key": "k"}, "127.0.0.1", True),
    ],
)
def test_where_any_name_does(given: dict[str, Any], listens: str, any_name: bool) -> None:
    assert (names(load(given), listens) is None) is any_name
    assert names(load(given), listens, tls=True) is None
