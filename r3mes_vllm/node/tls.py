"""The node's certificate: checked before the engine starts, and followed while it serves.

vLLM's own way to follow it, `--enable-ssl-refresh`, watches the files that are there at the start:
it sees no renewal that puts others in their place, as certbot and Kubernetes do, and one of the
certificate before its key leaves the server with neither.
"""

import argparse
import asyncio
import os
import ssl
from collections.abc import Sequence
from pathlib import Path

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.report import say, warn
from r3mes_vllm.settings import Settings

_LOOK_S = 1.0

_Stamp = tuple[int, int, int] | None


def taken_over(settings: Settings, passed_on: Sequence[str]) -> tuple[Settings, list[str]]:
    """vLLM's options for the certificate and the address count as our own; the rest is for its
    parser.

    Raises ConfigError for one without its value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("ssl-certfile", "ssl-keyfile"):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", type=_path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=_port)
    refresh = ("--enable-ssl-refresh", "--enable_ssl_refresh")
    parser.add_argument(*refresh, action="store_true", default=None)
    try:
        given, rest = parser.parse_known_args(passed_on)
    except argparse.ArgumentError as error:
        raise ConfigError(
            str(error), hint="write --ssl-certfile FILE --ssl-keyfile FILE --host HOST --port PORT"
        ) from error
    update = {
        "ssl_certfile": given.ssl_certfile,
        "ssl_keyfile": given.ssl_keyfile,
        "serving_node_host": given.host,
        "serving_node_port": given.port,
    }
    return settings.model_copy(update={it: value for it, value in update.items() if value}), rest


def options(settings: Settings) -> list[str]:
    """For vLLM's parser."""
    found = []
    if settings.ssl_certfile:
        found += ["--ssl-certfile", str(settings.ssl_certfile)]
    if settings.ssl_keyfile:
        found += ["--ssl-keyfile", str(settings.ssl_keyfile)]
    return found


def context(settings: Settings) -> ssl.SSLContext | None:
    """None without a certificate. Raises ConfigError if it and its key can't be used."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise ConfigError("--ssl-keyfile without --ssl-certfile", hint="give both files")
        return None
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(made, settings)
    return made


async def follow(serving: ssl.SSLContext, settings: Settings) -> None:
    """Use what is in the files now for new connections, until cancelled."""
    before: list[_Stamp] = []
    while True:
        now = [_stamp(file) for file in (settings.ssl_certfile, settings.ssl_keyfile)]
        if now != before:
            try:
                context(settings)  # elsewhere first: half of a renewal would end all serving
                _load(serving, settings)
                if before:
                    say(f"the renewed certificate in {settings.ssl_certfile} is in use")
            except ConfigError as error:
                warn(f"{error}; the certificate that it had stays in use")
            before = now
        await asyncio.sleep(_LOOK_S)


def _load(into: ssl.SSLContext, settings: Settings) -> None:
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    for file in filter(None, (certificate, key)):
        try:
            file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"can't read {file}: {error.strerror}",
                hint="--ssl-certfile and --ssl-keyfile name files in PEM",
            ) from error
    where = f"{certificate} and {key}" if key else f"{certificate}"
    try:
        into.load_cert_chain(certificate or "", key, password="")  # vLLM knows none either
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            message = f"the key in {key or certificate} is not that of the certificate"
        else:
            message = f"no certificate with its key, in PEM and without a password, in {where}"
        raise ConfigError(message, hint="openssl x509 -noout -text -in FILE shows it") from error


def _stamp(file: Path | None) -> _Stamp:
    try:
        status = os.stat(file) if file else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status else None


def _port(text: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port")
    return int(text)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # `~nobody`
        raise argparse.ArgumentTypeError(f"{text}: no such user") from error
