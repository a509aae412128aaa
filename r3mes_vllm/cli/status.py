"""`r3mes-vllm status`."""

import asyncio
import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from r3mes_vllm import settings
from r3mes_vllm.adapters.files import printable
from r3mes_vllm.cli.options import Config, Host, Port
from r3mes_vllm.node.standing import (
    Observer,
    Rates,
    Reading,
    rates,
    total,
    why_no_requests,
    with_noted_place,
)
from r3mes_vllm.settings import Settings

_EVERY_S = 1.0
_WIDE = 240
"""Columns where no terminal has fewer."""


def status(
    host: Host = None,
    port: Port = None,
    watch: Annotated[bool, typer.Option("--watch", help="Until Ctrl-C, each second.")] = False,
    config: Config = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A document; a line each second.")
    ] = False,
) -> None:
    """Show how the node on this machine is doing, and why it gets no requests if it gets none.

    The exit status is 0 when it is ready, 1 when it isn't or does not run.

    Example: r3mes-vllm status --watch
    """
    asked = {"serving_node_host": host, "serving_node_port": port}
    given, origins = settings.load_with_origins(asked, config)
    if all(origins[it] == "default" for it in asked):
        given = with_noted_place(given)
    if not asyncio.run(_show(given, watch=watch, as_json=as_json)):
        raise typer.Exit(1)


async def _show(given: Settings, *, watch: bool, as_json: bool) -> bool:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    async with Observer(given) as observer:
        before = await observer.look()
        if before.node is not None or watch:
            await asyncio.sleep(_EVERY_S)
        if watch and not as_json and console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    now = await observer.look()
                    live.update(_page(now, rates(before, now)), refresh=True)
                    before = now
                    await asyncio.sleep(_EVERY_S)
        while True:
            now = await observer.look()
            if as_json:
                typer.echo(json.dumps(_document(now, rates(before, now)), indent=_indent(watch)))
            else:
                console.print(_page(now, rates(before, now)))
            if not watch:
                return now.ready
            before = now
            await asyncio.sleep(_EVERY_S)


def _indent(watch: bool) -> int | None:
    return None if watch else 2


def _document(reading: Reading, grown: Rates | None) -> dict[str, Any]:
    return {
        "url": reading.url,
        "ready": reading.ready,
        "why": why_no_requests(reading),
        "rates": asdict(grown) if grown else None,
        "listed": reading.listed,
        "node": reading.node,
    }


def _page(reading: Reading, grown: Rates | None) -> Group:
    node, why = reading.node, Text(printable(why_no_requests(reading)), style="bold")
    if node is None:
        return Group(Text(f"node at {reading.url}: not running"), why)
    beat = "none yet" if node["beat_age_s"] is None else f"{node['beat_age_s']:.0f} s ago"
    state = "ready" if reading.ready else f"not ready: {node['reason']}"
    lines = [
        f"node at {reading.url}: {state}, up {_duration(node['up_s'])}, version {node['version']}",
        f"wallet {node['wallet_address']}, public URL {node['public_url']}",
        f"backend {node['backend']}, last heartbeat {beat}",
        f"{node['running']} requests running, {node['waiting']:.0f} in the queue, "
        f"{node['kv_cache']:.0%} of the KV cache in use",
    ]
    if grown:
        lines.append(
            f"{grown.requests:.1f} requests/s, {grown.generated_tokens:.0f} tokens/s generated, "
            f"{grown.prompt_tokens:.0f} tokens/s of prompts"
        )
    lines.append(
        f"since the start: {total(node, 'complete'):.0f} requests answered, "
        f"{total(node, 'generated_tokens'):.0f} tokens generated, "
        f"{total(node, 'prompt_tokens'):.0f} of prompts"
    )
    parts = [Text(printable(line)) for line in lines]
    return Group(*parts, _adapters(node), *_refusals(node), why)


def _adapters(node: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("adapter", "tier"):
        table.add_column(name, overflow="fold")
    for name in ("running", "answered", "refused", "failed", "tokens", "TTFT p50", "p95", "last"):
        table.add_column(name, justify="right")
    table.add_column("CID", overflow="ellipsis", no_wrap=True)
    counted = node["requests"]
    tiers = {name: it for it in node["adapters"] for name in it["names"] or [it["name"]]}
    for name in [*tiers, *(it for it in counted if it not in tiers)]:
        of = counted.get(name, {})
        if name not in tiers and not any(of.get(it) for it in ("complete", "refused", "running")):
            continue
        last = of.get("last_s_ago")
        table.add_row(
            printable(name),
            tiers.get(name, {}).get("state", ""),
            *(str(of.get(it, 0)) for it in ("running", "complete", "refused", "failed")),
            str(of.get("generated_tokens", 0)),
            _seconds(of.get("first_token_p50_s")),
            _seconds(of.get("first_token_p95_s")),
            "never" if last is None else f"{_duration(last)} ago",
            tiers.get(name, {}).get("cid", ""),
        )
    return table


def _refusals(node: dict[str, Any]) -> list[Text]:
    last = [
        f"  {it['time']}  {it['status']} {it['code']}, {it['route']}"
        + (f", {it['adapter']}" if it["adapter"] else "")
        + (f", {it['count']} times" if it["count"] > 1 else "")
        for it in node["refusals"][-5:]
    ]
    last += [f"  adapters, by the rule {rule}: {n}" for rule, n in node["adapter_refusals"].items()]
    return [Text("last refusals:"), *(Text(printable(it)) for it in last)] if last else []


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} s"


def _duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h`, `5 d`."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
