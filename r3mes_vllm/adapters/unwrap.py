"""What a CID holds, as an adapter's directory: perhaps an archive of one, or the weights alone."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r3mes_vllm.adapters.files import (
    CONFIG,
    CONFIG_DEPTH,
    MAX_CONFIG,
    WEIGHTS,
    Tensor,
    parse_json,
    read_header,
)
from r3mes_vllm.errors import AdapterRefused
from r3mes_vllm.ipfs import archive
from r3mes_vllm.ipfs.tree import Limits

_MOST_WRAPPINGS = 4
_SIDE_A = ".lora_A.weight"


def unwrap(fetched: Path, work: Path, limits: Limits) -> tuple[Path, tuple[str, ...]]:
    """The directory of the adapter in `fetched`, and notes on it; archives are unpacked in `work`.

    A folder or an archive that holds nothing but one other is looked into. Raises BadArchive,
    ContentTooLarge, or AdapterRefused for a file that is no adapter.
    """
    here = fetched
    for turn in range(_MOST_WRAPPINGS):
        if here.is_file():
            if archive.kind(here) is not None:
                unpacked = work / f"unpacked-{turn}"
                archive.unpack(here, unpacked, limits)
                here = unpacked
                continue
            return _of_weights(here, work)
        if (here / CONFIG).exists() or (here / WEIGHTS).exists():
            break
        inside = [path for path in here.iterdir() if not path.name.startswith(".")]
        if len(inside) != 1:
            break
        here = inside[0]
    return here, ()


def _of_weights(file: Path, work: Path) -> tuple[Path, tuple[str, ...]]:
    """A folder with the lone weights `file`, which stays where it is, and the configuration that
    its tensors imply."""
    file = file.resolve()
    try:
        tensors, metadata = read_header(file)
    except AdapterRefused as error:
        raise AdapterRefused(
            "files_are_there",
            f"it is one file, and neither an archive nor safetensors weights ({error})",
            hint="publish the adapter's folder: r3mes-vllm adapter publish DIR --name NAME",
        ) from error
    told = _told(metadata)
    config = told or _implied(tensors)
    folder = work / "lone"
    folder.mkdir()
    try:
        os.link(file, folder / WEIGHTS)
    except OSError:  # on another disk, or somebody else's
        shutil.copyfile(file, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    if told:
        return folder, (f"a lone file: {CONFIG} is taken from its metadata",)
    return folder, (
        f"a lone file without {CONFIG}: rank {config['r']} by its tensors, and lora_alpha as "
        "large, so that the adapter is added as it is",
    )


def _told(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The configuration that some tools write into the weights' metadata."""
    for text in metadata.values():
        if len(text) > MAX_CONFIG or not text.lstrip().startswith("{"):
            continue
        try:
            found = parse_json(text.encode(), "metadata", "config_is_json", CONFIG_DEPTH)
        except AdapterRefused:
            continue
        if "r" in found and "lora_alpha" in found:
            return found
    return None


def _implied(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    sides_a = {name: it.shape for name, it in tensors.items() if name.endswith(_SIDE_A)}
    ranks = {shape[0] for shape in sides_a.values() if shape}
    if len(ranks) != 1:
        raise AdapterRefused(
            "files_are_there",
            f"it is one file without {CONFIG}, and its tensors are not those of one rank",
            hint="publish the adapter's folder: r3mes-vllm adapter publish DIR --name NAME",
        )
    targets = {name.removesuffix(_SIDE_A).rpartition(".")[2] for name in sides_a}
    rank = ranks.pop()
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted(targets),
    }
