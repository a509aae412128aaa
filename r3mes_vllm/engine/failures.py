"""What failed not long ago, so that it is not tried again for every request."""

import time
from collections import OrderedDict

from r3mes_vllm.errors import AdapterRefused, BadArchive, BadDAG, ContentTooLarge, R3mesError

_REFUSED_FOR_S = 3600.0
"""Its CID will not become another adapter."""
_FAILED_FOR_S = 15.0
_MOST = 1024

_OF_THE_CONTENT = (AdapterRefused, BadArchive, BadDAG, ContentTooLarge)
"""What is found in bytes that are those of the CID: fetched again, they are the same."""


class Failures:
    """By CID."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[R3mesError, float]] = OrderedDict()
        self.refused_by_engine = 0
        """In all."""

    def note(self, cid: str, error: R3mesError) -> None:
        if isinstance(error, AdapterRefused) and error.rule == "engine":
            self.refused_by_engine += 1
        lasts = _REFUSED_FOR_S if isinstance(error, _OF_THE_CONTENT) else _FAILED_FOR_S
        self._known[cid] = error, time.monotonic() + lasts
        while len(self._known) > _MOST:
            self._known.popitem(last=False)

    def forget(self, cid: str) -> None:
        self._known.pop(cid, None)

    def raise_known(self, cid: str) -> None:
        """Raise once more what was noted and still counts."""
        error, until = self._known.get(cid, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise error.with_traceback(None)
