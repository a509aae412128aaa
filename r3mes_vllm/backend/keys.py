"""Who may: a bearer token or `X-API-Key` out of a set of keys."""

from fastapi import Request

from r3mes_vllm.backend.refusals import Unauthorized
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.keys import Keys, presented
from r3mes_vllm.settings import Settings


def demand(keys: Keys, request: Request) -> None:
    """Raise Unauthorized unless `request` carries one of the keys, or none is needed."""
    if keys.needed and not keys.accept(presented(request.headers)):
        raise Unauthorized(
            "a valid key is needed", hint="send Authorization: Bearer KEY, or X-API-Key: KEY"
        )


def client_keys(settings: Settings) -> Keys:
    """`api_keys` and the lines of `api_keys_file`. Raises ConfigError if that has none."""
    keys = Keys(settings.api_keys, settings.api_keys_file)
    if settings.api_keys_file and not keys:
        raise ConfigError(f"{settings.api_keys_file} holds no key", hint="one key a line")
    return keys
