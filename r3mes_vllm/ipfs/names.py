"""Which names may become files, whoever gives them: a directory's links or an archive's members."""

import unicodedata


def check_name(name: str, *, longest: int) -> None:
    """One component of a path, of at most `longest` bytes of UTF-8. Raises ValueError."""
    shown = repr(name if len(name) <= 80 else f"{name[:77]}...")
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"the name {shown} leads elsewhere")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise ValueError(f"the name {shown} holds control characters")
    if len(name.encode()) > longest:
        raise ValueError(f"a name of {len(name.encode())} bytes; at most {longest}: {shown}")


def folded(name: str) -> str:
    """Equal for names that are one file on some disks."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def clash(name: str, other: str) -> str:
    """What is wrong with two names that are `folded` the same."""
    if name == other:
        return f"the name {name[:80]!r} stands twice"
    return (
        f"the name {name[:80]!r} differs only by case or Unicode form from {other[:80]!r}: "
        "on some disks the two are one file"
    )
