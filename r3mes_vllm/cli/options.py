"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Config = Annotated[Path | None, typer.Option(help="TOML file with settings.")]
CacheDir = Annotated[Path | None, typer.Option(help="Models and adapters.")]
Api = Annotated[str | None, typer.Option(help="RPC of an IPFS daemon. [http://127.0.0.1:5001]")]
Gateways = Annotated[
    list[str] | None, typer.Option(help="Trustless gateway; may be given several times.")
]
BackendUrl = Annotated[str | None, typer.Option(help="The backend.")]
BackendCa = Annotated[
    Path | None, typer.Option(help="Certificates to trust there. [the public ones]")
]
Insecure = Annotated[
    bool | None, typer.Option("--insecure", help="Speak plain HTTP to another machine.")
]
Host = Annotated[str | None, typer.Option(help="Address that the node listens on. [0.0.0.0]")]
Port = Annotated[int | None, typer.Option(help="[8081]")]
PublicUrl = Annotated[str | None, typer.Option(help="Where the network reaches this node.")]
