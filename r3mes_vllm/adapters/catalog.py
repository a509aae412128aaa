"""Which adapters to serve: names and CIDs from the command line, the backend, the last run.

The catalog of the last run lies in `STATE_DIR/catalog.json`, and the adapters' system prompts and
categories in files beside it, so that a node starts with the adapters it knows while the backend is
away.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter, ValidationError

from r3mes_vllm import choice
from r3mes_vllm.adapters import shipped
from r3mes_vllm.errors import BadCID, ConfigError, UnknownAdapter
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.state_dir import refuse_newer
from r3mes_vllm.wire import SYSTEM_PROMPT_CHARACTERS, AdapterName, Lora

_NAME = TypeAdapter(AdapterName)
_FILE = "catalog.json"
_PROMPTS = "system-prompts.json"
_CATEGORIES = "categories.json"
ALL, FIRST = "all", "first"
"""Policies."""


@dataclass(frozen=True)
class Wanted:
    """An adapter to serve: `where` in IPFS, or, without that, in a local directory or CAR at
    `source`."""

    name: str
    where: IpfsPath | None
    source: Path = Path()
    listed: bool = False
    """The registry says what the name stands for, and may say otherwise later."""


Policy = Callable[[Sequence[Lora]], Sequence[Lora]]
"""Chooses from the registry's adapters when `--loras` is not given."""


class Catalog:
    """`registry` is the backend's list of adapters, or None while it can't be reached."""

    def __init__(self, state_dir: Path, registry: Sequence[Lora] | None) -> None:
        refuse_newer(state_dir)
        self._state_dir = state_dir
        self._registry = registry
        if registry is None:
            self._known, self._prompts = self._read(_FILE), self._read(_PROMPTS)
            self._categories = self._read(_CATEGORIES)
        else:
            self._known = {it.name: it.ipfs_hash for it in registry}
            self._prompts = {it.name: it.system_prompt for it in registry if it.system_prompt}
            self._categories = {it.name: it.category for it in registry if it.category}
        self.warnings: list[str] = []

    def choose(self, items: Sequence[str], policy: str) -> list[Wanted]:
        """The adapters named by `--loras` items, or chosen by `policy` if there are none.

        Raises UnknownAdapter, BadCID or ConfigError naming the item that can't be had. While the
        registry can't be reached, a name that nobody knows here is a warning.
        """
        if not items:
            return self._chosen(policy)
        wanted: dict[str, Wanted] = {}
        for item in items:
            try:
                read = self._read_item(item)
            except UnknownAdapter as error:
                if self._registry is not None or len(items) == 1:
                    raise
                self.warnings.append(f"adapter {item!r} is left out: {error}")
                continue
            for one in read:
                if one.name in wanted:
                    raise ConfigError(f"--loras names {one.name!r} twice")
                wanted[one.name] = one
        return list(wanted.values())

    def find(self, what: str) -> Wanted:
        """One adapter: a file or a folder, a CID with or without a path below it, or a name.

        Raises UnknownAdapter or ConfigError.
        """
        if (path := Path(what).expanduser()).exists():
            return Wanted(path.name, None, path.absolute())
        try:
            return Wanted(what, IpfsPath.parse(what))
        except BadCID:
            return self.by_name(what)

    def by_name(self, name: str) -> Wanted:
        """Raises what `place_of` raises."""
        return Wanted(name, self.place_of(name), listed=True)

    def place_of(self, name: str) -> IpfsPath:
        """Raises UnknownAdapter, ConfigError for what is no name, BadCID for what the registry
        says of it."""
        where_it_is = self._known.get(checked_name(name)) or shipped.cids().get(name)
        if where_it_is is None:
            where = "the backend's registry" if self._registry is not None else "the last run"
            also = ", ".join(sorted({*self._known, *shipped.cids()}))
            raise UnknownAdapter(
                f"no adapter named {name!r} in {where}",
                hint=f"known: {also}; or give its CID: --loras {name}=CID",
            )
        return IpfsPath.parse(where_it_is)

    def system_prompt_of(self, name: str) -> str | None:
        """Raises ConfigError for one that is too long."""
        prompt = self._prompts.get(name)
        if prompt and len(prompt) > SYSTEM_PROMPT_CHARACTERS:
            raise ConfigError(
                f"its system prompt has {len(prompt)} characters, "
                f"{SYSTEM_PROMPT_CHARACTERS} are the most"
            )
        return prompt

    @staticmethod
    def is_place(what: str) -> bool:
        """Whether `find` needs no registry."""
        try:
            return Path(what).expanduser().exists() or bool(IpfsPath.parse(what))
        except BadCID:
            return False

    def names(self) -> dict[str, list[str]]:
        """CID → the names under which it is known."""
        found: dict[str, list[str]] = {}
        for name, where in sorted({**shipped.cids(), **self._known}.items()):
            found.setdefault(where, []).append(name)
        return found

    def remember(self, wanted: Mapping[str, CID]) -> None:
        """Keep these names for the next start. A state directory that can't be written is no
        reason not to serve."""
        known = self._known | {name: str(cid) for name, cid in wanted.items()}
        self._write(_FILE, known)
        fits = {
            name: prompt
            for name, prompt in self._prompts.items()
            if len(prompt) <= SYSTEM_PROMPT_CHARACTERS
        }
        self._write(_PROMPTS, fits)
        self._write(_CATEGORIES, self._categories)

    def _read_item(self, item: str) -> list[Wanted]:
        if item == ALL or item.startswith("category:"):
            return self._chosen(item)
        name, equals, value = item.partition("=")
        if not equals:
            return [self.by_name(name)]
        if os.path.exists(os.path.expanduser(value)):
            return [Wanted(checked_name(name), None, Path(value).expanduser().absolute())]
        try:
            return [Wanted(checked_name(name), IpfsPath.parse(value))]
        except BadCID as error:
            raise BadCID(
                f"--loras {item}: {value!r} is neither a file nor a CID ({error})",
                hint="write name=CID, name=FILE.car or name=DIRECTORY",
            ) from error

    def _chosen(self, policy: str) -> list[Wanted]:
        """What a policy chooses; an entry that nobody could serve is a warning, not an error."""
        wanted = []
        for lora in _policy(policy)(self._listed()):
            try:
                where = IpfsPath.parse(lora.ipfs_hash)
                wanted.append(Wanted(checked_name(lora.name), where, listed=True))
            except (BadCID, ConfigError) as error:
                self.warnings.append(f"the registry's adapter {lora.name!r} is left out: {error}")
        return wanted

    def _listed(self) -> Sequence[Lora]:
        if self._registry:
            return self._registry
        known = self._known or shipped.cids()
        return [
            Lora(id=0, name=name, ipfs_hash=cid, category=self._categories.get(name))
            for name, cid in known.items()
        ]

    def _write(self, name: str, values: Mapping[str, str]) -> None:
        file = self._state_dir / name
        aside = file.with_suffix(f".{os.getpid()}")
        try:
            self._state_dir.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(values, indent=1))
            os.replace(aside, file)
        except OSError:
            aside.unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, str]:
        try:
            values = json.loads((self._state_dir / name).read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(values, dict):
            return {}
        return {key: value for key, value in values.items() if isinstance(value, str)}


def checked_name(name: str) -> str:
    """Raises ConfigError for what can't be an adapter's name."""
    try:
        return _NAME.validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"{name!r} can't be an adapter's name: letters, digits, '.', '_' and '-' only"
        ) from None


def _policy(text: str) -> Policy:
    if text == ALL:
        return lambda loras: loras
    if text == FIRST:
        return lambda loras: loras[:1]
    if text.startswith("category:"):
        category = text.removeprefix("category:")
        return lambda loras: [lora for lora in loras if lora.category == category]
    return cast(Policy, choice.load(text))
