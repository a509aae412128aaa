"""Where a node may live: the check against a registration that points the backend at itself or
at its owner's network (server-side request forgery).

The address is checked twice, at registration and at each dial, because a name can resolve to
something else by then; the dial goes to the very address that was checked, now or lately.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx

from r3mes_vllm.backend.refusals import BadInput, Unresolved

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""`(host, port) -> IP addresses`. Raises OSError if there are none."""

_FIELD = "endpoint_url"
_LENGTH_LIMIT = 2048
_RESOLVE_TIMEOUT_S = 5.0
_NO_SUCH_NAME = {socket.EAI_NONAME, socket.EAI_NODATA}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All of IPv6 that is given out (https://www.iana.org/assignments/ipv6-address-space)."""
_SCHEMES = ("http", "https")
_LOW_PORTS = (80, 443)
_OTHERS_PORTS = {
    *(1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566),
    *(6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080),
}
"""Of protocols in which a request in HTTP may do something; from 1024 up those of
https://fetch.spec.whatwg.org/#port-blocking."""


class Resolver:
    """The system's, in `threads` of its own: a name that nobody answers for holds one for longer
    than it is waited for, and names that strangers send must not hold those of routing."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, "resolver")

    async def __call__(self, host: str, port: int) -> list[str]:
        """At most 5 seconds. It reads `127.1` and `2130706433` as addresses, just as a dial
        does."""
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        return [str(entry[4][0]) for entry in found]


resolve = Resolver(8)
"""For names that strangers send."""


async def check_endpoint(url: str, *, allow_private: bool, resolve: Resolve = resolve) -> str:
    """`url` as it is stored: normal form, no trailing slash. Raises BadInput."""
    if not allow_private:
        parsed = _parse(url)
        _check_port(parsed)
        await public_address(parsed, resolve)
    return normal_form(url)


def normal_form(url: str) -> str:
    """One spelling of `url`. Raises BadInput for what is no URL of a node."""
    return str(_parse(url)).rstrip("/")


def host_of(url: httpx.URL) -> str:
    """As it stands in the URL: ASCII, where `url.host` is what it may be shown as. Resolvers and
    TLS would turn that into ASCII by an older rule, which may give another host."""
    return url.raw_host.decode("ascii")


async def public_address(url: httpx.URL, resolve: Resolve = resolve) -> str:
    """An address of `url`'s host. Raises BadInput if it has none or one that is not public, and
    Unresolved if that can't be told now."""
    host = host_of(url)
    try:
        addresses = await resolve(host, url.port or _default_port(url))
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        is_sure = isinstance(error, UnicodeError) or error.errno in _NO_SUCH_NAME
        raise (BadInput if is_sure else Unresolved)(
            f"{_FIELD}: {host} does not resolve: {error}", field=_FIELD
        ) from error
    for address in addresses:
        if not is_public(address):
            raise BadInput(
                f"{_FIELD}: {host} is {address}, a private address",
                field=_FIELD,
                hint="pass --allow-private-nodes to the backend if its nodes live there",
            )
    if not addresses:
        raise BadInput(f"{_FIELD}: {host} does not resolve", field=_FIELD)
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether `address` is on the open internet, looking inside IPv6 that carries an IPv4."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _UNICAST and not ip.ipv4_mapped:
            return False
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


def _parse(url: str) -> httpx.URL:
    if len(url) > _LENGTH_LIMIT:
        raise BadInput(f"{_FIELD}: longer than {_LENGTH_LIMIT} characters", field=_FIELD)
    shown = repr(url[:200])
    if re.search(r"[\s\\\x00-\x1f\x7f]", url):
        raise BadInput(f"{_FIELD}: {shown} has a blank, control or \\ character", field=_FIELD)
    if "?" in url or "#" in url:
        raise BadInput(f"{_FIELD}: {shown} has a query or a fragment", field=_FIELD)
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise BadInput(f"{_FIELD}: {shown} is no URL: {error}", field=_FIELD) from error
    if parsed.scheme not in _SCHEMES or not parsed.raw_host:
        raise BadInput(f"{_FIELD}: {shown} must begin with http:// or https://", field=_FIELD)
    if parsed.userinfo or "@" in parsed.netloc.decode("latin-1") or "@" in url.split("/")[2]:
        raise BadInput(f"{_FIELD}: holds a user name or password", field=_FIELD)
    if parsed.port is not None and not 1 <= parsed.port <= 65535:
        raise BadInput(f"{_FIELD}: port {parsed.port} is not 1 to 65535", field=_FIELD)
    return parsed


def _check_port(url: httpx.URL) -> None:
    port = url.port or _default_port(url)
    if port in _OTHERS_PORTS or (port < 1024 and port not in _LOW_PORTS):
        raise BadInput(
            f"{_FIELD}: port {port} is another protocol's",
            field=_FIELD,
            hint="80, 443, 8000, 8080 and 8443 work everywhere",
        )


def _default_port(url: httpx.URL) -> int:
    return 443 if url.scheme == "https" else 80
