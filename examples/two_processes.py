"""One process writes a session, another reads it: `ksi start`, then run this.

The reader sends no message. It looks at what is committed, in its own process, so that it sees each
entry as soon as the writer has its reply.
"""

import multiprocessing
import time

from ksi.transport import Client

ENTRIES = 5


def write(session_id: str) -> None:
    """Append some entries, each acknowledged before the next."""
    with Client("writer") as writer:
        for n in range(1, ENTRIES + 1):
            reply = writer.ask("session:append", session_id=session_id, event="note", data={"n": n})
            print(f"writer: entry {reply['seq']} is on disk")


def read(session_id: str) -> None:
    """Print entries as they come, until the last."""
    with Client("reader") as reader:
        seen = 0
        while seen < ENTRIES:
            page = reader.read("session:history", session_id=session_id, after=seen)
            for entry in page["entries"]:
                print(f"reader: {entry['metadata']['agent_id']} noted {entry['data']}")
            seen += len(page["entries"])
            time.sleep(0.01)  # To look again costs microseconds.


def main() -> None:
    """Create the session as its writer, then let both processes work on it."""
    with Client("writer") as writer:
        session_id = writer.ask("session:create", title="two processes")["session_id"]
    # Never fork a process that holds sockets or an open environment: spawn.
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=each, args=(session_id,)) for each in (write, read)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(f"both done: {[process.exitcode for process in processes]}")


if __name__ == "__main__":
    main()
