"""OpenAI's own Python client, unmodified: completions, responses, models."""

import json
from typing import Any

import openai
import pytest
from openai import BadRequestError, NotFoundError

from tests import tiny
from tests.conformance.asked import WEATHER, Verdict


class TestCompletions:
    def test_several_prompts_and_answers(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model="legal", prompt=["One is", "Two is"], n=2, max_tokens=4, temperature=1
        )
        assert answer.object == "text_completion"
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]

    def test_echo_and_logprobs(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model="legal", prompt="One is", max_tokens=2, echo=True, logprobs=2
        )
        choice = answer.choices[0]
        assert choice.text.startswith("One is")
        assert choice.logprobs
        assert choice.logprobs.tokens
        assert answer.usage
        assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens + 2
        assert (choice.logprobs.token_logprobs or [0])[0] is None
        assert choice.logprobs.top_logprobs
        assert len(choice.logprobs.top_logprobs[-1]) in (2, 3)

    def test_a_stream_with_usage(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": "medical", "prompt": "One is", "max_tokens": 6}
        chunks = list(
            client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        whole = client.completions.create(**asked)
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].text
        assert chunks[-1].usage == whole.usage

    def test_tokens_for_a_prompt(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="legal", prompt=[40, 41, 42], max_tokens=2)
        assert answer.usage
        assert answer.usage.prompt_tokens == 3

    async def test_asynchronously(self, async_client: openai.AsyncOpenAI) -> None:
        answer = await async_client.completions.create(model="legal", prompt="a", max_tokens=4)
        assert answer.choices[0].finish_reason == "length"


class TestResponses:
    def test_an_answer(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(
            model="legal", input="What is a tort?", instructions="Be brief.", max_output_tokens=8
        )
        assert answer.object == "response"
        assert answer.model == "legal"
        assert answer.output_text
        assert answer.usage
        assert answer.usage.output_tokens == 8
        assert answer.status == "incomplete"
        assert answer.incomplete_details
        assert answer.incomplete_details.reason == "max_output_tokens"

    def test_history(self, client: openai.OpenAI) -> None:
        def tokens(given: Any) -> int:
            answer = client.responses.create(model="legal", input=given, max_output_tokens=2)
            assert answer.usage
            return answer.usage.input_tokens

        long = [
            {"role": "user", "content": "What is a tort?"},
            {"role": "assistant", "content": "A wrong."},
            {"role": "user", "content": [{"type": "input_text", "text": "And a contract?"}]},
        ]
        assert tokens(long) > tokens(long[-1:])

    def test_a_stream(self, client: openai.OpenAI) -> None:
        events = list(
            client.responses.create(
                model="legal", input="What is a tort?", max_output_tokens=8, stream=True
            )
        )
        kinds = [event.type for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] in ("response.completed", "response.incomplete")
        deltas = [it.delta for it in events if it.type == "response.output_text.delta"]
        whole = client.responses.create(model="legal", input="What is a tort?", max_output_tokens=8)
        assert "".join(deltas) == whole.output_text
        assert [event.sequence_number for event in events] == list(range(len(events)))

    def test_a_call(self, client: openai.OpenAI) -> None:
        tool: Any = {"type": "function", **WEATHER["function"]}
        answer = client.responses.create(
            model="legal",
            input="How warm is it?",
            tools=[tool],
            tool_choice={"type": "function", "name": "weather"},
            parallel_tool_calls=False,
            max_output_tokens=300,
        )
        [call] = [it for it in answer.output if it.type == "function_call"]
        assert call.name == "weather"
        assert set(json.loads(call.arguments)) == {"place", "unit"}

    def test_parse_gives_the_model(self, client: openai.OpenAI) -> None:
        answer = client.responses.parse(
            model="legal", input="Is it valid?", text_format=Verdict, max_output_tokens=200
        )
        assert isinstance(answer.output_parsed, Verdict)

    async def test_asynchronously(self, async_client: openai.AsyncOpenAI) -> None:
        answer = await async_client.responses.create(
            model="medical", input="What is a fever?", max_output_tokens=4
        )
        assert answer.output_text

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_mistake_is_a_bad_request(self, client: openai.OpenAI, stream: bool) -> None:
        with pytest.raises(BadRequestError):
            client.responses.create(model="legal", input="x", temperature=-1, stream=stream)

    def test_answers_are_not_kept(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(model="legal", input="x", max_output_tokens=2)
        with pytest.raises(NotFoundError):
            client.responses.retrieve(answer.id)


class TestModels:
    def test_list_and_retrieve(self, client: openai.OpenAI) -> None:
        listed = {model.id: model for model in client.models.list()}
        assert {tiny.NAME, "legal", "medical"} <= set(listed)
        for name in (tiny.NAME, "legal"):
            one = client.models.retrieve(name)
            assert (one.id, one.object) == (name, "model")
            assert one.to_dict()["parent"] == listed[name].to_dict()["parent"]

    def test_one_that_is_not_there(self, client: openai.OpenAI) -> None:
        with pytest.raises(NotFoundError) as caught:
            client.models.retrieve("nobody")
        assert caught.value.param == "model"
        assert caught.value.code == "model_not_found"
