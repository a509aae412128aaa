"""`r3mes-vllm backend`."""

from pathlib import Path
from typing import Annotated

import typer

from r3mes_vllm import report, settings


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
    require_signatures: Annotated[
        bool | None, typer.Option("--require-signatures", help="Only nodes that sign.")
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(
            help="What answers when no node holds an adapter, in this order. [on-demand,url,local]"
        ),
    ] = None,
    fallback_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server; its key goes into R3MES_FALLBACK_KEY."),
    ] = None,
    fallback_model: Annotated[
        str | None,
        typer.Option(help="Of that server. [the one asked for if it has it, else its first]"),
    ] = None,
    with_local_model: Annotated[
        str | None,
        typer.Option(help="Hub name or directory of a base model to start an engine with here."),
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
            "require_signatures": require_signatures,
            "fallback": fallback,
            "fallback_url": fallback_url,
            "fallback_model": fallback_model,
            "with_local_model": with_local_model,
        },
        config,
    )
    for text in settings.misspelt():
        report.warn(text)
    from r3mes_vllm.backend import server

    server.run(given)
