"""Child specs: what a supervisor must know to start, restart and stop one process. Data only.

Source: Erlang/OTP `supervisor:child_spec()`: id, start, restart, shutdown, type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from ksi.actors.supervision.restarts import Restart
from ksi.actors.supervision.system import Phase
from ksi.transport.errors import Invalid
from ksi.transport.limits import ID_PATTERN

Kind = Literal["owner", "follower", "agent"]

ARGUMENTS_MAX: Final = 256  # Words of a command line, and variables of an environment.
ENVIRONMENT_BYTES_MAX: Final = 128 << 10  # The kernel's bound for one string, here for all.
SHUTDOWN_S_MAX: Final = 3600.0  # An orderly stop that takes longer is not one.

_FUNCTION: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """One child. Every field is checked when the spec is made.

    Attributes:
        name: an id, unique under its supervisor.
        kind: owner: ready when it answers a HELLO on its endpoint. follower: ready when its stat
            file says `running`. agent: ready when its program runs.
        function: `module:function` that an owner or follower runs, with `arguments`, all strings.
        arguments: of the function; or the command line of an agent.
        phase: how far the system has come when this child is next to be ready.
        restart: permanent: always restarted. transient: only after an abnormal exit (another code
            than 0, or a signal). temporary: never.
        start_s: a child that is not ready, and shows no turn, for this long is killed.
        shutdown_s: how long it may take to stop after SIGTERM; then it is killed. 0 kills at once.
        env: variables set for it, on top of the supervisor's own environment.
        cwd: where it runs; None: where the supervisor runs.
        identity: the name it speaks as; None: its own.

    Raises:
        Invalid: a field has no legal value; the text names child and field.
    """

    name: str
    kind: Kind
    function: str = ""
    arguments: tuple[str, ...] = ()
    phase: Phase = "owners"
    restart: Restart = "permanent"
    start_s: float = 60.0
    shutdown_s: float = 5.0
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    identity: str | None = None

    def __post_init__(self) -> None:
        self._require(_is_id(self.name), "name", "an id ([A-Za-z0-9._-], 1-128)")
        self._require(self.kind in get_args(Kind), "kind", f"one of {get_args(Kind)}")
        self._require(self.phase in get_args(Phase), "phase", f"one of {get_args(Phase)}")
        self._require(self.restart in get_args(Restart), "restart", f"one of {get_args(Restart)}")
        self._require(_is_wait(self.start_s), "start_s", f"0 to {SHUTDOWN_S_MAX}")
        self._require(_is_wait(self.shutdown_s), "shutdown_s", f"0 to {SHUTDOWN_S_MAX}")
        self._require(self.identity is None or _is_id(self.identity), "identity", "an id or none")
        self._require(self.cwd is None or _is_word(self.cwd), "cwd", "a path or none")
        self._require(_are_words(self.arguments), "arguments", f"up to {ARGUMENTS_MAX} texts")
        self._require(_is_environment(self.env), "env", f"up to {ARGUMENTS_MAX} NAME=text")
        if self.kind == "agent":
            self._require(not self.function, "function", "absent for an agent")
            self._require(
                bool(self.arguments and self.arguments[0]), "arguments", "a program and its words"
            )
        else:
            self._require(bool(_FUNCTION.fullmatch(self.function)), "function", "module:function")

    def _require(self, holds: bool, name: str, legal: str) -> None:
        if not holds:
            shown = repr(getattr(self, name))[:200]
            raise Invalid(f"child {str(self.name)[:128]!r}: {name} must be {legal}, not {shown}")


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.match(ID_PATTERN, value) is not None


def _is_wait(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= SHUTDOWN_S_MAX


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value and _is_utf8(value)


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_words(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= ARGUMENTS_MAX
        and all(map(_is_word, values))
        and sum(map(len, values)) <= ENVIRONMENT_BYTES_MAX
    )


def _is_environment(env: Any) -> bool:
    return (
        isinstance(env, Mapping)
        and len(env) <= ARGUMENTS_MAX
        and all(isinstance(name, str) and _VARIABLE.fullmatch(name) for name in env)
        and all(map(_is_word, env.values()))
        and sum(map(len, env.values())) <= ENVIRONMENT_BYTES_MAX
    )
