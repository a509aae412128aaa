"""What a web page makes its visitor's browser send to a server that asks for no key.

A browser sends it to any address it reaches, a program on loopback too; a body of `text/plain`
needs no preflight, and only the answer is kept from the page. Not even that is kept from one whose
own name leads to loopback by now (DNS rebinding): to the browser it asks its own server.
"""

from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import Scope

from r3mes_vllm.errors import CrossSite, R3mesError, UnknownHost
from r3mes_vllm.settings import Settings

_SAFE = {"GET", "HEAD", "OPTIONS"}
"""They change nothing, and their answers are kept from the page."""
_OWN = {b"same-origin", b"none"}
"""`none` is a person's: an address typed, a bookmark."""
_NOBODYS = (".localhost", ".internal")
"""Names that nobody can register; Docker's `host.docker.internal` is one."""
_SHOWN = 200
"""Characters of what a stranger sent."""


class Pages:
    """The rules of one server. `origins` are those of pages that may, `known` the names by which
    it may be called; None: any."""

    def __init__(self, origins: Iterable[str] = (), known: Sequence[str] | None = None) -> None:
        self._origins = {it.encode() for it in origins}
        self._known = known

    def objection(self, scope: Scope) -> R3mesError | None:
        """To a request that no valid key came with."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").lower()
        if self._known is not None and not _is_no_pages(name := _name(host), self._known):
            return UnknownHost(
                f"called by the name {name[:_SHOWN]!r}, which any web page may have",
                hint="call it by its address; behind a proxy set R3MES_API_KEYS, a node's "
                "R3MES_SERVING_NODE_URL, or R3MES_INSECURE=true",
            )
        if scope["method"] in _SAFE or self._is_own(headers, host):
            return None
        origin = headers.get(b"origin", b"another site").decode("latin-1")[:_SHOWN]
        return CrossSite(
            f"a web page of {origin} sent this, and no valid key",
            hint="send a key, or name the page's origin in the backend's R3MES_CORS_ORIGINS",
        )

    def _is_own(self, headers: dict[bytes, bytes], host: bytes) -> bool:
        """Whether none but a page of this server, or no page at all, has sent it. As Go's
        `http.CrossOriginProtection` does (https://pkg.go.dev/net/http#CrossOriginProtection):
        browsers tell `Sec-Fetch-Site` to https and loopback only, and old ones nobody."""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if origin in self._origins:
            return True
        if site is not None:
            return site in _OWN
        return origin is None or origin.partition(b"://")[2] == host


def names(settings: Settings, listens: str, *, tls: bool = False) -> list[str] | None:
    """By which a server that `listens` there may be called, as `Pages` takes them. With keys, or
    a certificate, a page whose name leads here gets nothing; beyond loopback it needs no browser.
    """
    keys = settings.api_keys or settings.api_keys_file or settings.admin_key
    if keys or tls or settings.insecure or not is_loopback(listens):
        return None
    return [urlsplit(settings.serving_node_url or "").hostname or ""]


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: bytes) -> str:
    """Without the port."""
    text = host.decode("latin-1")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")


def _is_no_pages(name: str, known: Sequence[str]) -> bool:
    """Names without a dot are not in the DNS of the internet."""
    if "." not in name or name.endswith(_NOBODYS) or name in known:
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
