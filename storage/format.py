"""The version of the layout under `var/`, in the file `FORMAT`, and the page that explains it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ksi.storage.atomic import make_directory, write_atomically
from ksi.storage.errors import Corrupt, NewerFormat

FORMAT: Final = 1
_PAGE: Final = Path(__file__).parent / "var.md"


def check_format(var: Path) -> None:
    """Make sure that what is in `var` is ours to read and write; mark it where it is new.

    Raises:
        NewerFormat: a newer version has written here; nothing was touched.
        Corrupt: the file does not say a version.
    """
    path = var / "FORMAT"
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        make_directory(var)
        _explain(var / "README.md")
        write_atomically(path, f"ksi {FORMAT}\n".encode())
        return
    words = text.split()
    if len(words) != 2 or words[0] != "ksi" or not words[1].isdigit():
        raise Corrupt(
            f"{path} should say 'ksi {FORMAT}', not {text[:80]!r}",
            hint=f"is {var} the directory you meant?",
            file=str(path),
        )
    if int(words[1]) > FORMAT:
        raise NewerFormat(
            f"{var} is of format {words[1]}, this version of ksi knows {FORMAT}",
            hint="install a newer ksi, or name another directory with --var",
            found=int(words[1]),
            known=FORMAT,
        )


def _explain(readme: Path) -> None:
    """Say what is where, if nobody has said something there."""
    if not readme.exists():
        write_atomically(readme, _PAGE.read_bytes())
