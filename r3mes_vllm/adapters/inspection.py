"""The verdict of every safety rule on one adapter, for a person who wants to know why."""

import inspect as source
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from r3mes_vllm.adapters.files import Candidate, open_candidate
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.unwrap import unwrap
from r3mes_vllm.adapters.vetting import RULES, facts_of
from r3mes_vllm.errors import AdapterRefused
from r3mes_vllm.ipfs.disk import disk_errors_are_said
from r3mes_vllm.ipfs.tree import Limits

_READING = "files_can_be_read"
_NEEDS_BASE = "shapes_fit"


@dataclass(frozen=True)
class Finding:
    """What one rule says of an adapter."""

    rule: str
    verdict: Literal["ok", "refused", "not checked"]
    message: str
    """Why it is refused, or what the rule is for."""
    hint: str = ""


@dataclass(frozen=True)
class Inspection:
    """What an adapter is, as far as it could be read, and what each rule says of it."""

    findings: tuple[Finding, ...]
    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    bytes: int | None
    """Of the weights."""
    base_model: str | None
    notes: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        """No rule refuses it."""
        return all(finding.verdict != "refused" for finding in self.findings)


def inspect(
    fetched: Path,
    *,
    base: ModelShape | None,
    max_rank: int,
    limits: Limits | None = None,
    follow_links: bool = False,
) -> Inspection:
    """Look at what was fetched: a directory, an archive or a file. Raises BadArchive and
    ContentTooLarge for an archive that may not be unpacked, StorageFull."""
    with tempfile.TemporaryDirectory() as work, disk_errors_are_said(Path(work)):
        try:
            directory, notes = unwrap(fetched, Path(work), limits or Limits())
            mine = follow_links and not directory.is_relative_to(work)
            candidate = open_candidate(directory, base=base, max_rank=max_rank, follow_links=mine)
        except AdapterRefused as error:
            finding = Finding(error.rule, "refused", str(error), error.hint)
            return Inspection((finding,), None, None, (), None, None, ())
        return _inspect(candidate, notes)


def _inspect(candidate: Candidate, notes: Sequence[str]) -> Inspection:
    findings = [Finding(_READING, "ok", "configuration and header are sound")]
    for rule in RULES:
        name = rule.__name__
        text = " ".join((source.getdoc(rule) or "").split())
        try:
            rule(candidate)
        except AdapterRefused as error:
            findings.append(Finding(name, "refused", str(error), error.hint))
            continue
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            # It relies on what an earlier rule has just refused.
            if all(finding.verdict != "refused" for finding in findings):
                raise
            findings.append(Finding(name, "not checked", "because of what is refused above"))
            continue
        if name == _NEEDS_BASE and (candidate.base is None or candidate.base.modules is None):
            findings.append(
                Finding(name, "not checked", "no base model to compare with", "pass --model")
            )
        else:
            findings.append(Finding(name, "ok", text))
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in candidate.tensors})
    accepted = all(it.verdict != "refused" for it in findings)
    facts = facts_of(candidate) if accepted else None
    named = candidate.config.get("base_model_name_or_path")
    return Inspection(
        tuple(findings),
        rank=facts.rank if facts else None,
        alpha=facts.alpha if facts else None,
        targets=tuple(targets),
        bytes=sum(tensor.end - tensor.start for tensor in candidate.tensors.values()),
        base_model=named if isinstance(named, str) else None,
        notes=(*notes, *((*facts.warnings, *facts.notes) if facts else ())),
    )
