"""The fork server: one thread, all that children need loaded, a fork whenever it is asked for one.

    supervisor ── "fork", a socket's end ──▶ fork server ── forks ──▶ child
        │   ◀── its pid ────────────────────────┘                       │
        └── an `Order`, through the socket: what to become ─────────────▶

Children may safely be forked from it: it is bound to the life of the supervisor, out of its session
(so that Ctrl-C and a signal to the group of the supervisor reach the supervisor alone), and has
neither a ZeroMQ context nor an LMDB environment. Its memory is frozen, and both it and a child that
is not yet told do as little as they can: what is written to is copied (`actors/memory.py`).

A request is a datagram of words, its answer one of `=` and what was asked for. `fork [PID]`, with a
descriptor: the pid of a child, with copies of what PID had to copy, or `-errno`. `reap PID`: the
exit code of a child that has ended. `fault`: what kept it from loading its modules, or nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from ksi.actors import log
from ksi.actors.memory import copy_as, settle

REQUEST_BYTES_MAX: Final = 64
EXIT_NOT_RUN: Final = 127  # What shells say of a program that cannot be run.

_PR_SET_PDEATHSIG: Final = 1
_prctl: Final = ctypes.CDLL(None, use_errno=True).prctl  # a class is made for it: not in each child
# A child is stopped by them, the server is not. Blocked and not ignored: what is sent to a child in
# its first moments waits until the child is ready for it.
_BLOCKED: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_RECEIVED_BYTES: Final = 1 << 16


class Order(msgspec.Struct, frozen=True):
    """What a child is to become.

    Attributes:
        output: the file of its standard output and error.
        environment: variables, on top of the server's own.
        arguments: of the function; without one, a command line.
        function: `module:function`.
        cwd: where a command line runs; None: where the server does.
    """

    output: str
    environment: dict[str, str]
    arguments: tuple[str, ...]
    function: str = ""
    cwd: str | None = None


_decode_order = msgspec.msgpack.Decoder(Order).decode


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; exit if the parent has ended.

    The bond is to the *thread* that forked, does not pass on to children, and survives exec.
    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    if _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_PDEATHSIG")
    if os.getppid() != parent_pid:
        os._exit(1)


def load(place: str) -> None:
    """Import a `module`; of `module:function`, call the function."""
    module, _, function = place.partition(":")
    loaded = import_module(module)
    if function:
        getattr(loaded, function)()


def where(error: Exception) -> str:
    """Return an error that came up while something was loaded, with its place."""
    if isinstance(error, SyntaxError):
        path, number, words = error.filename, error.lineno, error.msg
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        path, number, words = place.filename, place.lineno, str(error)
    return f"{path}:{number}: {type(error).__name__}: {words}"[:1000]


def serve() -> NoReturn:
    """Be the fork server of `sys.argv`: its socket, the pid of its supervisor, its modules."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    die_with(int(sys.argv[2]))
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    fault = _load_all(sys.argv[3].split(","))
    server_pid = os.getpid()
    while True:
        words, descriptors, _flags, _address = socket.recv_fds(channel, REQUEST_BYTES_MAX, 1)
        if not words:
            os._exit(0)  # the supervisor has ended
        request, _, pid = words.partition(b" ")
        if request == b"fork":
            answer = b"%d" % _forked(channel, descriptors[0], server_pid, int(pid or 0))
        elif request == b"reap":
            answer = b"%d" % os.waitstatus_to_exitcode(os.waitpid(int(pid), 0)[1])
        else:
            answer = fault.encode(errors="replace")
        channel.send(b"=" + answer)  # An empty datagram would read like the end.


def _load_all(places: Sequence[str]) -> str:
    """Load them for children to have; return the first fault, or nothing."""
    fault = ""
    gc.disable()  # What is loaded stays: looking for what does not takes a tenth of the time.
    # Modules mend at each fork what threads and open stores may have left, and there are none here:
    # it would touch a sixth of all pages that a child copies.
    register_at_fork, os.register_at_fork = os.register_at_fork, lambda **_hooks: None
    for place in filter(None, places):
        try:
            load(place)
        except Exception as error:
            traceback.print_exc()  # a child that needs it fails and says so again
            fault = fault or where(error)
    os.register_at_fork = register_at_fork
    settle()  # No child's collector touches, and so copies, the pages they share.
    gc.enable()
    return fault


def _forked(channel: socket.socket, place: int, server_pid: int, like: int) -> int:
    """Return the pid of a new child that is told through `place` what to become, or -errno."""
    try:
        pid = os.fork()
    except OSError as error:
        pid = -(error.errno or errno.EAGAIN)
    if pid == 0:
        _be_child(channel, place, server_pid, like)
    os.close(place)
    return pid


def _be_child(channel: socket.socket, place: int, server_pid: int, like: int) -> NoReturn:
    """Wait for what to become, become it, and end."""
    code = 1
    try:
        die_with(server_pid)
        channel.close()
        os.setsid()
        os.umask(0o077)
        if like:
            copy_as(like)
        told = b"".join(iter(lambda: os.read(place, _RECEIVED_BYTES), b""))
        if told:  # else the supervisor has ended
            _become(_decode_order(told), place)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _become(order: Order, place: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
    log.redirect(Path(order.output))
    for name, value in order.environment.items():
        os.environ[name] = value
    if not order.function:
        _exec(order, place)
    os.close(place)
    faulthandler.enable()
    module, _, function = order.function.partition(":")
    __import__(module)  # `import_module` is Python, whose pages are copied; this is C.
    getattr(sys.modules[module], function)(*order.arguments)


def _exec(order: Order, place: int) -> NoReturn:
    """Become a program. That it runs is told by the end of `place`, else why not through it."""
    try:
        if order.cwd is not None:
            os.chdir(order.cwd)
        for number in (
            signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ,
        ):  # fmt: skip
            signal.signal(number, signal.SIG_DFL)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2:
                with contextlib.suppress(OSError):
                    os.set_inheritable(descriptor, False)
        os.execvpe(order.arguments[0], order.arguments, os.environ)
    except OSError as error:
        os.write(place, f"{order.arguments[0]}: {error.strerror}".encode(errors="replace"))
        os._exit(EXIT_NOT_RUN)
