"""Patterns of names, as a shell has them: `*` any characters, `?` one, `[ab]` one of these.

For names of events, agents and other things that people look for. (Topics of announcements are
words between dots and have patterns of their own.)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import translate
from functools import lru_cache

WILD = re.compile(r"[*?\[]")


@lru_cache(maxsize=256)
def matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return what tells whether a name is under one of some patterns; without any, each is."""
    if not patterns or "*" in patterns:
        return lambda _name: True
    found = re.compile("|".join(map(translate, patterns))).match
    return lambda name: found(name) is not None


def plain_part(pattern: str) -> str:
    """Return what each name under a pattern begins with; all of it where nothing in it is wild."""
    return WILD.split(pattern, maxsplit=1)[0]
