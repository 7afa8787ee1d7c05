"""A forked child under ptrace(2): each system call on its files is seen before it is made, and can
be the one it is killed at, or one that fails. So C code is under test like Python: LMDB and SQLite.

Only calls that concern files are stopped at (a seccomp filter says which), and only those on files
below a directory count as steps. Written for x86-64, whose registers and numbers it knows; on
another machine its users fail and say so.

Source: ptrace(2), seccomp(2); what `strace -e inject=...` does, without a package to install.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

# How each call says what file it concerns: by a descriptor, or by a path, alone or in a directory.
BY_FD: Final = {
    1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 328: "pwritev2", 40: "sendfile",
    326: "copy_file_range", 74: "fsync", 75: "fdatasync", 306: "syncfs", 77: "ftruncate",
    285: "fallocate", 91: "fchmod", 73: "flock",
}  # fmt: skip
BY_PATH: Final = {
    2: "open", 85: "creat", 82: "rename", 87: "unlink", 83: "mkdir", 84: "rmdir", 86: "link",
    76: "truncate", 90: "chmod",
}  # fmt: skip
IN_DIRECTORY: Final = {
    257: "openat", 264: "renameat", 316: "renameat2", 263: "unlinkat", 258: "mkdirat",
    265: "linkat", 268: "fchmodat",
}  # fmt: skip
KILL: Final = -1
ACT_S_MAX: Final = 60  # A child that hangs is ended, with -SIGALRM.

_TRACEME, _CONT, _POKEUSER, _SYSCALL, _SETOPTIONS, _CALL = 0, 7, 6, 24, 0x4200, 0x420E
_OPTIONS: Final = 1 | 8 | 0x80 | 0x100000  # sysgood, clone, seccomp; a tracer's end kills
_EVENT_SECCOMP: Final = 7
_RAX, _ORIG_RAX = 10 * 8, 15 * 8  # in `struct user`
_WALL: Final = 0x40000000
_AT_FDCWD: Final = 0xFFFFFF9C
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Call(NamedTuple):
    """A system call that is about to be made, on a file below the root.

    Attributes:
        step: counted from 1.
        path: of the file; `target`: of its new name, for those that give one.
        fd: where it is named by one, in the process `pid`.
        arguments: the registers.
    """

    step: int
    name: str
    path: str
    target: str
    fd: int
    pid: int
    arguments: tuple[int, ...]


Decide = Callable[[Call], int]  # 0: let it be made; an errno: it fails; KILL
Watch = Callable[[Call, int], None]  # called when it was made, with its result


def run(action: Callable[[], Any], root: Path, decide: Decide, watch: Watch | None = None) -> int:
    """Run `action` in a child; return how that ended: exit code, or minus the signal.

    A call is decided about before it is made, and watched, where anybody watches, when it was.
    """
    if platform.machine() != "x86_64":
        raise NotImplementedError(f"no system call can be injected on {platform.machine()}")
    pid = os.fork()
    if pid == 0:
        _act(action)
    os.waitpid(pid, os.WUNTRACED)
    _ptrace(_SETOPTIONS, pid, data=_OPTIONS)
    _ptrace(_CONT, pid)
    return _follow(pid, _Calls(f"{root}/"), decide, watch)


def steps(action: Callable[[], Any], root: Path) -> int:
    """Return how many calls `action` makes on files below `root`."""
    made: list[Call] = []

    def note(call: Call) -> int:
        made.append(call)
        return 0

    assert run(action, root, note) == 0
    return len(made)


def hit_at_each(
    action: Callable[[], Any], root: Path, how: int, chance: random.Random, *, runs: int
) -> Iterator[tuple[int, str, int]]:
    """Run `action` so many times, each time with another call that fails, or kills it; at the most
    with each of its calls.

    Yields which, its name, and how the child ended, after each; put back what it changed.
    """
    count = steps(action, root)
    yield 0, "none", 0
    for number in sorted(chance.sample(range(1, count + 1), min(runs, count))):
        names: list[str] = []

        def decide(call: Call, number: int = number, names: list[str] = names) -> int:
            names += [call.name] * (call.step == number)
            return how if call.step == number else 0

        ended = run(action, root, decide)
        if names:  # A thread beside may make calls sooner or later, and so one less.
            yield number, names[0], ended


def _act(action: Callable[[], Any]) -> NoReturn:
    try:
        os.setpgid(0, 0)
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        _ptrace(_TRACEME, 0)
        _filter()
        signal.alarm(ACT_S_MAX)
        os.kill(os.getpid(), signal.SIGSTOP)
        action()
        os._exit(0)
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _filter() -> None:
    """Have the kernel stop this process at the calls above, and at no others."""
    numbers = [*BY_FD, *BY_PATH, *IN_DIRECTORY]
    program = struct.pack("HBBI", 0x20, 0, 0, 0)  # the number of the call
    for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
        program += struct.pack("HBBI", 0x15, left, 0, number)
    program += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)  # allow
    program += struct.pack("HBBI", 0x06, 0, 0, 0x7FF00000)  # stop and tell the tracer
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if _libc.prctl(22, 2, ctypes.c_char_p(described), 0, 0) != 0:  # PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def _follow(pid: int, calls: _Calls, decide: Decide, watch: Watch | None) -> int:
    made: dict[int, Call] = {}  # by thread: the call it is in
    while True:
        thread, status = os.waitpid(-pid, _WALL)
        if not os.WIFSTOPPED(status):
            if thread == pid:
                return os.waitstatus_to_exitcode(status)
            continue
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_SECCOMP:
            call = calls.read(thread)
            what = 0 if call is None else decide(call)
            if what == KILL:
                os.kill(pid, signal.SIGKILL)
                continue
            if what:
                _ptrace(_POKEUSER, thread, _ORIG_RAX, -1)
                _ptrace(_POKEUSER, thread, _RAX, -what)
            elif call is not None and watch is not None:
                made[thread] = call
                _ptrace(_SYSCALL, thread)
                continue
            number = 0
        elif number == signal.SIGTRAP | 0x80:  # It was made.
            assert watch is not None
            watch(made.pop(thread), _result(thread))
            number = 0
        elif event or number == signal.SIGSTOP:  # A thread begins.
            number = 0
        _ptrace(_CONT, thread, data=number)


class _Calls:
    """Reads what call a stopped thread is about to make, and counts those below the root."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._step = 0

    def read(self, thread: int) -> Call | None:
        number, *arguments = struct.unpack_from("7Q", _described(thread), 24)
        target, fd = "", -1
        if name := BY_FD.get(number):
            # Where to comes first, but for one.
            fd = arguments[2 if number == 326 else 0] & 0xFFFFFFFF
            path = _link(thread, f"fd/{fd}")
        elif name := BY_PATH.get(number):
            path = _path(thread, _AT_FDCWD, arguments[0])
            if name in ("rename", "link"):
                target = _path(thread, _AT_FDCWD, arguments[1])
        else:
            name = IN_DIRECTORY[number]
            path = _path(thread, arguments[0], arguments[1])
            if name in ("renameat", "renameat2", "linkat"):
                target = _path(thread, arguments[2], arguments[3])
        if not f"{path}/".startswith(self._root):
            return None
        self._step += 1
        return Call(self._step, name, path, target, fd, thread, tuple(arguments))


def _path(thread: int, directory: int, address: int) -> str:
    with open(f"/proc/{thread}/mem", "rb", 0) as memory:
        name = os.pread(memory.fileno(), 4096, address).split(b"\0", 1)[0].decode()
    if name.startswith("/"):
        return name
    at = "cwd" if directory & 0xFFFFFFFF == _AT_FDCWD else f"fd/{directory & 0xFFFFFFFF}"
    return os.path.normpath(f"{_link(thread, at)}/{name}")


def _link(thread: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{thread}/{name}")
    except OSError:
        return ""


def _described(thread: int) -> bytes:
    buffer = ctypes.create_string_buffer(88)
    _ptrace(_CALL, thread, 88, ctypes.addressof(buffer))
    return buffer.raw


def _result(thread: int) -> int:
    result: int = struct.unpack_from("q", _described(thread), 24)[0]
    return result


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, thread, address & (2**64 - 1), data & (2**64 - 1)) < 0:
        number = ctypes.get_errno()
        if number != 3:  # ESRCH: it was killed meanwhile, and `waitpid` will say so.
            raise OSError(number, f"ptrace {request}: {os.strerror(number)}")
