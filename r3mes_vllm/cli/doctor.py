"""`r3mes-vllm doctor`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from r3mes_vllm import settings
from r3mes_vllm.adapters.files import printable
from r3mes_vllm.cli.options import (
    Api,
    BackendCa,
    BackendUrl,
    CacheDir,
    Config,
    Gateways,
    Host,
    Insecure,
    Json,
    Port,
    PublicUrl,
)
from r3mes_vllm.state_dir import refuse_newer

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def doctor(
    loras: Annotated[str | None, typer.Option(help="As of serve.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub name or directory.")] = None,
    backend_url: BackendUrl = None,
    backend_ca: BackendCa = None,
    insecure: Insecure = None,
    host: Host = None,
    port: Port = None,
    public_url: PublicUrl = None,
    ipfs_api: Api = None,
    ipfs_gateway: Gateways = None,
    cache_dir: CacheDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Say what keeps a node from serving, and how to mend it. Exit status 1 if something does.

    Example: r3mes-vllm doctor --port 8080
    """
    given = settings.load(
        {
            "loras": loras,
            "model": model,
            "backend_url": backend_url,
            "backend_ca": backend_ca,
            "insecure": insecure,
            "ipfs_gateways": ipfs_gateway or None,
            "serving_node_host": host,
            "serving_node_port": port,
            "serving_node_url": public_url,
            "ipfs_api_url": ipfs_api,
            "cache_dir": cache_dir,
        },
        config,
    )
    refuse_newer(given.state_dir)
    from r3mes_vllm.node.doctor.checks import checks
    from r3mes_vllm.node.doctor.findings import Finding, examine
    from r3mes_vllm.node.doctor.threads import run

    console = Console(highlight=False, soft_wrap=True)

    def show(found: Finding) -> None:
        if as_json:
            return
        word = "FAIL" if found.status == "fail" else found.status
        console.print(f"{word:4}", style=_COLOURS[found.status], end=" ")
        console.print(f"{found.check}: {printable(found.message)}", markup=False)
        if found.fix:
            console.print(f"       {printable(found.fix)}", markup=False)

    found = run(examine(checks(given), show))
    failed = sum(it.status == "fail" for it in found)
    if as_json:
        typer.echo(json.dumps([asdict(it) for it in found], indent=2))
    else:
        console.print(f"{len(found)} checks, {failed} failed")
    if failed:
        raise typer.Exit(1)
