"""History is read without a message, and found again through the index: `ksi start`, then run this.

`read` answers in this process, from what is on disk. The index follows a moment later; a row says
where an entry lies, and the file is there for everybody: seek, and read the line.
"""

import json
import time
from typing import Any

from ksi.transport import Client


def wait_for_index(client: Client, **wanted: Any) -> list[dict[str, Any]]:
    """Return what the index finds, once it has come so far."""
    while not (found := client.read("index:query", **wanted)["entries"]):
        time.sleep(0.01)  # The index follows within milliseconds.
    return list(found)


def main() -> None:
    """Ask and answer in a session, then find what is pending, who spoke, and one line."""
    with Client("alice") as alice, Client("bob") as bob:
        session_id = alice.ask("session:create", pattern="peer_to_peer")["session_id"]
        for request in ("req_1", "req_2"):
            alice.ask(
                "session:append",
                session_id=session_id,
                event="completion:request",
                data={"prompt": f"Is {request} done?", "to_agent": "bob"},
                correlation_id=request,
            )
        bob.ask(
            "session:contribute",
            session_id=session_id,
            event="completion:result",
            data={"response": "It is.", "role": "analyst"},
            correlation_id="req_1",
        )

        history = alice.read("session:history", session_id=session_id)["entries"]
        print(f"history: {[entry['event'] for entry in history]}")
        (row,) = wait_for_index(alice, session_id=session_id, event_type="completion:result")
        pending = alice.read("index:pending", session_id=session_id)["entries"]
        print(f"pending: {[entry['correlation_id'] for entry in pending]}")
        print(f"with bob: {len(alice.read('index:peer_interactions', agent_id='bob')['entries'])}")
        roles = alice.read("index:role_history", agent_id="bob", session_id=session_id)["roles"]
        print(f"bob was: {[role['role'] for role in roles]}")
        with open(row["file_path"], "rb") as file:
            file.seek(row["byte_offset"])
            print(f"the line: {json.loads(file.readline())['data']}")


if __name__ == "__main__":
    main()
