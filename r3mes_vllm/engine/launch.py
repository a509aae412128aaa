"""vLLM's own OpenAI server, started in this process with our parts and the operator's options."""

import difflib
import signal
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from r3mes_vllm.children import ended
from r3mes_vllm.engine.sizes import Sizes, Workers
from r3mes_vllm.errors import ConfigError, EngineError
from r3mes_vllm.unread import bounded


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


def check(model: str, options: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Raises ConfigError for what vLLM's parser would not take: `options`, by their names, that it
    does not know, or what is in `arguments`, which they are part of."""
    parser = _parser()
    known = {it.lstrip("-") for it in parser._option_string_actions}
    for name in options:
        if (option := name.replace("_", "-")) not in known:
            nearest = _nearest(option, known)
            raise ConfigError(f"[vllm] {name}: vLLM has no such option{nearest}")

    def refuse(message: str) -> NoReturn:
        if (unknown := message.removeprefix("unrecognized arguments: ")) != message:
            option = unknown.split()[0].partition("=")[0]
            nearest = _nearest(option.lstrip("-"), known)
            raise ConfigError(f"{option}: vLLM has no such option{nearest}")
        raise ConfigError(f"vLLM's parser says: {message}")

    parser.error = refuse
    parser.parse_args(["--model", model, *arguments])


def workers(arguments: Sequence[str]) -> Workers:
    """Those that vLLM with these `arguments` starts on this machine, as its `EngineArgs` and
    `ParallelConfig` count them; with Ray, which may start them elsewhere, all."""
    args = _parser().parse_args(list(arguments))
    of_each = args.tensor_parallel_size * args.pipeline_parallel_size
    of_each *= args.prefill_context_parallel_size
    machines, everywhere = max(args.nnodes, 1), max(args.data_parallel_size, 1)
    if args.data_parallel_external_lb or args.data_parallel_rank is not None:
        replicas = 1  # each has a server of its own
    else:
        replicas = args.data_parallel_size_local or max(everywhere // machines, 1)
    spanned = max(machines * replicas // everywhere, 1)  # machines, by a replica
    return Workers(max(replicas * of_each // spanned, 1), replicas)


def _nearest(option: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(option, known, n=1)
    return f": did you mean {close[0]}?" if close else ""


def run(
    command_line: Sequence[str],
    socket_for: Callable[[tuple[str, int]], socket.socket | None] = lambda address: None,
) -> None:
    """Serve until a signal comes; the port is closed and the engine gone on return.

    `socket_for` gives the socket that listens on host and port already, if one does. Raises
    EngineError with vLLM's own words if it will not start.
    """
    stock = launcher.create_server_socket

    def create_server_socket(address: tuple[str, int], *, reuse_port: bool) -> socket.socket:
        # Until the engine has started. vLLM's own are exceptions that it swallows itself, and
        # asyncio's is heard when the start is over, minutes later perhaps.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ended)
        return socket_for(address) or bounded(stock(address, reuse_port=reuse_port))

    launcher.create_server_socket = create_server_socket
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
