"""`r3mes-vllm adapter ...`: what an author does with an adapter."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from r3mes_vllm import state_dir
from r3mes_vllm.adapters import inspection
from r3mes_vllm.adapters.catalog import checked_name
from r3mes_vllm.adapters.files import printable, short
from r3mes_vllm.adapters.manifest import FILES
from r3mes_vllm.adapters.publish import public_name, read_system_prompt
from r3mes_vllm.adapters.publish import publish as publish_adapter
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import LARGEST_RANK
from r3mes_vllm.cli.options import (
    Api,
    BackendCa,
    BackendUrl,
    CacheDir,
    Config,
    Gateways,
    Insecure,
    Json,
)
from r3mes_vllm.cli.wanted import Model, What, base_of, find_wanted, print_json, settings_of, tell
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.identity import Identity
from r3mes_vllm.ipfs.pack import pack as pack_folder
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.line import refuse_plain_http
from r3mes_vllm.node.signer import Signer
from r3mes_vllm.report import Downloads, say
from r3mes_vllm.wire import RegisterLora


def inspect(
    what: What,
    model: Model = None,
    backend_url: BackendUrl = None,
    ipfs_api: Api = None,
    ipfs_gateway: Gateways = None,
    cache_dir: CacheDir = None,
    config: Config = None,
    backend_ca: BackendCa = None,
    insecure: Insecure = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter is, and what every safety rule says of it. Exit 1 if it is refused.

    Example: r3mes-vllm adapter inspect ./my-adapter --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    given = settings_of(
        *(config, cache_dir, backend_url, ipfs_api, ipfs_gateway, model),
        backend_ca=backend_ca,
        insecure=insecure,
    )
    base = base_of(given)

    async def look() -> inspection.Inspection:
        wanted = await find_wanted(given, what)
        with Downloads() as downloads:
            progress = downloads.of(what)
            async with Supply.of(given).peek(wanted.where or wanted.source, progress) as fetched:
                return await asyncio.to_thread(
                    inspection.inspect,
                    fetched,
                    base=base,
                    max_rank=given.max_lora_rank or LARGEST_RANK,
                    follow_links=fetched == wanted.source,
                )

    found = asyncio.run(look())
    if as_json:
        print_json({**dataclasses.asdict(found), "accepted": found.accepted})
    else:
        say(f"base model  {short(found.base_model)[1:-1] if found.base_model else 'not named'}")
        say(f"rank        {found.rank or '?'}   lora_alpha {found.alpha or '?'}")
        say(f"targets     {printable(', '.join(found.targets))[:1000] or '?'}")
        say(f"weights     {found.bytes if found.bytes is not None else '?'} bytes")
        for finding in found.findings:
            say(f"{finding.verdict:12}{finding.rule}: {printable(finding.message)}")
            if finding.hint:
                say(f"{'':12}  try: {printable(finding.hint)}")
        for note in found.notes:
            say(f"{'note':12}{printable(note)}")
        say("accepted" if found.accepted else "refused")
    if not found.accepted:
        raise typer.Exit(1)


def pack(
    directory: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The CAR file to write.")],
    as_json: Json = False,
) -> None:
    """Write a folder as a CAR file, the same bytes every time, under the CID that Kubo gives it.

    Example: r3mes-vllm adapter pack ./my-adapter -o my-adapter.car
    """
    cid = pack_folder(directory, output, linked=FILES)
    size = output.stat().st_size
    tell(as_json, {"cid": str(cid), "file": str(output), "bytes": size}, f"{cid} {output} {size}")


def publish(
    directory: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    name: Annotated[str, typer.Option(help="Under which users ask for it.")],
    description: Annotated[str, typer.Option()] = "",
    category: Annotated[str, typer.Option()] = "",
    version: Annotated[str, typer.Option()] = "1.0.0",
    system_prompt: Annotated[
        str | None,
        typer.Option(help="TEXT or @FILE, which /chat puts before what a user says."),
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="Holds the backend's admin key, where a name needs it.")
    ] = None,
    no_daemon: Annotated[
        bool, typer.Option("--no-daemon", help="Register only: others keep the CAR file of `pack`.")
    ] = False,
    model: Model = None,
    backend_url: BackendUrl = None,
    ipfs_api: Api = None,
    config: Config = None,
    backend_ca: BackendCa = None,
    insecure: Insecure = None,
    as_json: Json = False,
) -> None:
    """Vet a folder, add it to the IPFS daemon, pin it there, and register it with the backend.

    The name then belongs to the key in the state directory.

    Example: r3mes-vllm adapter publish ./my-adapter --name legal
    """
    given = settings_of(
        *(config, None, backend_url, ipfs_api, None, model),
        backend_ca=backend_ca,
        insecure=insecure,
    )
    base = base_of(given)
    checked_name(name)
    prompt = read_system_prompt(system_prompt) if system_prompt is not None else None
    admin_key = _first_line(admin_key_file) if admin_key_file else None
    if not given.insecure:
        refuse_plain_http(given.backend)
    state_dir.prepare(given.state_dir)
    signer = Signer(Identity.load(given.state_dir))
    daemon = None if no_daemon else given.ipfs_api_url

    async def run() -> str:
        cid, facts = await publish_adapter(directory, api=daemon, base=base)
        lora = RegisterLora(
            name=name,
            ipfs_hash=str(cid),
            description=description,
            category=category,
            version=version,
            system_prompt=prompt,
            base_model=public_name(facts.base_model),
            size_bytes=facts.size,
            rank=facts.rank,
        )
        async with BackendClient.of(given, signer) as client:
            await client.register_lora(lora, admin_key=admin_key)
        return str(cid)

    cid = asyncio.run(run())
    tell(
        as_json,
        {"cid": cid, "name": name, "daemon": daemon, "backend": given.backend},
        f"{cid} is {f'pinned on {daemon} and ' if daemon else ''}registered as {name} with "
        f"{given.backend}",
    )


def _first_line(file: Path) -> str:
    """Raises ConfigError."""
    try:
        return file.expanduser().read_text(encoding="ascii").partition("\n")[0].strip()
    except (OSError, UnicodeError, RuntimeError) as error:
        raise ConfigError(f"can't read the key in {file}: {error}") from error


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "pack": pack,
    "publish": publish,
}
