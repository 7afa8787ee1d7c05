"""The `ksi` program. While it is still being loaded, Ctrl-C ends it without a word."""

from __future__ import annotations

import os
import signal
import sys
from typing import Final, NoReturn

EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it


def run() -> NoReturn:
    """Be the `ksi` program."""
    interrupted = signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:  # Else whoever started us wants it ignored.
        signal.signal(signal.SIGINT, lambda *_signal: os._exit(EXIT_INTERRUPTED))
    from ksi.console.main import main

    signal.signal(signal.SIGINT, interrupted)
    code = main()
    sys.stderr.flush()
    os._exit(code)  # All is written and closed; to free every module costs a person 15 ms.


if __name__ == "__main__":
    run()
