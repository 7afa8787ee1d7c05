"""Sockets: the mailbox an owner's actor reads, and the connection a client makes to it.

The mailbox *is* the actor's inbox: pykka's loop takes from it, and it takes from a ROUTER socket,
so that no second queue and no other thread stand between a client and its owner. All that waits
is taken at once and handed over as one message, a `Post`.

- `get` never raises and never waits longer than `timeout_s`.
- Whoever is not enrolled gets no frame in. The sender of a letter is the key its connection has
  proven, never what a frame says: `Letter.route` is only where the answer goes.
- What comes from a connection and is not exactly one frame is dropped.
- A peer that does not read costs `REPLY_FRAMES_MAX` frames, then what is sent to it is dropped.

One mailbox a context, since ZAP has one place in each. Whoever makes a mailbox holds the lock of
its owner until it is closed: the socket of a predecessor is replaced, alive or not.

Source: pykka's `ActorInbox`; ZeroMQ RFC 26 (CURVE), 27 (ZAP), 28 (ROUTER).
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import zmq

from ksi.transport.errors import Conflict, Invalid
from ksi.transport.identity import BELL_SUFFIX, Certificate, Identity, KeyRing
from ksi.transport.limits import (
    BACKLOG,
    BATCH_BYTES_MAX,
    BELL_RECONNECT_MS,
    BELL_S,
    CLIENT_FRAMES_MAX,
    FRAME_BYTES_MAX,
    HANDSHAKE_MS,
    HEARTBEAT_MS,
    HEARTBEAT_MS_MAX,
    LAST_REPLIES_MS,
    LETTERS_MAX,
    RECONNECT_MS,
    RECONNECT_MS_MAX,
    REPLY_FRAMES_MAX,
    REQUEST_FRAMES_MAX,
    TCP_CONNECT_MS,
    TCP_RECONNECT_MS_MAX,
    TICK_S,
)

if TYPE_CHECKING:
    from pykka._envelope import Envelope

Change = Literal["up", "down", "denied", "failed"]
_Socket: TypeAlias = "zmq.Socket[bytes]"
_Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"

_log: Final = logging.getLogger(__name__)

_DOMAIN: Final = b"ksi"
_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_NEAR: Final = b"localhost:"  # What a local socket is at; an address of tcp is in numbers.
_USER_ID_CHARS: Final = 64  # The hex of a public key; what has come over a network has more:
_FAR: Final = b" far"
_PAUSE_S: Final = 0.02  # After an error that may come again at once.
# Plain integers: the operators of enums cost as much as a system call.
_NOW: Final = int(zmq.DONTWAIT)
_MORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)
_POLLIN: Final = int(zmq.POLLIN)
_EVENTS: Final = int(zmq.EVENTS)
_MONITORED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_CHANGES: Final[dict[int, Change]] = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "up",
    zmq.EVENT_DISCONNECTED: "down",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "denied",
    zmq.EVENT_CONNECT_RETRIED: "failed",
}
_MONITOR_EVENT: Final = struct.Struct("=HI")


class Letter(NamedTuple):
    """A frame that has come."""

    route: bytes  # where to send the answer
    sender: str  # the hex of the public key its connection has proven
    payload: bytes
    arrived_s: float  # on the monotonic clock: when it was taken from the socket
    far: bool = False  # over a network


class Post(NamedTuple):
    """All letters that waited; none when only time has passed or something else wants a look."""

    letters: list[Letter]


class Mailbox:
    """The inbox of one owner: a pykka `ActorInbox` over a ROUTER socket.

    Only `put` may be called from other threads than that of the actor's loop.

    Attributes:
        timeout_s: how long the next `get` may wait for something; 0: not at all.
        gone: whether the last `send` that failed did so because nobody is there any more.
        tcp_endpoint: where `tcp` is bound, with the port that was chosen; None without.

    Raises:
        zmq.ZMQError: an address cannot be bound.
    """

    def __init__(
        self,
        context: _Context,
        endpoint: str,
        certificate: Certificate,
        keys: KeyRing,
        *,
        tcp: str | None = None,
    ) -> None:
        from pykka._envelope import Envelope  # Clients import this module, too, and need no pykka.

        self.timeout_s = TICK_S
        self.tcp_endpoint: str | None = None
        self.gone = False
        self._envelope = Envelope
        self._keys = keys
        self._local: deque[Envelope[Any]] = deque()
        self._calls: dict[_Socket | int, Callable[[], None]] = {}
        self._news = False  # Something other than a letter has come that a Post must tell.
        self._rung_s = 0.0
        self._ring_due = False
        self._signalled = False  # The wake-up descriptor of signals is our pipe.
        self._paths: list[str] = []
        self._closing = threading.Lock()
        self._closed = False
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._zap = context.socket(zmq.ROUTER)
        # The routing ids of the next ROUTER count up from a number of `rand`, which ZeroMQ, whose
        # context is in use already, has seeded with time and pid. Whoever claims an id before it is
        # given to somebody else aborts the process (libzmq 4.3, `socket_base.cpp`).
        srand()(int.from_bytes(os.urandom(4)))
        self._router = context.socket(zmq.ROUTER)
        self._bell = context.socket(zmq.PUB)
        try:
            self._bind(endpoint, certificate, tcp)
        except BaseException:
            self.close()
            raise
        self._poller = zmq.Poller()
        for source in (self._router, self._zap, self._wake_r):
            self._poller.register(source, zmq.POLLIN)

    def put(self, envelope: Envelope[Any]) -> None:
        """Add an envelope from this process and wake `get`. From any thread."""
        self._local.append(envelope)
        with self._closing, suppress(BlockingIOError):  # A full pipe wakes as well.
            if not self._closed:
                os.write(self._wake_w, b"\0")

    def empty(self) -> bool:
        """Whether no envelope from this process waits. Letters do not count: they are resent."""
        return not self._local

    def get(self) -> Envelope[Any]:
        """Return what is next: an envelope of this process, else a `Post`. Never raises.

        A `Post` without letters comes when `timeout_s` is over, after a signal, and after a
        watched descriptor was ready. Ctrl-C without a handler stops the actor.
        """
        try:
            return self._next()
        except Exception:
            _log.exception("the mailbox goes on after an error it did not expect")
            self._recover()
            return self._envelope(Post([]))
        except BaseException as interrupt:
            from pykka.messages import _ActorStop

            _log.warning("stopping: %r", interrupt)
            self._recover()
            return self._envelope(_ActorStop())

    def send(self, route: bytes, frame: bytes) -> bool:
        """Send a frame to where a letter came from, without waiting.

        Returns False, and nothing was sent, when the peer is gone or does not read. True is no
        promise: it may go before the frame has reached it.
        """
        try:
            self._router.send(route, _MORE)
            self._router.send(frame, _NOW)
        except zmq.ZMQError as error:
            self.gone = error.errno == zmq.EHOSTUNREACH
            return False
        return True

    def sender_of(self, user_id: str) -> Identity | None:
        """Return who sent a letter of the last `Post`; None when that key was revoked since.

        Raises:
            OSError: the keys cannot be read.
        """
        return self._keys.lookup(user_id)

    def watch(self, source: _Socket | int, call: Callable[[], None]) -> None:
        """Call `call` within `get` whenever this socket or descriptor is readable.

        `call` empties it, or `get` will not rest. It is to be unwatched before it is closed.
        """
        self._calls[source] = call
        self._poller.register(source, zmq.POLLIN)

    def unwatch(self, source: _Socket | int) -> None:
        """Watch it no longer; nothing happens if it was not watched."""
        if self._calls.pop(source, None) is not None:
            self._poller.unregister(source)

    def wake_on_signals(self) -> None:
        """Let every signal that has a Python handler end the wait of `get`. Main thread only."""
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        self._signalled = True

    def ring(self) -> None:
        """Tell followers to look. At most one ring in `BELL_S`: the last of a burst comes then."""
        self._ring_due = True
        self._ring_if_due(time.monotonic())

    def close(self) -> None:
        """Close the sockets and remove their files. Envelopes of this process can still be got.

        Replies that are on their way go out, for `LAST_REPLIES_MS`, before the context ends.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
            if self._signalled:
                signal.set_wakeup_fd(-1)
            for path in self._paths:
                with suppress(FileNotFoundError):
                    os.unlink(path)
            self._router.close(LAST_REPLIES_MS)
            self._zap.close(0)
            self._bell.close(0)
            os.close(self._wake_r)
            os.close(self._wake_w)

    def _bind(self, endpoint: str, certificate: Certificate, tcp: str | None) -> None:
        self._zap.bind(_ZAP_ENDPOINT)  # Before anybody can knock.
        router = self._router
        router.set(zmq.CURVE_SERVER, 1)
        router.set(zmq.CURVE_SECRETKEY, certificate.secret or b"")
        router.set(zmq.ZAP_DOMAIN, _DOMAIN)
        router.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.ROUTER_HANDOVER, 0)
        router.set(zmq.SNDHWM, REPLY_FRAMES_MAX)
        router.set(zmq.RCVHWM, REQUEST_FRAMES_MAX)
        router.set(zmq.BACKLOG, BACKLOG)
        _bound(router)
        _bound(self._bell)
        self._bind_file(router, endpoint.removeprefix("ipc://"))
        self._bind_file(self._bell, endpoint.removeprefix("ipc://") + BELL_SUFFIX)
        if tcp is not None:
            _over_tcp(router, tcp)
            router.bind(tcp)
            self.tcp_endpoint = _bound_to(router)

    def _bind_file(self, socket: _Socket, path: str) -> None:
        """Bind to a socket file, 0600, that replaces the one that is there in one step.

        ZeroMQ removes a socket file when it closes its listener, some time after `close`, when
        our successor may have made its own. So it gets another name to remove.
        """
        draft = os.path.join(os.path.dirname(path), f".{os.getpid()}")
        former = os.umask(0o077)
        try:
            socket.bind(f"ipc://{draft}")
        finally:
            os.umask(former)
        os.rename(draft, path)
        self._paths.append(path)

    def _next(self) -> Envelope[Any]:
        if self._local:
            return self._local.popleft()
        if self._closed:
            return self._envelope(Post([]))
        router, now_s = self._router, time.monotonic()
        deadline_s = now_s if self._news else now_s + self.timeout_s
        while True:
            until_s = min(deadline_s, self._rung_s + BELL_S) if self._ring_due else deadline_s
            ready = self._poller.poll(max(0, math.ceil((until_s - now_s) * 1000)))
            now_s = time.monotonic()
            knocked = False
            for source, _event in ready:
                if source is router:
                    knocked = True
                else:
                    self._look(source)
            if self._ring_due:
                self._ring_if_due(now_s)
            if self._local:
                return self._local.popleft()
            letters = self._drain(now_s) if knocked else []
            if letters or self._news or now_s >= deadline_s:
                self._news = False
                return self._envelope(Post(letters))

    def _look(self, source: _Socket | int) -> None:
        """See to what is ready beside the letters."""
        if source is self._zap:
            self._admit()
        elif source == self._wake_r:
            # Zeros are from `put`, everything else is the number of a signal.
            if os.read(self._wake_r, 65_536).strip(b"\0"):
                self._news = True
        elif source in self._calls:  # Else another call has just unwatched it.
            self._news = True
            try:
                self._calls[source]()
            except Exception:
                _log.exception("what was to look after %r failed", source)

    def _drain(self, now_s: float) -> list[Letter]:
        """Take what waits, up to `LETTERS_MAX` frames or `BATCH_BYTES_MAX` bytes."""
        letters: list[Letter] = []
        size_bytes = 0
        receive: Callable[..., Any] = self._router.recv
        ask: Callable[..., Any] = self._router.getsockopt
        try:
            for _ in range(LETTERS_MAX):
                route = receive(_NOW)
                frame = receive(_NOW, False)
                if frame.more:
                    self._skip()
                    continue
                payload = frame.bytes
                user_id = frame.get("User-Id")
                far = len(user_id) > _USER_ID_CHARS
                letters.append(Letter(route, user_id[:_USER_ID_CHARS], payload, now_s, far))
                size_bytes += len(payload)
                if size_bytes >= BATCH_BYTES_MAX:
                    break
                # One letter is the common case, and asking is cheaper than a `recv` that fails.
                if len(letters) == 1 and not ask(_EVENTS) & _POLLIN:
                    break
        except zmq.Again:
            pass
        if letters:
            self._keys.refresh()
        return letters

    def _skip(self) -> None:
        """Drop the rest of a message of which a part was taken."""
        while self._router.getsockopt(zmq.RCVMORE):
            self._router.recv(zmq.DONTWAIT)

    def _admit(self) -> None:
        """Answer who asks to be admitted: ZeroMQ itself, for each new connection."""
        with suppress(zmq.Again):
            for _ in range(LETTERS_MAX):
                asked = self._zap.recv_multipart(zmq.DONTWAIT)
                if (verdict := _verdict(asked, self._keys)) is not None:
                    self._zap.send_multipart(verdict, zmq.DONTWAIT)

    def _ring_if_due(self, now_s: float) -> None:
        if now_s - self._rung_s >= BELL_S:
            self._rung_s, self._ring_due = now_s, False
            self._bell.send(b"", zmq.DONTWAIT)

    def _recover(self) -> None:
        """Make the next `get` possible after one that failed half way."""
        time.sleep(_PAUSE_S)  # It may fail again at once, for ever.
        with suppress(zmq.ZMQError):
            self._skip()


def _verdict(asked: list[bytes], keys: KeyRing) -> list[bytes] | None:
    """Return the ZAP answer to a ZAP request; None when it does not even say where to send it.

    Raises:
        OSError: the keys cannot be read. Without an answer the peer is cut, and comes again.
    """
    match asked:
        case [route, b"", b"1.0", number, domain, address, _identity, mechanism, key] if (
            domain == _DOMAIN and mechanism == b"CURVE" and len(key) == 32
        ):
            user_id = key.hex()
            if keys.of_public(user_id) is not None:
                named = user_id.encode() + (b"" if address.startswith(_NEAR) else _FAR)
                return [route, b"", b"1.0", number, b"200", b"OK", named, b""]
            return [route, b"", b"1.0", number, b"400", b"not enrolled", b"", b""]
        case [route, b"", _version, number, *_]:
            return [route, b"", b"1.0", number, b"500", b"no such request", b"", b""]
    return None


def connect(
    context: _Context,
    endpoint: str,
    server_public: bytes,
    certificate: Certificate,
) -> tuple[_Socket, _Socket]:
    """Return a DEALER that connects to an owner, and again whenever it must, and its monitor.

    Sending on it without waiting fails (`zmq.Again`) until the monitor says "up". After "denied"
    it is dead: close both, and connect anew once the key is enrolled. "down" again and again
    without "up" means that someone else answers there: look up the address and key again. Read
    the monitor regularly: it holds two thousand changes, and then it stops the connection, and
    with it all others of the context.

    Args:
        server_public: the public key (Z85) the owner proves to be itself with.
    """
    dealer = context.socket(zmq.DEALER)
    dealer.curve_serverkey = server_public
    dealer.curve_publickey = certificate.public
    dealer.curve_secretkey = certificate.secret or b""
    dealer.immediate = 1
    dealer.reconnect_ivl = RECONNECT_MS
    dealer.reconnect_ivl_max = RECONNECT_MS_MAX
    dealer.sndhwm = dealer.rcvhwm = CLIENT_FRAMES_MAX
    _bound(dealer)
    monitored = _MONITORED
    if endpoint.startswith("tcp:"):
        _over_tcp(dealer, endpoint)
        dealer.connect_timeout = TCP_CONNECT_MS
        dealer.reconnect_ivl_max = TCP_RECONNECT_MS_MAX
        monitored |= zmq.EVENT_CONNECT_RETRIED
    monitor = dealer.get_monitor_socket(monitored)
    dealer.connect(endpoint)
    return dealer, monitor


def read_monitor(monitor: _Socket) -> list[Change]:
    """Return what has become of a connection since the last call, in order. Does not wait.

    "up": the owner has proven itself and admitted this key; frames can be sent. "down": the
    connection, or an attempt at one, has ended. "denied": this key is not enrolled. "failed", over
    tcp only: there is no connection, and it is tried again after a pause.
    """
    changes = []
    with suppress(zmq.Again):
        while True:
            event, _endpoint = monitor.recv_multipart(zmq.DONTWAIT)
            changes.append(_CHANGES[_MONITOR_EVENT.unpack(event)[0]])
    return changes


def listen(context: _Context, bell_endpoint: str) -> _Socket:
    """Return a SUB socket that gets an empty frame when the owner has rung its bell.

    Lossy: whoever hears nothing still looks from time to time. Rings nobody reads do not add up.
    """
    bell = context.socket(zmq.SUB)
    bell.conflate = 1
    bell.reconnect_ivl = BELL_RECONNECT_MS
    bell.subscribe(b"")
    _bound(bell)
    bell.connect(bell_endpoint)
    return bell


@cache
def srand() -> Any:
    """Return that of libc. The fork server asks for it, so that no child makes classes for it."""
    import ctypes  # Clients import this module, too.

    return ctypes.CDLL(None).srand


def _bound(socket: _Socket) -> None:
    """Set what all sockets have in common."""
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def require_free(endpoints: Mapping[str, str]) -> dict[str, str]:
    """Bind each of these tcp addresses for a moment, and return them in numbers.

    Raises:
        Conflict: one of them is taken.
        Invalid: one of them is none of this machine, or is not for this user.
    """
    if not endpoints:
        return {}
    bound: dict[str, str] = {}
    context: _Context = zmq.Context()
    try:
        for name, endpoint in endpoints.items():
            with context.socket(zmq.ROUTER) as socket:
                _over_tcp(socket, endpoint)
                socket.bind(endpoint)
                bound[name] = _bound_to(socket)
        return bound
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise Conflict(
                f"{endpoint} is taken by another process",
                hint="transport.tcp_port names other ports; `ss -ltnp` shows who has which",
            ) from None
        raise Invalid(
            f"{endpoint} cannot be bound: {os.strerror(error.errno or 0)}",
            hint="transport.tcp_host is an IP address or an interface of this machine",
        ) from None
    finally:
        context.term()  # Waits until they are free again.


def _bound_to(socket: _Socket) -> str:
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    return bound.rstrip(b"\0").decode()


def _over_tcp(socket: _Socket, endpoint: str) -> None:
    """Find out when the machine at the other end is gone. For what is bound or connected next."""
    socket.set(zmq.IPV6, "[" in endpoint)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_MS_MAX)


def raise_file_limit() -> int:
    """Raise the limit of open files as far as it goes, and return it.

    A listener of ZeroMQ on a socket file aborts the process when there is none left.
    """
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
