"""`r3mes-vllm demo`."""

from typing import Annotated

import typer

from r3mes_vllm import demo as the_demo


def demo(
    once: Annotated[bool, typer.Option("--once", help="Stop after the two answers.")] = False,
    port: Annotated[int, typer.Option(help="Of the node; the next free one is taken.")] = 8081,
    backend_port: Annotated[int, typer.Option(help="Of the backend, likewise.")] = 8000,
) -> None:
    """A backend and a node on this machine, and one question to each of two adapters.

    Example: r3mes-vllm demo --once
    """
    the_demo.run(once=once, node_port=port, backend_port=backend_port)
