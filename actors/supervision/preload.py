"""What the fork server imports before it forks, so that no child has to.

Imported in the fork server only, by `multiprocessing`, because `forkserver.start` names it; the
variable says so. It makes the server what children may safely be forked from: bound to the life of
the supervisor, out of its session (so that Ctrl-C and a signal to the group of the supervisor
reach the supervisor alone), single-threaded, with all modules loaded and its memory frozen.
What is loaded is a list of `module`, or `module:function` to be called.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing.popen_forkserver  # noqa: F401 - a child needs it to read what it is to do
import os
import signal
import sys
import traceback
from typing import Final

from ksi.actors.memory import settle

SUPERVISOR_PID: Final = "KSI_FORK_SERVER_OF"  # set while the fork server is started
MODULES: Final = "KSI_FORK_SERVER_MODULES"

_PR_SET_PDEATHSIG: Final = 1
_prctl: Final = ctypes.CDLL(None, use_errno=True).prctl  # a class is made for it: not in each child

server_pid = 0  # of the fork server; its children inherit the value


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
    loaded = importlib.import_module(module)
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


def _become_server(supervisor_pid: int, modules: list[str]) -> None:
    global server_pid  # noqa: PLW0603 - children read it after the fork
    die_with(supervisor_pid)
    server_pid = os.getpid()
    os.setsid()
    # The server ends with the supervisor, not before. Blocked and not ignored: what is sent to a
    # child in its first moments waits until the child is ready for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    gc.disable()  # What is loaded stays: looking for what does not takes a tenth of the time.
    for place in modules:
        try:
            load(place)
        except Exception:
            traceback.print_exc(file=sys.stderr)  # a child that needs it fails and says so again
    settle()  # No child's collector touches, and so copies, the pages they share.
    gc.enable()


if SUPERVISOR_PID in os.environ:
    _become_server(int(os.environ.pop(SUPERVISOR_PID)), os.environ.pop(MODULES, "").split(","))
