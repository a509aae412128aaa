"""`r3mes-vllm backend`."""

from pathlib import Path
from typing import Annotated

import typer

from r3mes_vllm import settings


def backend(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="[8000]")] = None,
    database_url: Annotated[
        str | None, typer.Option(help="sqlite:///FILE. [in the user's data folder]")
    ] = None,
    allow_private_nodes: Annotated[
        bool | None,
        typer.Option("--allow-private-nodes", help="Nodes on private and loopback addresses."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
) -> None:
    """Run the registry and router.

    Example: r3mes-vllm backend --port 8000 --allow-private-nodes
    """
    given = settings.load(
        {
            "backend_host": host,
            "backend_port": port,
            "database_url": database_url,
            "allow_private_nodes": allow_private_nodes,
        },
        config,
    )
    from r3mes_vllm.backend import server

    server.run(given)
