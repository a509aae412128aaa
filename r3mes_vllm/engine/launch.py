"""vLLM's own OpenAI server, started in this process with our parts and the operator's options."""

from collections.abc import Sequence
from pathlib import Path

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from r3mes_vllm.engine.sizes import Sizes
from r3mes_vllm.errors import EngineError


def arguments(
    *,
    model: str | Path,
    served_name: str,
    host: str,
    port: int,
    sizes: Sizes,
    passed_on: Sequence[str],
) -> list[str]:
    """The command line for vLLM's parser; what the operator passed on comes last and wins."""
    return [
        *("--model", str(model)),
        *("--served-model-name", served_name),
        *("--host", host),
        *("--port", str(port)),
        "--enable-lora",
        *("--max-loras", str(sizes.max_loras)),
        *("--max-cpu-loras", str(sizes.max_cpu_loras)),
        *("--max-lora-rank", str(sizes.max_lora_rank)),
        # Adapters get their ids from the one server's counter, also for several engines.
        *("--api-server-count", "1"),
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
