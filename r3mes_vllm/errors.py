"""Every error this package raises on purpose.

    R3mesError
    ├── ConfigError           a setting that can't work
    ├── PortTaken             another program listens there
    ├── HubUnreachable        the model hub does not answer now
    ├── BadRequest            a client's request that can't be answered
    ├── CrossSite             a web page of another site sent it, without a key
    ├── UnknownHost           it came by a name that any web page may have
    ├── IpfsError             content that can't be had from IPFS
    │   ├── BadCID            text that is no CID, or one of a kind that is not supported
    │   ├── BlockMismatch     bytes that don't hash to the CID they were asked by
    │   ├── BadCAR            a CAR stream that breaks its specification
    │   ├── BadDAG            a verified block that is not valid dag-pb or UnixFS
    │   ├── BadArchive        a .tar, .tar.gz or .zip that may not be unpacked
    │   ├── ContentTooLarge   more bytes, files or levels than the limits allow
    │   ├── SourceFailed      one source failed: unreachable, timed out, ended early
    │   │   ├── SourceShaky   it may well answer when it is asked again
    │   │   ├── SourceLacks   it answered, and does not have it, or not in that form
    │   │   └── SourceBusy    it asked for a pause
    │   └── ContentNotFound   no source had it
    ├── StorageFull           the cache's quota has no room
    │   └── DiskFull          or the disk itself
    ├── AdapterError
    │   ├── UnknownAdapter    nobody knows an adapter of that name
    │   ├── AdapterRefused    vetting refused it; `rule` says which rule
    │   └── AdapterNotReady   it is known but can't serve yet
    ├── EngineError           the engine is not there, or not well
    └── BackendError
        ├── BackendUnreachable
        └── BackendRefused    it answered, and the answer was no

Each carries a stable `code`, the HTTP `status` it becomes, a sentence holding the value that was
wrong, and a `hint`: what to do next.
"""

from typing import ClassVar


class R3mesError(Exception):
    """Base of all; `str(error)` is the sentence."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def headers(self) -> dict[str, str]:
        """Of the HTTP answer."""
        return {}

    def body(self) -> dict[str, dict[str, str]]:
        """The JSON body of an HTTP answer outside `/v1`."""
        return {"error": {"code": self.code, "message": self.message, "hint": self.hint}}


class ConfigError(R3mesError):
    code = "config"


class PortTaken(R3mesError):
    code = "port_taken"


class StateInUse(R3mesError):
    """By another node, which may be on its way out."""

    code = "state_in_use"


class DatabaseUnreachable(R3mesError):
    """Perhaps for now: its server may come."""

    code = "database_unreachable"


class HubUnreachable(R3mesError):
    code = "hub_unreachable"
    status = 503


class BadRequest(R3mesError):
    code = "bad_request"
    status = 400


class CrossSite(R3mesError):
    code = "cross_site"
    status = 403


class UnknownHost(R3mesError):
    code = "unknown_host"
    status = 403


class IpfsError(R3mesError):
    code = "ipfs"
    status = 502


class BadCID(IpfsError):
    code = "bad_cid"
    status = 400


class BlockMismatch(IpfsError):
    code = "block_mismatch"


class BadCAR(IpfsError):
    code = "bad_car"


class BadDAG(IpfsError):
    code = "bad_dag"
    status = 422


class BadArchive(IpfsError):
    code = "bad_archive"
    status = 422


class ContentTooLarge(IpfsError):
    code = "content_too_large"
    status = 422


class SourceFailed(IpfsError):
    code = "source_failed"


class SourceShaky(SourceFailed):
    """It may well answer when it is asked again. It is there if it `answered` with a status; else
    its connection broke, or there was none."""

    code = "source_shaky"

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


class SourceLacks(SourceFailed):
    """HTTP status `answered`: it does not have the block, or gives none in the form asked for."""

    code = "source_lacks"

    def __init__(self, message: str, *, answered: int) -> None:
        super().__init__(message)
        self.answered = answered


class SourceBusy(SourceFailed):
    """Ask again after `retry_after` seconds."""

    code = "source_busy"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ContentNotFound(IpfsError):
    code = "content_not_found"


class StorageFull(R3mesError):
    code = "storage_full"
    status = 507


class DiskFull(StorageFull):
    """Also what was begun is in the way, which is not so of a quota."""


class AdapterError(R3mesError):
    code = "adapter"
    status = 503


class UnknownAdapter(AdapterError):
    code = "unknown_adapter"
    status = 404


class AdapterRefused(AdapterError):
    """Vetting refused the adapter; `rule` is the rule's name in `r3mes_vllm.adapters.vetting`."""

    code = "adapter_refused"
    status = 422

    def __init__(self, rule: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.rule = rule

    def body(self) -> dict[str, dict[str, str]]:
        body = super().body()
        body["error"]["rule"] = self.rule
        return body


class AdapterNotReady(AdapterError):
    """Try again after `retry_after` seconds."""

    code = "adapter_not_ready"
    status = 503

    def __init__(self, message: str, *, retry_after: int = 5, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


class EngineError(R3mesError):
    code = "engine"
    status = 503


class BackendError(R3mesError):
    code = "backend"
    status = 502


class BackendUnreachable(BackendError):
    code = "backend_unreachable"


class BackendRefused(BackendError):
    """The backend answered with HTTP status `answered`; `retry_after` is in seconds."""

    code = "backend_refused"

    def __init__(
        self, message: str, *, answered: int, retry_after: float | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.answered = answered
        self.retry_after = retry_after
