"""How a node stands, seen from outside of it: what `r3mes-vllm status` shows.

Nothing here needs the engine: it works while there is none, and starts at once.
"""

import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from r3mes_vllm import state_dir
from r3mes_vllm.cross_site import is_loopback
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.identity import operator_key
from r3mes_vllm.node.line import NETWORK_PORTS, trusted
from r3mes_vllm.settings import Settings
from r3mes_vllm.wire import HEARTBEAT_TIMEOUT_S

_TIMEOUT_S = 5.0
_PLACE = {"serving_node_host", "serving_node_port", "ssl_certfile"}
"""Settings: where a node listens."""


@dataclass(frozen=True)
class Reading:
    """One look at a node and at its backend's list."""

    url: str
    """Of the node on this machine."""
    at: float = field(default_factory=time.monotonic)
    node: dict[str, Any] | None = None
    """The document of `GET /status`; None if it gave none, for the `trouble` that follows."""
    trouble: str | None = None
    listed: dict[str, Any] | None = None
    """What the backend's list says of it; None if it isn't there."""
    list_trouble: str | None = None
    """Why the list could not be read."""

    @property
    def ready(self) -> bool:
        return self.node is not None and self.node["reason"] is None


def note_place(settings: Settings) -> None:
    """For `with_noted_place`, of the node that these start."""
    place = settings.model_dump(mode="json", include=_PLACE)
    state_dir.note_place(settings.state_dir, place)


def with_noted_place(settings: Settings) -> Settings:
    """`settings` with the place at which the node of their state directory was started last."""
    found = state_dir.noted_place(settings.state_dir)
    try:
        place = Settings.model_validate({it: found[it] for it in _PLACE})
    except (KeyError, ValidationError):
        return settings
    return settings.model_copy(update={it: getattr(place, it) for it in _PLACE})


class Observer:
    """Looks at the node that these `settings` would start, as its operator."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.local_url
        key = settings.admin_key or operator_key(settings.state_dir, make=False)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT_S,
            trust_env=False,
            verify=_own_certificate(settings),
        )
        self._backend = httpx.AsyncClient(
            timeout=_TIMEOUT_S, trust_env=False, verify=trusted(settings.backend_ca)
        )

    async def __aenter__(self) -> "Observer":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._backend.aclose()

    async def look(self) -> Reading:
        """Raises ConfigError when the node does not take the operator's key."""
        try:
            answer = await self._http.get("/status")
            if answer.status_code == httpx.codes.UNAUTHORIZED:
                raise ConfigError(
                    f"the node at {self.url} refuses this operator's key",
                    hint="run it as the node's user, with the same R3MES_STATE_DIR, "
                    "or set R3MES_ADMIN_KEY",
                )
            if answer.status_code != httpx.codes.OK:
                return Reading(self.url, trouble=await self._reason(answer.status_code))
            node = answer.json()
            if not isinstance(node, dict) or "wallet_address" not in node:
                return Reading(self.url, trouble="what listens there is no node of this version")
        except (httpx.HTTPError, ValueError) as error:
            absent = isinstance(error, httpx.ConnectError)
            said = f"nothing listens at {self.url}" if absent else repr(error)
            return Reading(self.url, trouble=f"no node is running: {said}")
        return await self._with_list(node)

    async def _reason(self, status: int) -> str:
        """Of a node that has no status yet."""
        body = (await self._http.get("/health")).json()
        if isinstance(body, dict) and body.get("status") == "starting":
            return f"it is starting: {body.get('reason')}"
        return f"it answered {status}"

    async def _with_list(self, node: dict[str, Any]) -> Reading:
        if node["backend"] is None:
            return Reading(self.url, node=node)
        wallet = node["wallet_address"]
        names = [name for it in node["adapters"] for name in it["names"]]
        try:
            answer = await self._backend.get(
                f"{node['backend']}/api/serving-node/list",
                params={"lora": names[0]} if names else {},
            )
            nodes = answer.raise_for_status().json()["nodes"]
            listed = next((it for it in nodes if it["wallet_address"] == wallet), None)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            return Reading(self.url, node=node, list_trouble=str(error) or repr(error))
        return Reading(self.url, node=node, listed=listed)


def why_no_requests(reading: Reading) -> str:
    """In one sentence, and what to do about it."""
    node = reading.node
    if node is None:
        return f"No requests come because {reading.trouble}."
    if node["reason"] is not None:
        return f"No requests come because the node is not ready: {node['reason']}."
    if node["backend"] is None:
        return "No requests come from a network: this node serves its backend's program alone."
    return _of_network(reading, node)


def _of_network(reading: Reading, node: dict[str, Any]) -> str:
    backend, public = node["backend"], node["public_url"]
    if node["beat_trouble"]:
        return f"No requests come because the node is not registered: {node['beat_trouble']}."
    if node.get("outdated"):
        return f"No requests come because {node['upgrade']}."
    if node["beat_age_s"] is None:
        return f"No requests come yet: the node has not registered with {backend} so far."
    if node["beat_age_s"] > HEARTBEAT_TIMEOUT_S:
        return (
            f"No requests come because the last heartbeat was {node['beat_age_s']:.0f} s ago, and "
            f"a node is dropped after {HEARTBEAT_TIMEOUT_S}."
        )
    if reading.list_trouble:
        return f"It can't be told: the list of {backend} can't be read ({reading.list_trouble})."
    if reading.listed is None:
        return f"No requests come because {backend} does not list this node; try: doctor."
    if reading.listed.get("signature") == "unproven":
        why = reading.listed.get("signature_reason")
        return f"No requests come because {backend} can't be sure of {public}: {why}."
    if "signature" not in reading.listed and node.get("chat_needs_key"):
        return (
            f"Each request is refused because {backend} is of the existing network, which sends no "
            "key, and /chat needs one: pass --open-chat."
        )
    if trouble := unreachable(backend, public):
        return f"No requests come because {trouble}."
    lasts = [it["last_s_ago"] for it in node["requests"].values() if it["last_s_ago"] is not None]
    if not lasts:
        return "All is well: it is listed, and nobody has asked for its adapters yet."
    return f"All is well: it is listed, and the last request ended {min(lasts):.0f} s ago."


def unreachable(backend: str, public: str) -> str | None:
    """Why a backend elsewhere will not call this public URL; None if nothing speaks against it."""
    host, port = urlsplit(public).hostname or "", urlsplit(public).port
    if is_loopback(urlsplit(backend).hostname or ""):
        return None
    if is_loopback(host):
        return f"{public} means nothing on the backend's machine: pass --public-url"
    port = port or (443 if public.startswith("https:") else 80)
    if port not in NETWORK_PORTS:
        ports = ", ".join(map(str, NETWORK_PORTS))
        return f"the existing network calls the ports {ports} only, not {port}: pass --port 8080"
    return None


@dataclass(frozen=True)
class Rates:
    """A second, between two readings."""

    requests: float
    prompt_tokens: float
    generated_tokens: float


def rates(before: Reading, after: Reading) -> Rates | None:
    """None if there is nothing to compare: the node was not there, or began anew meanwhile."""
    if before.node is None or after.node is None or after.node["up_s"] < before.node["up_s"]:
        return None
    seconds = max(after.at - before.at, 1e-3)

    def rate(field: str) -> float:
        grown = total(after.node, field) - total(before.node, field)
        return max(grown, 0) / seconds

    return Rates(rate("complete"), rate("prompt_tokens"), rate("generated_tokens"))


def total(node: dict[str, Any] | None, field: str) -> float:
    """Of all adapters and the base model."""
    return sum(it.get(field, 0) for it in node["requests"].values()) if node else 0


def _own_certificate(settings: Settings) -> ssl.SSLContext | bool:
    """It is trusted as it lies on this machine, whatever name it was made for."""
    if not settings.ssl_certfile:
        return True
    try:
        context = ssl.create_default_context(cafile=settings.ssl_certfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"can't read the certificate {settings.ssl_certfile}: {error}") from error
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
