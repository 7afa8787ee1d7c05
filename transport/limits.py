"""Every bound of the system, in one place, each with its reason.

A limit that is reached is answered with a refusal that names it; nothing grows without one.
"""

from typing import Final

# Messages
FRAME_BYTES_MAX: Final = 1 << 20  # One ZeroMQ frame; `MAXMSGSIZE` cuts a peer that sends more.
BODY_BYTES_MAX: Final = FRAME_BYTES_MAX - 4096  # Room for the header around one lone request.
NESTING_MAX: Final = 32  # Deeper values break `json.dumps` and `repr` of their readers.
ITEMS_MAX: Final = 10_000  # Entries of one list or map: 1 MiB of empty lists is 70 MB decoded.
ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$(?!\n)"  # Ids are keys and file names.
TEXT_CHARS_MAX: Final = 4096  # Names, reasons and descriptions people read in one line.

# Mailbox and batches
MAILBOX_REQUESTS_MAX: Final = 16_384  # Sixteen full client windows; beyond it the answer is `busy`.
MAILBOX_BYTES_MAX: Final = 64 << 20  # The same, for large bodies.
BATCH_COMMANDS_MAX: Final = 256  # Amortises one sync; more would only add to everyone's wait.
BATCH_BYTES_MAX: Final = 4 << 20  # One journal record; a sync of more than this is felt.
LETTERS_MAX: Final = 256  # Frames taken from the socket in one turn: a few ms of decoding.
REQUEST_FRAMES_MAX: Final = 256  # Frames of one connection waiting at an owner; then it must wait.
CLIENT_FRAMES_MAX: Final = 1024  # Frames a client holds each way: one window, a command a frame.
REPLY_FRAMES_MAX: Final = 16  # Frames queued to one connection that does not read, then dropped.

# Delivery
WINDOW_COMMANDS_MAX: Final = 1024  # Unacknowledged commands of one client instance at one owner.
WINDOW_BYTES_MAX: Final = 1 << 20  # The same in bytes: what an owner may have to remember.
CLIENT_ROWS_MAX: Final = 100_000  # Remembered client instances an owner; 200 bytes each.
CLIENT_IDLE_S_MAX: Final = 30 * 86_400.0  # An instance silent this long is forgotten.
REQUEST_ID_S_MAX: Final = 30 * 86_400.0  # How long a caller's `request_id` is remembered.
SUBSCRIPTIONS_MAX: Final = 256  # Patterns one connection may hold at one owner.
PATTERN_CHARS_MAX: Final = 512  # Topics and patterns: some words, not a text.
CREDIT_MAX: Final = 4096  # Messages in flight to one subscription before they are counted as gap.
RUN_BYTES_MAX: Final = 256 << 10  # Messages that are encoded as one run: some fit into a frame.
OUTBOX_ROWS_MAX: Final = 100_000  # Messages waiting for another owner; beyond it `busy`.

# Completions
WAITING_MAX: Final = 100_000  # Requests waiting in all sessions; beyond it the answer is `busy` ...
WAITING_SESSION_MAX: Final = 10_000  # ... or in one session: nobody lives to see the last answered.
WAITING_BYTES_MAX: Final = 1 << 30  # What they say, on disk; the same.
WAITING_AGENT_MAX: Final = 25_000  # Of one requester: a quarter, so that others find room.
WAITING_AGENT_BYTES_MAX: Final = 256 << 20  # The same in bytes.
ENTRY_BYTES_MAX: Final = 512 << 10  # A request or result as JSON: half of the line it becomes.
PROGRESS_BYTES_MAX: Final = 16 << 10  # One report of progress: it goes through the journal.
ACTIVE_MAX: Final = 1024  # Grants at a time in all; what an operator may set.
ACTIVE_USUAL: Final = 256  # The same, where none has been set: more than providers let through.
WORKERS_MAX: Final = 1024  # Each has a few rows that a grant rewrites.
SLOTS_MAX: Final = 64  # Grants a worker may hold: what is requeued in one decision when it goes.
OFFERS_MAX: Final = 16  # Capabilities of one worker: rows rewritten with each of its grants.
WORKER_LEASE_S: Final = 15.0  # A worker silent this long is taken for dead, where it says nothing.
REQUEST_RUN_S: Final = 300.0  # How long one attempt may run, where the request does not say.
LAPSES_MAX: Final = (
    5  # Workers that may vanish over one request before it is given up: it may be why.
)
AGEING_S: Final = 30.0  # Waiting this long is worth one step of priority: nothing starves.
ATTEMPTS_USUAL: Final = 3  # Attempts that may fail before a request has, where it does not say ...
ATTEMPTS_MAX: Final = 10  # ... and at the most: more is a loop, and each may cost money.
RETRY_S: Final = 2.0  # The wait before the second attempt, then ever doubled ...
RETRY_S_MAX: Final = 60.0  # ... up to this: whoever is overloaded for longer will be anyway.
RETRY_AFTER_S_MAX: Final = 3600.0  # What a provider may ask to be left alone; its session waits.
DEAD_MAX: Final = 1000  # Requests that failed for good, kept with their prompts to be retried ...
DEAD_BYTES_MAX: Final = 64 << 20  # ... so many bytes of them ...
DEAD_S: Final = 30 * 86_400.0  # ... and so long: whoever comes back from a holiday finds them.
PROVIDERS_MAX: Final = 256  # Providers whose fate is counted: a row each, for names reports give.
RATE_PATTERN: Final = r"^[1-9]\d{0,3}/[smh]$(?!\n)"  # Each call is a row as long as its period.
BUDGETS_MAX: Final = 10_000  # Agents and sessions that have one: a row each.
USAGE_ROWS_MAX: Final = 20_000  # Sums of tokens, by hour, agent and model; the oldest go first.
USAGE_S: Final = 31 * 86_400.0  # The same: bills are monthly.
MODEL_CHARS_MAX: Final = 64  # Of a model's name in a key, which holds 511 bytes in all.
HISTORY_TURNS_MAX: Final = 100  # What a provider is told of a session: the newest turns ...
HISTORY_BYTES_MAX: Final = 256 << 10  # ... as far as they fit here: models hold little more.
OUTPUT_BYTES_MAX: Final = 4 << 20  # What a program may print for one answer: its events as well.
FINISHED_MAX: Final = 10_000  # Outcomes kept for those who ask; the record is the session's file.
FINISHED_BYTES_MAX: Final = 256 << 20  # The same, for large results.
FINISHED_S: Final = 86_400.0  # The same: nobody asks after a day.
ENDED_MAX: Final = 250  # Requests of a closed session ended in one decision: it is felt.

# Tools
TOOLS_MAX: Final = 1024  # Of one catalogue, and counted in one conversation: ten times the present.
TOOL_SESSIONS_MAX: Final = (
    10_000  # Conversations whose catalogue is known: a few MB; the oldest go.
)
TOOL_SESSION_S: Final = (
    86_400.0  # Unused for this long one is forgotten: to be told again is cheap.
)

ARCHIVE_MAX: Final = 100  # Sessions archived by one command: some seconds of one follower.

# Compositions and conversations
COMPOSITION_BYTES_MAX: Final = 512 << 10  # A file of prose and settings; it fits into an answer.
IMPORTS_MAX: Final = 1000  # Files and folders of logs that are indexed in place, each watched.
LOG_LINE_BYTES_MAX: Final = 16 << 20  # A line of an imported log: more is another kind of file.
BAD_LINES_MAX: Final = 1000  # Told one by one of each file; the rest is counted.
CONTENT_BYTES_MAX: Final = (
    128 << 10
)  # Characters shown of one message: four bytes each fit a frame.
LOCK_S: Final = 300.0  # How long a conversation is locked where the request does not say.
LOCKS_MAX: Final = 100_000  # Conversations locked at a time; beyond it the answer is `busy`.
LOCK_QUEUE_MAX: Final = 1000  # Requests that wait for one lock: who came last waits for days.
LOCK_EXPIRED_S: Final = 3600.0  # How long it is known of a lock that it has expired.
FORKS_MAX: Final = 100_000  # Forks of conversations that are remembered; 100 bytes each.

# Disk
RECORD_BYTES_MAX: Final = 4 * BATCH_BYTES_MAX  # Of the journal: events may outgrow their commands.
SEGMENT_BYTES: Final = 64 << 20  # A journal segment: small enough to drop, large enough to be few.
PREWRITE_BYTES: Final = 1 << 20  # Zeros ahead of a journal's end; a start has to look at them.
PREWRITE_FROM_BYTES: Final = 256 << 10  # Written by one process before it begins: most never do.
SNAPSHOT_JOURNAL_BYTES: Final = 256 << 20  # At least one snapshot for this much journal.
MAP_BYTES: Final = 64 << 30  # LMDB map: address space only, the same for every opener.
MAP_USE_MAX: Final = 0.8  # Above this part of the map new work is refused, deletes go on.
KEY_BYTES_MAX: Final = 511  # What LMDB can hold as a key.
CACHE_ROWS: Final = 16_384  # Decoded rows a table keeps between batches: 8 MB at 500 bytes.
READERS_MAX: Final = 4096  # LMDB reader slots; the first opener of an environment sizes the file.
REPLAY_RECORDS: Final = 4096  # Replayed in one transaction of the view: bounds its dirty pages.
FREE_BYTES_MIN: Final = 64 << 20  # Free disk below which new work is refused ...
FREE_PART_MIN: Final = 0.05  # ... or below this part of the disk, whichever is smaller.
ROOM_CHECK_S: Final = 0.1  # How old an answer to "is there room" may be.
LOCK_WAIT_S: Final = 30.0  # A killed predecessor may still be inside a sync of a slow disk.
VERIFY_BYTES_MAX: Final = 32 << 20  # Of a checkpoint that is verified while everybody waits: 0.3 s.
OPEN_FILES_MAX: Final = 256  # Session files a follower keeps open.
INDEX_DAYS_OPEN_MAX: Final = 64  # Databases of the index kept open: a rebuild meets days at random.
INDEX_QUERY_S_MAX: Final = 2.0  # One look into a database: its owner answers nobody else meanwhile.
INDEX_WAIT_S: Final = 2.0  # What a database of the index is waited for while others use it.
FILE_SYNCS_MAX: Final = 128  # With more files to sync, one sync of the file system takes less time.
EVENT_PAYLOAD_BYTES: Final = 5120  # A larger value of an event is kept beside the log, as in KSI.
EVENT_SCAN_BYTES_MAX: Final = 64 << 20  # Of the log looked at for one answer: 200,000 events.
EVENT_RING_MAX: Final = 10_000  # Newest events in memory of who asks for them again: 8 MB ...
EVENT_RING_BYTES_MAX: Final = 5 << 20  # ... as far as their lines, of 300 to 500 bytes, fit here.
EVENTS_UNSYNCED_MAX: Final = 1 << 20  # Logged and not on disk: what numbers skip after a crash.
SOCKET_PATH_BYTES_MAX: Final = 107  # `sun_path` less its NUL.
RUN_NAME_BYTES_MAX: Final = 24  # Of a socket in `run/`, so that the path is known to fit or not.

# Time
ASK_TIMEOUT_S: Final = 5.0  # What a caller waits when it does not say.
OUTCOME_TIMEOUT_S: Final = 600.0  # What a requester waits for an outcome when it does not say.
TICK_S: Final = 0.25  # How often an owner lets time pass: the precision of leases.
HUNG_TURN_S: Final = 10.0  # No turn of its loop for this long and an owner is hung ...
HUNG_COMMIT_S: Final = 60.0  # ... or this long inside a commit: slow disks are not hung owners.
BELL_S: Final = 0.01  # Followers are rung this often at the most: they group 20 ms of work anyway.
HANDSHAKE_MS: Final = 3000  # A peer that is silent this long before its key is proven is cut.
LAST_REPLIES_MS: Final = 500  # Of who closes, for those who read; whoever does not waits for none.
HEARTBEAT_MS: Final = 5000  # Over tcp only: a dead machine sends no FIN ...
HEARTBEAT_MS_MAX: Final = 15_000  # ... and is given up after this.
BACKLOG: Final = 512  # Connections waiting to be accepted: a fleet that starts at once.
RECONNECT_MS: Final = 1  # ZeroMQ's default of 100 alone makes a restart take 142 ms.
RECONNECT_MS_MAX: Final = 2  # A restart waits for this; 500 tries a second are 2 % of a core.
BELL_RECONNECT_MS: Final = 32  # A bell only hints: its owner starts sooner if few others try.
TCP_RECONNECT_MS_MAX: Final = 128  # The same over a network, where they are not.
TCP_CONNECT_MS: Final = 3000  # One attempt; the kernel would wait ever longer between its packets.
