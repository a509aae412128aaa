"""The suites: `r3mes-vllm bench NAME`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    name: str
    about: str
    """One sentence, which stands above its table."""
    module: str
    rounds: int = 5
    model: bool = True
    """Whether it has a model, and so depends on which."""
    long: bool = False
    """Over half an hour: `bench all` runs it last."""


_ALL = [
    Suite(
        "kept",
        "Tokens a second that are kept with adapters, of those of the base model on the same "
        "engine, and beside stock vLLM, by case.",
        "benchmarks.cpu_lora",
    ),
    Suite(
        "grid",
        "Tokens a second with 1 to 64 adapters and 1 to 64 requests at once: of the base model's, "
        "of stock vLLM's, and of PEFT's with one adapter at a time.",
        "benchmarks.grid",
        long=True,
    ),
    Suite(
        "working-set",
        "Requests a second as the adapters in use outgrow the slots: the shapes of S-LoRA, Zipf "
        "and Punica, beside stock vLLM.",
        "benchmarks.working_set",
        long=True,
    ),
    Suite(
        "cold-start",
        "From a CID that is nowhere here to the first token, from a daemon, a gateway and the "
        "local store, and what running streams feel of it.",
        "benchmarks.cold_start",
    ),
    Suite(
        "no-stall",
        "The longest silence of running streams while a large adapter is loaded and first used.",
        "benchmarks.no_stall",
    ),
    Suite(
        "fairness",
        "What a request to a cold adapter waits beside a hot one's traffic, and what that costs.",
        "benchmarks.fairness",
    ),
    Suite(
        "front-cost",
        "What the node adds to bare `vllm serve`, and the backend to the node, at 1 to 64 streams.",
        "benchmarks.front_cost",
    ),
    Suite(
        "half-open",
        "What a thousand half-open connections, and malformed requests, cost everybody else.",
        "benchmarks.front_door",
        rounds=6,
        model=False,
    ),
    Suite(
        "router",
        "What the backend adds to a stream of a node that sends as ours does, without a model.",
        "benchmarks.router",
        model=False,
    ),
    Suite(
        "routing",
        "What a request waits, by how the router chooses a node; simulated with its own code.",
        "benchmarks.routing",
        model=False,
    ),
    Suite(
        "routing-nodes",
        "The backend in front of four real nodes of unequal speed, beside choosing blindly.",
        "benchmarks.routing_nodes",
    ),
    Suite(
        "fetch",
        "Fetching an adapter from a gateway on loopback, of what sha256 alone takes.",
        "benchmarks.fetch",
        model=False,
    ),
    Suite(
        "vetting",
        "Vetting an adapter, of what sha256 alone takes.",
        "benchmarks.vetting",
        model=False,
    ),
    Suite(
        "beats",
        "Processor time that a registry with its nodes' beats costs, on SQLite and PostgreSQL.",
        "benchmarks.backend_beats",
        model=False,
    ),
    Suite(
        "scale",
        "How the backend's calls grow with what is registered: 100 to 10,000 adapters, 10 to "
        "1,000 nodes.",
        "benchmarks.scale",
        model=False,
    ),
    Suite(
        "soak",
        "Loads, unloads, switches and traffic for an hour: memory, descriptors, errors.",
        "benchmarks.soak",
        long=True,
    ),
]
SUITES = {suite.name: suite for suite in _ALL}
