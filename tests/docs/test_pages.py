"""README and docs as one reads them: short, linked, and each says first what it is for."""

import re
from hashlib import sha256
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT

LONGEST = 220
MADE = re.compile(r"<!-- results: .*?<!-- end -->", re.DOTALL)
"""By `benchmarks.report`."""
LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", it.lower()).replace(" ", "-") for it in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda it: it.stem)
def test_a_page_is_short_and_says_what_it_is_for(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert len(MADE.sub("", page.read_text()).splitlines()) <= LONGEST
    assert lines[0].startswith("# ")
    assert lines[1] == ""
    assert re.match(r"[A-Z*`\"]|vLLM ", lines[2]), "a sentence, before any table or command"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda it: it.stem)
def test_each_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_the_readme_leads_to_each_page() -> None:
    linked = {it.partition("#")[0] for it in LINK.findall((ROOT / "README.md").read_text())}
    assert {f"docs/{it.name}" for it in PAGES if it.parent.name == "docs"} <= linked


def test_the_readme_begins_with_the_two_commands() -> None:
    head = (ROOT / "README.md").read_text().split("## ")[0]
    assert re.findall(r"^    (make \w+)$", head, re.MULTILINE) == ["make demo", "make test"]


def test_the_licence_is_the_one_that_is_named() -> None:
    # of https://www.apache.org/licenses/LICENSE-2.0.txt
    apache_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == apache_2
