"""Every request under `/v1` is within the limits, and holds its adapter from before vLLM's handler
until its answer ended."""

from contextlib import AsyncExitStack

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm import strict_json
from r3mes_vllm.answer_headers import adding
from r3mes_vllm.disconnect import while_connected
from r3mes_vllm.engine.host import Host
from r3mes_vllm.errors import AdapterRefused, R3mesError
from r3mes_vllm.node import bodies, journal
from r3mes_vllm.node.fields import BadField, refuse_background, refuse_excess
from r3mes_vllm.node.refusals import openai_refusal

_RESPONSES = "/v1/responses"
_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    _RESPONSES,
    "/v1/embeddings",
)


class Hold:
    """ASGI middleware. A body that has no text as `model` goes through: vLLM says what is wrong
    with it, and answers it from the base model at most."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in _ROUTES:
            await self._app(scope, receive, send)
            return
        node = scope["app"].state.r3mes
        host: Host = node.host
        body = await bodies.read(receive)
        if body is None:
            return  # the client is gone
        again = bodies.Replay(body, receive)
        try:
            fields = strict_json.parse_object(body)
            refuse_excess(fields, node.settings.limits)
            if scope["path"] == _RESPONSES:
                refuse_background(fields)
        except BadField as error:
            await _refusal(error, error.field)(scope, receive, send)
            return
        except ValueError as error:
            await openai_refusal(400, "malformed", str(error))(scope, receive, send)
            return
        name = fields.get("model")
        if not isinstance(name, str) or host.is_base(name):
            journal.note(None, None)
            await self._app(scope, again, send)
            return
        async with AsyncExitStack() as until_answered:
            try:
                # a task of its own, which ends when the client goes; what it holds it lets go
                if not host.is_ready(name) and not await while_connected(receive, host.load(name)):
                    return
                version = await until_answered.enter_async_context(host.hold(name))
                journal.note(name, version.cid)
            except R3mesError as error:
                await _refusal(error)(scope, receive, send)
                return
            await self._app(scope, again, adding(named(name, version.cid), send))


def named(name: str, cid: str) -> dict[str, str]:
    """The headers that say which adapter answers."""
    return {"X-R3MES-Adapter": name.partition("@")[0], "X-R3MES-CID": cid}


def _refusal(error: R3mesError, field: str = "model") -> Response:
    code = "model_not_found" if error.code == "unknown_adapter" else error.code
    hint = f" ({error.hint})" if error.hint else ""
    rule = error.rule if isinstance(error, AdapterRefused) else None
    return openai_refusal(
        error.status, code, f"{error}{hint}", field=field, rule=rule, headers=error.headers
    )
