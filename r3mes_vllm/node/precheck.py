"""What can be said of settings before anything starts."""

from collections.abc import Iterator, Mapping

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.node.guard import refuse_open_door
from r3mes_vllm.node.line import refuse_plain_http
from r3mes_vllm.settings import EMBEDDED_MODEL, Settings

_OF_A_NODE = {
    *("loras", "lora_policy", "model", "vllm", "max_loras", "max_lora_rank", "adapters"),
    *(
        "serving_node_host",
        "serving_node_port",
        "serving_node_url",
        "backend_url",
        "canary_timeout",
    ),
}
_FILES = ("api_keys_file", "backend_ca", "ssl_certfile", "ssl_keyfile")


def vllm_options(settings: Settings) -> None:
    """Raises ConfigError for an option that vLLM does not take; asking it takes seconds."""
    from r3mes_vllm.engine import launch

    launch.check(settings.model or EMBEDDED_MODEL, settings.vllm, settings.vllm_arguments)


def troubles(settings: Settings, origins: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each thing that is lacking still, such as a key that belongs elsewhere."""
    for name in _FILES:
        file = getattr(settings, name)
        if file is not None and not file.exists():
            yield f"{name}: there is no {file}"
    if not any(origins[name] != "default" for name in _OF_A_NODE):
        return
    for check in (refuse_open_door, _plain_http):
        try:
            check(settings)
        except ConfigError as error:
            yield f"serve would say: {error}; try: {error.hint}"


def _plain_http(settings: Settings) -> None:
    if not settings.insecure:
        refuse_plain_http(settings.backend)
