"""The OpenAPI document of a node's application, which the guard does not give away."""

from typing import Any, get_args

from r3mes_vllm.node.guard import ROUTES
from r3mes_vllm.wire import ChatRequest
from tests import tiny

_LEFT_OUT = {"/drain"}  # it ends the node
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_PUT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "cid": {"type": "string"}},
    "required": ["name", "cid"],
    "additionalProperties": False,
}


def application() -> Any:
    """vLLM's with the node in it, for all of vLLM's tasks, without an engine."""
    import pytest
    from vllm import tasks
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-lora"])
    every = {name for kind in (tasks.GenerationTask, tasks.FrontendTask) for name in get_args(kind)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "r3mes")
        patch.setattr("r3mes_vllm.engine.ending.no_tracebacks", lambda: None)
        return build_app(args, tuple(sorted(every)), None)


def document() -> dict[str, Any]:
    """Of the routes that the guard lists, with the models of the tests' node."""
    whole = application().openapi()
    paths: dict[str, dict[str, Any]] = {}
    for method, path in ROUTES:
        if path not in _LEFT_OUT:
            described = whole["paths"].get(path, {}).get(method.lower(), {})
            paths.setdefault(path, {})[method.lower()] = {"responses": {"200": {"description": ""}}}
            paths[path][method.lower()] |= {
                key: described[key] for key in ("requestBody", "parameters") if key in described
            }
    schemas = whole["components"]["schemas"] | {"ChatRequest": ChatRequest.model_json_schema()}
    paths["/chat"]["post"]["requestBody"] = _body({"$ref": "#/components/schemas/ChatRequest"})
    paths["/adapters"]["post"]["requestBody"] = _body(_PUT)
    paths["/adapters/{name}"]["delete"]["parameters"] = [_NAME]
    for schema in schemas.values():
        for field in ("model", "lora_name", "adapter_name"):
            if field in schema.get("properties", {}):
                schema["properties"][field] = {"enum": [tiny.NAME, "legal", "medical"]}
    return {
        "openapi": whole["openapi"],
        "info": whole["info"],
        "paths": paths,
        "components": {"schemas": _reached(paths, schemas)},
    }


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _reached(paths: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Of `schemas`, what `paths` refer to, directly or not."""
    found: dict[str, Any] = {}
    waiting = [paths]
    while waiting:
        match waiting.pop():
            case dict() as fields:
                name = str(fields.get("$ref", "")).rpartition("/")[2]
                if name in schemas and name not in found:
                    found[name] = schemas[name]
                    waiting.append(schemas[name])
                waiting += fields.values()
            case list() as items:
                waiting += items
    return found
