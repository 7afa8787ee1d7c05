"""The version of the layout under `var/`, in the file `FORMAT`, and the page that explains it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ksi.storage.atomic import make_directory, write_atomically
from ksi.storage.errors import Corrupt, NewerFormat

FORMAT: Final = 2
_PAGE: Final = Path(__file__).parent / "var.md"


def check_format(var: Path) -> int | None:
    """Make sure that what is in `var` is ours to read and write; nothing is touched.

    Returns:
        The version that it is of, None where it is new. All older ones are read.

    Raises:
        NewerFormat: a newer version has written here.
        Corrupt: the file does not say a version.
    """
    path = var / "FORMAT"
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    words = text.split()
    if len(words) != 2 or words[0] != "ksi" or not words[1].isdigit():
        raise Corrupt(
            f"{path} should say 'ksi {FORMAT}', not {text[:80]!r}",
            hint=f"is {var} the directory you meant?",
            file=str(path),
        )
    found = int(words[1])
    if found > FORMAT:
        raise NewerFormat(
            f"{var} is of format {found}, this version of ksi knows {FORMAT}",
            hint="install a newer ksi, or name another directory with --var",
            found=found,
            known=FORMAT,
        )
    return found


def mark_format(var: Path) -> None:
    """Mark what is new or of an older version as of this one: from now on that may be written.

    The caller holds the lock on `var`.

    Raises:
        NewerFormat, Corrupt: as `check_format`.
    """
    found = check_format(var)
    if found == FORMAT:
        return
    make_directory(var)
    if found is None:
        _explain(var / "README.md")
    write_atomically(var / "FORMAT", f"ksi {FORMAT}\n".encode())


def _explain(readme: Path) -> None:
    """Say what is where, if nobody has said something there."""
    if not readme.exists():
        write_atomically(readme, _PAGE.read_bytes())
