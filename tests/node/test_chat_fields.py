"""What a node makes of the body of `/chat`."""

import json

import pytest
from pydantic import ValidationError

from r3mes_vllm.completion import completion_fields
from r3mes_vllm.wire import ChatRequest

NOTHING = dict.fromkeys(ChatRequest.model_fields)
TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("said", [{"message": "hi"}, {"messages": [TURN]}, {"stop": ["\n"]}])
def test_a_null_is_as_good_as_nothing(said: dict[str, object]) -> None:
    asked = ChatRequest.model_validate_json(json.dumps(NOTHING | said))
    assert asked == ChatRequest.model_validate(said)
    assert completion_fields(asked, "legal")["messages"] == ([] if "stop" in said else [TURN])
    assert asked.stream


@pytest.mark.parametrize("body", ["null", "[]", '"hi"', '{"messages": [null]}', '{"message": 1}'])
def test_what_is_no_request_is_refused(body: str) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate_json(body)
