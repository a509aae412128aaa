"""uvicorn's HTTP, which by itself reads what follows an `Upgrade` that it does not know as the next
request: the body of each POST of Java's HttpClient and of `curl --http2`, which offer HTTP/2. A
request for a WebSocket that has a body gets no answer from it, and no end."""

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class PlainProtocol(HttpToolsProtocol):
    """Serves a request that offers another protocol as one that offers none (RFC 9110, section
    7.8); WebSocket too, which nothing here speaks. Refuses CONNECT, which no body can follow."""

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        left = memoryview(data)
        try:
            while left:
                left = self._fed(left)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _fed(self, data: memoryview) -> memoryview:
        """What is left of `data`, which comes after a head that is taken back. Raises
        HttpParserError."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._take_back()
            return data[upgrade.args[0] :]
        return data[:0]

    def _take_back(self) -> None:
        """Have a new parser, to which the request's head offers nothing."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            raise httptools.HttpParserError("CONNECT")
        head = [b"%b %b HTTP/%b" % (method, self.url, version.encode())]
        head += [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        # As uvicorn has it, for requests behind one that closes.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"\r\n".join([*head, b"", b""]))
