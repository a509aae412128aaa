"""What failed is not tried again for every request, for as long as it would fail."""

import time

import pytest

from r3mes_vllm.engine.failures import Failures
from r3mes_vllm.errors import (
    AdapterRefused,
    BadArchive,
    BadDAG,
    BlockMismatch,
    ContentNotFound,
    ContentTooLarge,
    R3mesError,
    StorageFull,
)

OF_THE_CONTENT = [
    AdapterRefused("kind_is_lora", "no"),
    *(kind("no") for kind in (BadArchive, BadDAG, ContentTooLarge)),
]
OF_THE_MOMENT = [kind("no") for kind in (ContentNotFound, BlockMismatch, StorageFull)]


@pytest.mark.parametrize("error", [*OF_THE_CONTENT, *OF_THE_MOMENT], ids=lambda it: it.code)
def test_what_lies_in_the_content_is_remembered_for_long(
    error: R3mesError, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, now = Failures(), time.monotonic()
    failures.note("cid", error)
    with pytest.raises(type(error)):
        failures.raise_known("cid")
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    if error in OF_THE_MOMENT:
        failures.raise_known("cid")
        return
    with pytest.raises(type(error)):
        failures.raise_known("cid")
    failures.forget("cid")
    failures.raise_known("cid")
