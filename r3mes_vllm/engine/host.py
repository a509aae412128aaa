"""The adapters on the engine, and the names under which vLLM's server finds them."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from r3mes_vllm.errors import AdapterRefused, EngineError

LOAD_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Hosted:
    """One adapter on the engine; `path` is absolute and holds the CID."""

    name: str
    cid: str
    path: Path
    rank: int
    size: int
    """Bytes on disk."""
    lora_id: int


class Host:
    """Adds and removes adapters on a running engine.

    Each version of a name has an id and a path of its own, so that neither vLLM's weights nor its
    prefix cache (keyed by name and path) can ever be those of another version.
    """

    def __init__(self, engine: EngineClient, models: OpenAIServingModels) -> None:
        self._engine = engine
        self._models = models
        self._hosted: dict[str, Hosted] = {}
        # Answers carry the name that was asked for, not the internal `name@cid`.
        models.model_name = self._model_name

    @property
    def adapters(self) -> list[Hosted]:
        """In the order in which they were added."""
        return list(self._hosted.values())

    @property
    def base_model(self) -> str:
        return str(self._models.base_model_paths[0].name)

    def find(self, name: str) -> Hosted | None:
        """By `name` or `name@cid`."""
        plain, _, cid = name.partition("@")
        hosted = self._hosted.get(plain)
        return hosted if hosted and cid in ("", hosted.cid) else None

    async def add(self, name: str, cid: str, path: Path, *, rank: int, size: int) -> Hosted:
        """Load the vetted adapter at `path` and serve it as `name` and `name@cid`.

        Raises AdapterRefused when the engine will not load it, EngineError when it hangs.
        """
        hosted = Hosted(name, cid, path, rank, size, self._models.lora_id_counter.inc(1))
        request = LoRARequest(f"{name}@{cid}", hosted.lora_id, str(path))
        try:
            loaded = await asyncio.wait_for(self._engine.add_lora(request), LOAD_TIMEOUT_S)
        except TimeoutError as error:
            raise EngineError(
                f"the engine did not load adapter {name!r} within {LOAD_TIMEOUT_S:.0f} s"
            ) from error
        except Exception as error:
            if self._engine.errored:
                raise EngineError(f"the engine died while it loaded {name!r}: {error}") from error
            # vLLM's client raises plain Exception with the text of whatever its process raised
            raise AdapterRefused("engine", f"the engine can't load {name!r}: {error}") from error
        if not loaded:
            raise AdapterRefused("engine", f"the engine can't load {name!r}")
        self._hosted[name] = hosted
        self._models.lora_requests[name] = request
        self._models.lora_requests[request.lora_name] = request
        return hosted

    async def models(self) -> dict[str, Any]:
        """OpenAI's list of models: base first. No path of this machine is in it."""
        listing = await self._models.registry.show_available_models()
        base = [card.model_dump() | {"root": card.id} for card in listing.data]
        adapters = [
            base[0] | {"id": it.name, "root": it.name, "parent": self.base_model, "cid": it.cid}
            for it in self.adapters
        ]
        return {"object": "list", "data": base + adapters}

    def _model_name(self, lora_request: LoRARequest | None = None) -> str:
        if lora_request is None:
            return self.base_model
        return str(lora_request.lora_name).partition("@")[0]
