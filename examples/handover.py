"""A session is handed over, and its former owner is refused: `ksi start`, then run this.

Every change of owner raises the epoch of the session. A client remembers the epoch it has learnt
and sends it with each command, so what a former owner had in mind cannot slip in behind the new
one, however late it arrives.
"""

from ksi.transport import Client
from ksi.transport.errors import NotOwner, StaleEpoch


def main() -> None:
    """Write as alice, hand over to bob, and try to go on as alice."""
    with Client("alice") as alice, Client("bob") as bob:
        created = alice.ask("session:create", title="handover")
        session_id = created["session_id"]
        print(f"{created['owner']} owns it in epoch {created['epoch']}")

        # A second alice, in another process say, that learnt the epoch and then slept.
        with Client("alice") as sleepy:
            sleepy.ask("session:append", session_id=session_id, event="note", epoch=1)

            handed = alice.ask("session:transfer", session_id=session_id, to_agent="bob")
            print(f"{handed['owner']} owns it in epoch {handed['epoch']}")

            try:
                sleepy.ask("session:append", session_id=session_id, event="note", epoch=1)
            except StaleEpoch as refused:
                print(refused)

        try:
            alice.ask("session:append", session_id=session_id, event="note")
        except NotOwner as refused:
            print(refused)

        alice.ask("session:contribute", session_id=session_id, event="note")  # as others may
        reply = bob.ask("session:append", session_id=session_id, event="note")
        print(f"bob wrote entry {reply['seq']}")


if __name__ == "__main__":
    main()
