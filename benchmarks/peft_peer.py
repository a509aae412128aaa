"""PEFT, one adapter at a time: the requests of each adapter are one batch, adapters one by one."""

import json
from typing import Any

from benchmarks.harness import worker_told
from benchmarks.side_by_side import one_by_one


def work(given: dict[str, Any]) -> None:
    """As `cpu_lora.work`: answers with the seconds that a job takes."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, given["dtype"])
    with torch.device(device):
        if given["dummy"]:
            config = AutoConfig.from_pretrained(given["model"])
            base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            base = AutoModelForCausalLM.from_pretrained(given["model"], dtype=dtype)
    model: Any = base.to(device)
    for number, folder in enumerate(given["adapters"]):
        if number == 0:
            model = PeftModel.from_pretrained(base, folder, "a0", autocast_adapter_dtype=False)
        else:
            model.load_adapter(folder, f"a{number}", autocast_adapter_dtype=False)
    model = model.to(dtype)
    model.eval()

    def answer(number: int, prompts: Any, length: int) -> None:
        model.set_adapter(f"a{number}")
        tokens = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )

    one_by_one(given["seed"], model.config.vocab_size - 1, answer)


if __name__ == "__main__":
    work(json.loads(worker_told() or "{}"))
