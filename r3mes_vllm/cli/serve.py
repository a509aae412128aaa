"""`r3mes-vllm serve`."""

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from r3mes_vllm import settings
from r3mes_vllm.cli.options import (
    Api,
    BackendCa,
    BackendUrl,
    CacheDir,
    Config,
    Gateways,
    Host,
    Port,
    PublicUrl,
)


def serve(
    context: typer.Context,
    loras: Annotated[
        str | None,
        typer.Option(help="NAME, NAME=CID, NAME=PATH, category:NAME or all; comma-separated."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub name or directory. [default: SmolLM2-135M-Instruct]")
    ] = None,
    backend_url: BackendUrl = None,
    backend_ca: BackendCa = None,
    host: Host = None,
    port: Port = None,
    public_url: PublicUrl = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="To speak HTTPS: the certificate with its chain, in PEM.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its key. [in the same file]")] = None,
    ipfs_api: Api = None,
    ipfs_gateway: Gateways = None,
    cache_dir: CacheDir = None,
    cache_size: Annotated[str | None, typer.Option(help="Such as 20G.")] = None,
    max_loras: Annotated[
        int | None, typer.Option(help="Adapter slots on the engine. [from the adapters]")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="Largest rank served. [from the adapters]")
    ] = None,
    load_wait: Annotated[
        float | None,
        typer.Option(help="Seconds a request waits for an adapter that is not here yet. [20]"),
    ] = None,
    allow_cid: Annotated[
        bool | None, typer.Option("--allow-cid", help="Serve any vetted ipfs://CID by that name.")
    ] = None,
    on_demand: Annotated[
        bool | None,
        typer.Option(
            "--on-demand/--no-on-demand",
            help="Load the registry's other adapters when they are asked for. [yes]",
        ),
    ] = None,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds that running requests have at the end. [60]")
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure",
            help="Listen beyond loopback without a key; speak plain HTTP to another machine.",
        ),
    ] = None,
    open_chat: Annotated[
        bool | None,
        typer.Option("--open-chat", help="/chat without a key: the existing backend sends none."),
    ] = None,
    public_metrics: Annotated[
        bool | None, typer.Option("--public-metrics", help="/metrics without a key.")
    ] = None,
    log_requests: Annotated[
        bool | None,
        typer.Option("--log-requests", help="A line for each request: never what was asked."),
    ] = None,
    log_json: Annotated[
        bool | None, typer.Option("--log-json", help="These lines, in JSON.")
    ] = None,
    config: Config = None,
) -> None:
    """Run a serving node. What follows -- goes to vLLM's own parser.

    \b
    Example: r3mes-vllm serve --loras legal,medical --host 127.0.0.1 -- --max-model-len 4096
    """
    given = settings.load(
        {
            "loras": loras,
            "model": model,
            "backend_url": backend_url,
            "backend_ca": backend_ca,
            "serving_node_host": host,
            "serving_node_port": port,
            "serving_node_url": public_url,
            "ssl_certfile": ssl_certfile,
            "ssl_keyfile": ssl_keyfile,
            "ipfs_api_url": ipfs_api,
            "ipfs_gateways": ipfs_gateway or None,
            "cache_dir": cache_dir,
            "cache_size": cache_size,
            "max_loras": max_loras,
            "max_lora_rank": max_lora_rank,
            "load_wait": load_wait,
            "allow_cid": allow_cid,
            "on_demand": on_demand,
            "drain_timeout": drain_timeout,
            "insecure": insecure,
            "open_chat": open_chat,
            "public_metrics": public_metrics,
            "log_requests": log_requests,
            "log_json": log_json,
        },
        config,
    )
    # Until vLLM's server has a handler. In a container this is process 1, which Linux spares a
    # signal that it has none for; nothing here needs an end better than that of kill -9.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    from r3mes_vllm.node import startup

    root = context.find_root()
    if startup.serve(given, context.args, verbose=bool(root.params.get("debug"))):
        raise typer.Exit(130)
