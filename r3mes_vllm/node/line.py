"""The line to the backend: who reads along there learns of users, and who writes there chooses what
this node serves. So it is encrypted, or does not leave the machine."""

import ssl
from pathlib import Path
from urllib.parse import urlsplit

from r3mes_vllm.cross_site import is_loopback
from r3mes_vllm.errors import ConfigError

NETWORK_PORTS = (80, 443, 3000, 5000, 8000, 8080, 8443)
"""The existing backend calls no node on another."""


def refuse_plain_http(url: str) -> None:
    """Raises ConfigError unless it is https, or within this machine."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"the backend {url!r} is no URL: {error}") from error
    if parts.scheme == "https" or is_loopback(parts.hostname or ""):
        return
    raise ConfigError(
        f"the backend {url} would be talked to without encryption",
        hint=f"--backend-url https://{parts.netloc}{parts.path}, with --backend-ca FILE if no "
        "public authority signed its certificate; or --insecure if that is what you want",
    )


def trusted(ca: Path | None) -> ssl.SSLContext | bool:
    """What httpx takes as `verify`: the certificates in `ca` and no others, or the public ones.

    Raises ConfigError.
    """
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # an SSLError is one
        raise ConfigError(
            f"no certificates in PEM in {ca}: {error.strerror or error}",
            hint="--backend-ca names the file of the authority that signed the backend's",
        ) from error
