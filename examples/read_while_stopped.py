"""History is read while the owner of the sessions is stopped: `ksi start`, then run this.

SIGSTOP freezes the owner, so that it can answer nobody. A read needs no answer.
"""

import os
import signal

from ksi.transport import Client
from ksi.transport.errors import Unavailable


def main() -> None:
    """Write, stop the owner, ask in vain, read, and let the owner go on."""
    with Client("alice") as alice:
        session_id = alice.ask("session:create", title="stopped")["session_id"]
        for text in ("one", "two", "three"):
            alice.ask("session:append", session_id=session_id, event="note", data={"text": text})

        children = alice.ask("system:status")["children"]
        owner = next(child["pid"] for child in children if child["name"] == "sessions")
        os.kill(owner, signal.SIGSTOP)
        try:
            try:
                alice.ask("session:get", session_id=session_id, timeout_s=0.2)
            except Unavailable as unavailable:
                print(f"asked: {unavailable}")
            page = alice.read("session:history", session_id=session_id)
            print(f"read: {[entry['data']['text'] for entry in page['entries']]}")
        finally:
            os.kill(owner, signal.SIGCONT)

        print(f"asked again: {alice.ask('session:get', session_id=session_id)['seq']} entries")


if __name__ == "__main__":
    main()
