"""Bodies of requests are taken as they are: unpacked, a small one could fill the memory."""

from starlette.datastructures import Headers

CODE = "unsupported_encoding"
ACCEPTED = {"accept-encoding": "identity"}
"""Of the answer, RFC 9110, section 15.5.16."""


def objection(headers: Headers) -> str | None:
    """A sentence on a `Content-Encoding` that is not taken; None if there is none."""
    given = ", ".join(headers.getlist("content-encoding"))
    if all(each.strip().lower() in ("", "identity") for each in given.split(",")):
        return None
    return f"Content-Encoding: {given[:100]!r} is not taken; send the body as it is"
