"""OpenAI's own Python client, unmodified: chat completions."""

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import BadRequestError
from openai.types.chat import ChatCompletionMessageParam

from tests import tiny
from tests.conformance.asked import MESSAGES, WEATHER, Verdict


class TestChat:
    def test_an_answer(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="legal", messages=MESSAGES, max_tokens=8)
        assert answer.object == "chat.completion"
        assert answer.model == "legal"
        [choice] = answer.choices
        assert choice.message.role == "assistant"
        assert choice.finish_reason == "length"
        assert answer.usage
        assert answer.usage.completion_tokens == 8
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8

    def test_a_stream_with_usage(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": "legal", "messages": MESSAGES, "max_completion_tokens": 8}
        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        whole = client.chat.completions.create(**asked)
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"
        parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(parts) == whole.choices[0].message.content
        assert [it.choices[0].finish_reason for it in chunks if it.choices][-1] == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])

    async def test_asynchronously(self, async_client: openai.AsyncOpenAI) -> None:
        answers = await asyncio.gather(
            *(
                async_client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8)
                for model in (tiny.NAME, "legal", "medical")
            )
        )
        assert len({it.choices[0].message.content for it in answers}) == 3
        stream = await async_client.chat.completions.create(
            model="medical", messages=MESSAGES, max_tokens=8, stream=True
        )
        text = "".join([it.choices[0].delta.content or "" async for it in stream])
        assert text == answers[2].choices[0].message.content

    def test_several_answers_are_drawn_each_by_itself(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="legal", messages=MESSAGES, n=3, temperature=1, max_tokens=8, seed=1
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert len({choice.message.content for choice in answer.choices}) > 1

    def test_a_seed_gives_the_same_again(self, client: openai.OpenAI) -> None:
        def ask(seed: int) -> str | None:
            answer = client.chat.completions.create(
                model="legal", messages=MESSAGES, temperature=1, max_tokens=16, seed=seed
            )
            return answer.choices[0].message.content

        assert ask(7) == ask(7) != ask(8)

    def test_logprobs(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="legal", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3
        )
        assert answer.choices[0].logprobs
        tokens = answer.choices[0].logprobs.content
        assert tokens
        assert len(tokens) == 4
        for token in tokens:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)

    def test_stop_ends_before_the_text_that_it_names(self, client: openai.OpenAI) -> None:
        def ask(**asked: Any) -> Any:
            answer = client.chat.completions.create(
                model="legal", messages=MESSAGES, max_tokens=32, **asked
            )
            return answer.choices[0]

        text = ask().message.content
        stop = next(character for character in text[4:] if character.isascii())
        stopped = ask(stop=[stop, "never said"])
        assert stopped.finish_reason == "stop"
        assert stopped.message.content == text.partition(stop)[0]

    def test_a_bias_forbids_and_forces_tokens(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="legal", messages=MESSAGES, max_tokens=4, logit_bias={"65": 100}
        )
        assert len(set(answer.choices[0].message.content or "")) == 1

    def test_history_and_parts_of_text(self, client: openai.OpenAI) -> None:
        parts: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is"}]},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": [{"type": "text", "text": "a tort?"}]},
        ]
        answer = client.chat.completions.create(model="legal", messages=parts, max_tokens=4)
        assert answer.usage
        assert answer.usage.prompt_tokens > len("Be brief. What is Yes? a tort?")


class TestStructure:
    def test_a_schema(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="legal",
            messages=MESSAGES,
            max_tokens=200,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "verdict", "schema": Verdict.model_json_schema()},
            },
        )
        Verdict.model_validate_json(answer.choices[0].message.content or "")

    def test_parse_gives_the_model(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.parse(
            model="medical", messages=MESSAGES, max_tokens=200, response_format=Verdict
        )
        assert isinstance(answer.choices[0].message.parsed, Verdict)

    def test_what_ended_too_early_is_said_to_be(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.LengthFinishReasonError):
            client.chat.completions.parse(
                model="legal", messages=MESSAGES, max_tokens=2, response_format=Verdict
            )

    def test_a_schema_that_is_none_is_a_bad_request(self, client: openai.OpenAI) -> None:
        bad: Any = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "array", "items": 5}},
        }
        for stream in (False, True):
            with pytest.raises(BadRequestError):
                client.chat.completions.create(
                    model="legal",
                    messages=MESSAGES,
                    max_tokens=4,
                    response_format=bad,
                    stream=stream,
                )


class TestTools:
    def ask(self, client: openai.OpenAI, **asked: Any) -> Any:
        answer = client.chat.completions.create(
            model="legal", messages=MESSAGES, tools=[WEATHER], max_tokens=300, **asked
        )
        return answer.choices[0]

    def called(self, call: Any) -> None:
        assert call.type == "function"
        assert call.id
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"place", "unit"}

    @pytest.mark.parametrize(
        "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
    )
    def test_a_call_that_is_demanded(self, client: openai.OpenAI, choice: Any) -> None:
        answer = self.ask(client, tool_choice=choice, parallel_tool_calls=False)
        [call] = answer.message.tool_calls
        self.called(call)
        assert answer.finish_reason in ("tool_calls", "stop")

    def test_a_call_in_pieces(self, client: openai.OpenAI) -> None:
        stream = client.chat.completions.create(
            model="legal",
            messages=MESSAGES,
            tools=[WEATHER],
            max_tokens=300,
            tool_choice={"type": "function", "function": {"name": "weather"}},
            stream=True,
        )
        name, arguments, ids = "", "", set()
        for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or []:
                assert call.function
                name += call.function.name or ""
                arguments += call.function.arguments or ""
                ids |= {call.id} - {None, ""}
        assert name == "weather"
        assert set(json.loads(arguments)) == {"place", "unit"}
        assert len(ids) == 1

    def test_the_models_own_choice(self, client: openai.OpenAI) -> None:
        choice = client.chat.completions.create(
            model="legal", messages=MESSAGES, tools=[WEATHER], max_tokens=4, tool_choice="auto"
        ).choices[0]
        assert choice.message.content
        assert not choice.message.tool_calls

    def test_the_result_goes_back(self, client: openai.OpenAI) -> None:
        call: Any = {
            "id": "call-1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"place": "Ankara", "unit": "C"}'},
        }
        answer = client.chat.completions.create(
            model="legal",
            messages=[
                *MESSAGES,
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call-1", "content": "21"},
            ],
            tools=[WEATHER],
            tool_choice="none",
            max_tokens=4,
        )
        assert answer.choices[0].finish_reason == "length"

    def test_a_tool_that_is_not_there(self, client: openai.OpenAI) -> None:
        with pytest.raises(BadRequestError) as caught:
            self.ask(client, tool_choice={"type": "function", "function": {"name": "nobody"}})
        assert caught.value.param == "tool_choice"
