"""What a middleware answers in place of the application, in the shape that the caller knows."""

from collections.abc import Mapping

from starlette.responses import JSONResponse, Response


def refusal(path: str, status: int, code: str, message: str, hint: str = "") -> Response:
    """In OpenAI's shape under `/v1`, elsewhere in the node's own."""
    if path.startswith("/v1/"):
        return openai_refusal(status, code, f"{message}. {hint}" if hint else message)
    return JSONResponse({"error": {"code": code, "message": message, "hint": hint}}, status)


def openai_refusal(
    status: int,
    code: str,
    message: str,
    *,
    field: str | None = None,
    rule: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """`field` of the request is the one to blame, or the `rule` that an adapter breaks."""
    if status >= 500:
        kind = "server_error"
    else:
        kind = "authentication_error" if status == 401 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": field, "code": code}
    if rule:
        error["rule"] = rule
    return JSONResponse({"error": error}, status, headers)
