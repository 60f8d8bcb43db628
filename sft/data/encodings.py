"""How a file that is not in the encoding it should be may have been written."""

from pathlib import Path

# Tried in this order; the first that reads the whole file is suggested.
_LIKELY = ("utf-8-sig", "cp932", "euc_jp", "gb18030", "cp1252")
_CHARACTERS = 1 << 20


def likely_encoding(path: Path) -> str | None:
    """The first usual encoding that reads the file to its end, in constant memory; None when none does."""
    with path.open("rb") as file:
        marked = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    names = ("utf-16", *_LIKELY) if marked else _LIKELY
    return next((name for name in names if _reads(path, name)), None)


def _reads(path: Path, encoding: str) -> bool:
    try:
        with path.open(encoding=encoding) as text:
            while text.read(_CHARACTERS):
                continue
    except UnicodeError:
        return False
    return True
