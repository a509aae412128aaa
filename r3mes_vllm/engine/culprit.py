"""What a client got wrong, where vLLM itself doesn't say it: whether it was a mistake, and in which
field."""

from functools import cache
from http import HTTPStatus
from types import TracebackType
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.exceptions import VLLMClientError, VLLMServerError

from r3mes_vllm.validation import words

READ_BY: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
}
_SLIPS = (TypeError, ValueError, AttributeError, LookupError, AssertionError, RecursionError)
"""What vLLM's own checks raise where a value is of another type than they take for granted."""

_READING = ("/fastapi/dependencies/", "/vllm/renderers/", "/vllm/sampling_params.py")
"""Where requests are read, and nothing else is done."""

Told = tuple[int, dict[str, Any]]
"""Status and error of vLLM's."""


def culprit(path: str, fields: dict[str, Any]) -> tuple[str, str] | None:
    """The field that is not what the route of that path takes, and a sentence about it.

    Each is looked at by itself: vLLM's checks of how they go together may not have come to their
    end.
    """
    for name, (adapter, required) in _adapters(path).items():
        if name not in fields:
            if required:
                return name, f"{name}: it is missing"
            continue
        try:
            adapter.validate_python(fields[name])
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = _place(name, first["loc"])
            return where, f"{where}: {words(first)}"
        except VLLMClientError as error:
            return name, f"{name}: {error}"
        except _SLIPS:
            return name, f"{name}: it is not of the form that is expected"
    return None


def named(path: str, message: str) -> str | None:
    """The field that vLLM's message begins with, if it does."""
    word = message.partition(" ")[0].strip("`'\":,")
    return word if word in _adapters(path) else None


@cache
def _adapters(path: str) -> dict[str, tuple[TypeAdapter[Any], bool]]:
    model = READ_BY[path]
    found = {}
    for name, field in model.model_fields.items():
        kind: Any = Annotated[field.annotation, *field.metadata, None]
        found[field.alias or name] = TypeAdapter(kind), field.is_required()
    return found


def _place(name: str, loc: tuple[int | str, ...]) -> str:
    """`messages.0.content` of a location that also names types and their validators."""
    parts = clean_loc_for_param((name, *loc)).split(".")
    return ".".join(part for part in parts if part == part.lower())[:100]


def told(error: Exception) -> Told | None:
    """Of what came out of vLLM's application, before anything was sent; None if it is no mistake
    of the client's."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        # Starlette's, around one for which vLLM has an answer: it had sent status 200 by then.
        response = create_error_response(_origin(error.__cause__))
        return response.error.code, response.error.model_dump()
    if isinstance(error, _SLIPS) and _reads(error.__traceback__):
        return HTTPStatus.BAD_REQUEST, {"message": "the request can't be understood"}
    return None


def _origin(error: Exception) -> Exception:
    """The engine's failure, where handling that failed too."""
    it: BaseException | None = error
    while it is not None and not isinstance(it, VLLMClientError):
        if isinstance(it, VLLMServerError):
            engines: Exception = it
            return engines
        it = it.__cause__ or it.__context__
    return error


def _reads(trace: TracebackType | None) -> bool:
    while trace is not None:
        if any(place in trace.tb_frame.f_code.co_filename for place in _READING):
            return True
        trace = trace.tb_next
    return False
