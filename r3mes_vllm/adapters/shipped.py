"""The demo's adapters, which come with the package: CAR files listed in `demo/adapters.toml`."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Shipped:
    name: str
    cid: str
    category: str
    description: str
    car: Path


def configs() -> Path:
    """The folder `configs`: inside an installed package, beside it in a checkout."""
    inside = Path(__file__).parent.parent / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


@cache
def adapters() -> tuple[Shipped, ...]:
    folder = configs() / "demo"
    listing = tomllib.loads((folder / "adapters.toml").read_text())
    return tuple(
        Shipped(**entry, car=folder / f"{entry['name']}.car") for entry in listing["adapter"]
    )


def cids() -> dict[str, str]:
    """Name → CID."""
    return {adapter.name: adapter.cid for adapter in adapters()}
