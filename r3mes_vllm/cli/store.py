"""`r3mes-vllm adapter ...`: what an operator does with the local store."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from r3mes_vllm.adapters.catalog import Catalog
from r3mes_vllm.adapters.files import printable
from r3mes_vllm.adapters.store import Damaged, Store
from r3mes_vllm.adapters.supply import Supply
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
from r3mes_vllm.cli.wanted import (
    Model,
    base_of,
    find_wanted,
    print_json,
    require_path_or_name,
    settings_of,
    tell,
)
from r3mes_vllm.errors import UnknownAdapter
from r3mes_vllm.report import Downloads, say, warn
from r3mes_vllm.settings import Settings


def pull(
    what: Annotated[str, typer.Argument(help="A NAME, a CID or CID/PATH.")],
    pin: Annotated[bool, typer.Option("--pin", help="Pin it on the IPFS daemon too.")] = False,
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
    """Fetch, verify and vet an adapter into the local store.

    Example: r3mes-vllm adapter pull legal --ipfs-gateway https://trustless-gateway.link
    """
    given = settings_of(
        *(config, cache_dir, backend_url, ipfs_api, ipfs_gateway, model, pin or None),
        backend_ca=backend_ca,
        insecure=insecure,
    )
    base = base_of(given)

    async def run() -> dict[str, Any]:
        wanted = await find_wanted(given, what)
        supply = Supply.of(given.model_copy(update={"ipfs_pin": False}), base=base)
        with Downloads() as downloads:
            if wanted.where is None:
                got = await supply.import_path(wanted.source)
            else:
                got = await supply.obtain(wanted.where, progress=downloads.of(what))
        with got.lease:
            if given.ipfs_pin and wanted.where is not None:
                await supply.pins.pin(got.cid)
            elif given.ipfs_pin:
                warn(f"not pinned, as it is yours: r3mes-vllm adapter publish {what} --name NAME")
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
    tell(as_json, got, f"{got['cid']} {how}: rank {got['rank']}, {got['bytes']} bytes")


def list_(cache_dir: CacheDir = None, config: Config = None, as_json: Json = False) -> None:
    """List the adapters in the local store, the last used first.

    Example: r3mes-vllm adapter list
    """
    given = settings_of(config, cache_dir)
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
        print_json(rows)
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
    given = settings_of(config, cache_dir, cache_size=cache_size)
    store = _store(given)
    freed = store.collect() + (store.drop_unused() if everything else 0)
    left = len(store.stored())
    tell(
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
    given = settings_of(config, cache_dir)
    store = _store(given)
    only = None
    if what is not None:
        require_path_or_name(what)
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
        print_json(rows)
    if any(row["damage"] for row in rows):
        raise typer.Exit(1)


def _store(given: Settings) -> Store:
    return Store(given.cache_dir, quota=given.cache_size)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


COMMANDS: dict[str, Callable[..., None]] = {
    "pull": pull,
    "list": list_,
    "gc": gc,
    "verify": verify,
}
