"""One slot, an adapter with traffic without end, and now and then a request to another.

    python -m tests.engine.turns MODEL HOT COLD

Prints as JSON, with a cycle of 0 (stock vLLM's schedule) and the default: how long the cold request
waited for its first token (null: until the traffic stopped after 5 s), how many answers were not
those that are given alone, and how many tokens a second came in all.
"""

import json
import os
import random
import sys
import time
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "r3mes",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest

from r3mes_vllm.settings import Settings
from tests.engine.isolation import Answer, answer_of, compared

TRAFFIC_S = 5.0
AT_ONCE = 4
LONGEST = 300
PROMPTS = [[30 + number] * 8 for number in range(AT_ONCE)]


class Traffic:
    def __init__(self, engine: LLMEngine, hot: LoRARequest, cold: LoRARequest) -> None:
        self.engine, self.hot, self.cold = engine, hot, cold
        self._chance = random.Random(0)
        self.alone = {
            (name, number): self._alone(adapter, number)
            for name, adapter in (("hot", hot), ("cold", cold))
            for number in range(AT_ONCE)
        }

    def run(self, cycle: float) -> dict[str, Any]:
        self.engine.engine_core.engine_core.scheduler._cycle = cycle
        began = time.monotonic()
        asked, waited, count, differing, cold_asked = 0, None, 0, 0, None
        while (
            now := time.monotonic() - began
        ) < TRAFFIC_S or self.engine.has_unfinished_requests():
            while now < TRAFFIC_S and self.engine.get_num_unfinished_requests() < AT_ONCE + (
                cold_asked is not None and waited is None
            ):
                self._ask(self.hot, asked % AT_ONCE, f"hot-{asked % AT_ONCE}-{asked}")
                asked += 1
            if cold_asked is None and now > 1:
                cold_asked = time.monotonic()
                self._ask(self.cold, 0, "cold-0-0")
            for output in self.engine.step():
                if output.request_id.startswith("cold") and waited is None and now < TRAFFIC_S:
                    waited = time.monotonic() - (cold_asked or 0)
                if output.finished:
                    name, number, _ = output.request_id.split("-")
                    found = answer_of(output)
                    count += len(found.tokens)
                    differing += compared(found, self.alone[name, int(number)]) == "wrong"
        return {
            "cycle": cycle,
            "waited": waited,
            "differing": differing,
            "asked": asked,
            "tokens_per_s": count / (time.monotonic() - began),
        }

    def _ask(self, adapter: LoRARequest, number: int, request_id: str) -> None:
        # Never all to end at once, which would let the cold one in.
        length = (
            LONGEST if request_id == "alone" else LONGEST - self._chance.randrange(LONGEST // 2)
        )
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=2)
        prompt: Any = {"prompt_token_ids": PROMPTS[number]}
        self.engine.add_request(request_id, prompt, params, lora_request=adapter)

    def _alone(self, adapter: LoRARequest, number: int) -> Answer:
        self._ask(adapter, number, "alone")
        while True:
            for output in self.engine.step():
                if output.finished:
                    return answer_of(output)


def main() -> None:
    model, *folders = sys.argv[1:]
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model,
            enable_lora=True,
            max_loras=1,
            max_cpu_loras=2,
            max_lora_rank=8,
            max_num_seqs=8,
            seed=0,
        )
    )
    hot, cold = (LoRARequest(f"a{i}", i, folder) for i, folder in enumerate(folders, 1))
    traffic = Traffic(engine, hot, cold)
    for cycle in (0.0, Settings.model_fields["adapter_cycle"].default):
        print(json.dumps(traffic.run(cycle)), flush=True)


if __name__ == "__main__":
    main()
