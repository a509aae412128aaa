"""`r3mes-vllm adapter ...`: what an author publishes, and what an operator keeps."""

import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from r3mes_vllm import settings
from r3mes_vllm.adapters import inspection
from r3mes_vllm.adapters.catalog import Catalog, Wanted, checked_name
from r3mes_vllm.adapters.files import printable, short
from r3mes_vllm.adapters.publish import publish as publish_adapter
from r3mes_vllm.adapters.store import Damaged, Store
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import LARGEST_RANK
from r3mes_vllm.engine.model import served_name, shape_of
from r3mes_vllm.errors import BackendError, ConfigError, UnknownAdapter
from r3mes_vllm.ipfs.pack import pack as pack_folder
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.report import Downloads, say, warn
from r3mes_vllm.settings import Settings
from r3mes_vllm.wire import RegisterLora

Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Config = Annotated[Path | None, typer.Option(help="TOML file with settings.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where adapters are kept.")]
Api = Annotated[str | None, typer.Option(help="RPC of an IPFS daemon. [http://127.0.0.1:5001]")]
Gateways = Annotated[
    list[str] | None, typer.Option(help="Trustless gateway; may be given several times.")
]
BackendUrl = Annotated[str | None, typer.Option(help="Whose registry knows the names.")]
Model = Annotated[
    str | None, typer.Option(help="Hub name or directory of the base model it must fit.")
]
What = Annotated[str, typer.Argument(help="A directory, a CAR, a CID, CID/PATH or a NAME.")]


def inspect(
    what: What,
    model: Model = None,
    backend_url: BackendUrl = None,
    ipfs_api: Api = None,
    ipfs_gateway: Gateways = None,
    cache_dir: CacheDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter is, and what every safety rule says of it. Exit 1 if it is refused.

    Example: r3mes-vllm adapter inspect ./my-adapter --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    given = _settings(config, cache_dir, backend_url, ipfs_api, ipfs_gateway, model)
    base = shape_of(given.model, served_name(given.model)) if given.model else None

    async def look() -> inspection.Inspection:
        wanted = await _wanted(given, what)
        with Downloads() as downloads:
            progress = downloads.of(what)
            async with Supply.of(given).peek(wanted.where or wanted.source, progress) as fetched:
                return await asyncio.to_thread(
                    inspection.inspect,
                    fetched,
                    base=base,
                    max_rank=given.max_lora_rank or LARGEST_RANK,
                )

    found = asyncio.run(look())
    if as_json:
        _print_json({**dataclasses.asdict(found), "accepted": found.accepted})
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
    cid = pack_folder(directory, output)
    size = output.stat().st_size
    _tell(as_json, {"cid": str(cid), "file": str(output), "bytes": size}, f"{cid} {output} {size}")


def publish(
    directory: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    name: Annotated[str, typer.Option(help="Under which users ask for it.")],
    description: Annotated[str, typer.Option()] = "",
    category: Annotated[str, typer.Option()] = "",
    version: Annotated[str, typer.Option()] = "1.0.0",
    model: Model = None,
    backend_url: BackendUrl = None,
    ipfs_api: Api = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Vet a folder, add it to the IPFS daemon, pin it there, and register it with the backend.

    Example: r3mes-vllm adapter publish ./my-adapter --name legal
    """
    given = _settings(config, None, backend_url, ipfs_api, None, model)
    base = shape_of(given.model, served_name(given.model)) if given.model else None
    checked_name(name)

    async def run() -> str:
        cid = await publish_adapter(directory, api=given.ipfs_api_url, base=base)
        lora = RegisterLora(
            name=name,
            ipfs_hash=str(cid),
            description=description,
            category=category,
            version=version,
        )
        async with BackendClient(given.backend) as client:
            await client.register_lora(lora)
        return str(cid)

    cid = asyncio.run(run())
    _tell(
        as_json,
        {"cid": cid, "name": name, "daemon": given.ipfs_api_url, "backend": given.backend},
        f"{cid} is pinned on {given.ipfs_api_url} and registered as {name} with {given.backend}",
    )


def pull(
    what: Annotated[str, typer.Argument(help="A NAME, a CID or CID/PATH.")],
    pin: Annotated[bool, typer.Option("--pin", help="Pin it on the IPFS daemon too.")] = False,
    model: Model = None,
    backend_url: BackendUrl = None,
    ipfs_api: Api = None,
    ipfs_gateway: Gateways = None,
    cache_dir: CacheDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Fetch, verify and vet an adapter into the local store.

    Example: r3mes-vllm adapter pull legal --ipfs-gateway https://trustless-gateway.link
    """
    given = _settings(config, cache_dir, backend_url, ipfs_api, ipfs_gateway, model, pin or None)
    base = shape_of(given.model, served_name(given.model)) if given.model else None

    async def run() -> dict[str, Any]:
        wanted = await _wanted(given, what)
        supply = Supply.of(given, base=base)
        with Downloads() as downloads:
            if wanted.where is None:
                got = await supply.import_path(wanted.source)
            else:
                got = await supply.obtain(wanted.where, progress=downloads.of(what))
        with got.lease:
            return {
                "cid": str(got.cid),
                "path": str(got.path),
                "fetched": got.fetched,
                "rank": got.facts.rank,
                "bytes": got.facts.size,
                "notes": [*got.facts.warnings, *got.facts.notes],
            }

    got = asyncio.run(run())
    for note in got["notes"]:
        warn(printable(note))
    how = "fetched and verified" if got["fetched"] else "was here already"
    _tell(as_json, got, f"{got['cid']} {how}: rank {got['rank']}, {got['bytes']} bytes")


def list_(cache_dir: CacheDir = None, config: Config = None, as_json: Json = False) -> None:
    """List the adapters in the local store, the last used first.

    Example: r3mes-vllm adapter list
    """
    given = _settings(config, cache_dir)
    store = _store(given)
    names = Catalog(given.state_dir, None).names()
    stored = store.stored()
    if as_json:
        rows = [
            {
                "cid": str(it.cid),
                "names": names.get(str(it.cid), []),
                "bytes": it.bytes,
                "fetched_at": _time(it.fetched_at),
                "used_at": _time(it.used_at),
                "in_use": it.in_use,
                "notes": list(it.notes),
            }
            for it in stored
        ]
        _print_json(rows)
        return
    for it in stored:
        use = "in use" if it.in_use else "used"
        known = " ".join(names.get(str(it.cid), []))
        say(f"{it.cid}  {it.bytes:>12}  {use} {_time(it.used_at)}  {known}")
    quota = given.cache_size
    say(f"{len(stored)} adapters; {store.used()} bytes of {quota} in {given.cache_dir}")


def gc(
    everything: Annotated[
        bool, typer.Option("--all", help="Every adapter that no node is using.")
    ] = False,
    cache_dir: CacheDir = None,
    cache_size: Annotated[str | None, typer.Option(help="Such as 20G.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Free disk: what crashes left, and the least recently used adapters over --cache-size.

    Example: r3mes-vllm adapter gc --cache-size 20G
    """
    given = _settings(config, cache_dir, cache_size=cache_size)
    store = _store(given)
    freed = store.collect() + (store.drop_unused() if everything else 0)
    left = len(store.stored())
    _tell(
        as_json,
        {"freed_bytes": freed, "adapters": left, "bytes": store.used()},
        f"{freed} bytes freed; {left} adapters of {store.used()} bytes are left",
    )


def verify(
    what: Annotated[str | None, typer.Argument(help="A NAME or a CID. [all]")] = None,
    cache_dir: CacheDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Hash what is in the local store, and drop what is damaged. Exit 1 if anything was.

    Example: r3mes-vllm adapter verify
    """
    given = _settings(config, cache_dir)
    store = _store(given)
    only = None
    if what is not None:
        _require_path_or_name(what)
        wanted = Catalog(given.state_dir, None).find(what)
        only = wanted.where.root if wanted.where else None
        if only not in [it.cid for it in store.stored()]:
            raise UnknownAdapter(
                f"{what} is not in {given.cache_dir}", hint="r3mes-vllm adapter list"
            )
    rows: list[dict[str, object]] = []
    for it in store.fsck(only):
        damage = it.problem if isinstance(it, Damaged) else None
        dropped = isinstance(it, Damaged) and it.dropped
        rows.append({"cid": str(it.cid), "damage": damage, "dropped": dropped})
        if not as_json:
            verdict = "is sound" if damage is None else f"is damaged: {damage}"
            after = "; dropped, it will be fetched again" if dropped else ""
            in_use = "; a node is using it: stop that first" if damage and not dropped else ""
            say(f"{it.cid} {verdict}{after}{in_use}")
    if as_json:
        _print_json(rows)
    if any(row["damage"] for row in rows):
        raise typer.Exit(1)


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "pack": pack,
    "publish": publish,
    "pull": pull,
    "list": list_,
    "gc": gc,
    "verify": verify,
}


def _settings(
    config: Path | None,
    cache_dir: Path | None = None,
    backend_url: str | None = None,
    ipfs_api: str | None = None,
    ipfs_gateway: list[str] | None = None,
    model: str | None = None,
    pin: bool | None = None,
    cache_size: str | None = None,
) -> Settings:
    return settings.load(
        {
            "cache_dir": cache_dir,
            "cache_size": cache_size,
            "backend_url": backend_url,
            "ipfs_api_url": ipfs_api,
            "ipfs_gateways": ipfs_gateway or None,
            "ipfs_pin": pin,
            "model": model,
        },
        config,
    )


def _store(given: Settings) -> Store:
    return Store(given.cache_dir, quota=given.cache_size)


async def _wanted(given: Settings, what: str) -> Wanted:
    """A path or a CID as it is; a name by the backend's registry, or by the last run."""
    known = Catalog(given.state_dir, None)
    _require_path_or_name(what)
    if known.is_place(what):
        return known.find(what)
    try:
        async with BackendClient(given.backend) as client:
            return Catalog(given.state_dir, await client.loras()).find(what)
    except BackendError as error:
        warn(f"{error}; asking the last run")
        return known.find(what)


def _require_path_or_name(what: str) -> None:
    """Raises ConfigError for what the system can't look for."""
    try:
        Path(what).expanduser().exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{short(what)} can't be looked for: {str(error)[:80]}",
            hint="give a directory, a CAR, a CID, CID/PATH or a name",
        ) from error


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _tell(as_json: bool, values: dict[str, Any], text: str) -> None:
    if as_json:
        _print_json(values)
    else:
        say(text)


def _print_json(values: object) -> None:
    json.dump(values, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")
