"""vLLM's own OpenAI server, started in this process with our parts and the operator's options."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from vllm.config.lora import MaxLoRARanks
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from r3mes_vllm.errors import ConfigError, EngineError

_RANKS: tuple[int, ...] = get_args(MaxLoRARanks)
_MOST_SLOTS = 32


@dataclass(frozen=True)
class Sizing:
    """How much room the engine makes for adapters.

    Slots (`max_loras`) take memory for the largest rank each; `max_cpu_loras` are kept in
    main memory beside them.
    """

    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int

    @classmethod
    def of(
        cls, ranks: Sequence[int], *, max_loras: int | None = None, max_rank: int | None = None
    ) -> "Sizing":
        """Room for adapters of these `ranks` and one more; what the operator chose wins."""
        slots = max_loras or min(len(ranks) + 1, _MOST_SLOTS)
        wanted = max_rank or max(ranks, default=16)
        fitting = [rank for rank in _RANKS if rank >= wanted]
        if not fitting:
            raise ConfigError(
                f"rank {wanted} is over what vLLM serves ({_RANKS[-1]})",
                hint=f"pass --max-lora-rank {_RANKS[-1]} or less",
            )
        return cls(slots, max(slots, len(ranks) + 1), fitting[0])


def arguments(
    *,
    model: str | Path,
    served_name: str,
    host: str,
    port: int,
    sizing: Sizing,
    passed_on: Sequence[str],
) -> list[str]:
    """The command line for vLLM's parser; what the operator passed on comes last and wins."""
    return [
        *("--model", str(model)),
        *("--served-model-name", served_name),
        *("--host", host),
        *("--port", str(port)),
        "--enable-lora",
        *("--max-loras", str(sizing.max_loras)),
        *("--max-cpu-loras", str(sizing.max_cpu_loras)),
        *("--max-lora-rank", str(sizing.max_lora_rank)),
        *("--shutdown-timeout", "15"),  # seconds; with 0 vLLM kills its processes
        "--no-use-tqdm-on-load",
        "--disable-uvicorn-access-log",
        *("--uvicorn-log-level", "warning"),
        *passed_on,
    ]


def run(command_line: Sequence[str]) -> None:
    """Serve until a signal comes; the port is closed and the engine gone on return.

    Raises EngineError with vLLM's own words if it will not start.
    """
    cli_env_setup()
    args = _parser().parse_args(list(command_line))
    configure_logging_from_args(args)
    try:
        validate_parsed_serve_args(args)
        ServeSubcommand.cmd(args)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise EngineError(
            f"vLLM did not start: {error}",
            hint="r3mes-vllm --debug serve ... shows its own log; its options come after --",
        ) from error


def _parser() -> FlexibleArgumentParser:
    return make_arg_parser(FlexibleArgumentParser(prog="r3mes-vllm serve ... --"))
