"""Who is speaking: key pairs, their names and roles, and where owners are found.

Every actor has a CURVE key pair. `var/keys/<hex of public key>.key` says which name and role a
public key has: its presence is enrolment, its removal revocation. `var/keys/<name>.key_secret`
holds the pair. Both have the ZeroMQ certificate format, which `zmq.auth.load_certificate` reads.

- A name is enrolled once, however many processes try at the same time: all get the same pair.
- A secret without its public file is revoked; nothing but an operator brings it back.
- The names of owners can be taken in the role `owner` only.
- Nothing here follows a symlink below `var/`, or believes a directory that is not ours alone.
- A secret key is in its file and in `Certificate.secret`, never in a text or a `repr`.

Source: certificates as in ZPL (ZeroMQ RFC 4) and czmq's zcert; addresses: unix(7).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple, cast

import msgspec
import zmq
from zmq.utils import z85

from ksi.transport.errors import Conflict, Forbidden, Invalid, NotRunning
from ksi.transport.limits import ID_PATTERN, RUN_NAME_BYTES_MAX, SOCKET_PATH_BYTES_MAX
from ksi.transport.message import ANYONE, Role
from ksi.transport.remote import REMOTE_NAME, is_remote

RESERVED: Final = frozenset(
    {"archive", "bus", "completion", "events", "files", "index", "library", "mcp", "registry"}
    | {"sessions", "state", "supervisor"}
)
BELL_SUFFIX: Final = ".bell"  # The doorbell of an owner is beside its socket.

_SETTLED_NS: Final = 20_000_000  # Two changes within one tick of the file clock look like one.
_DIRECTORY_NAME: Final = "endpoints.json"
_WILDCARDS: Final = frozenset({"0.0.0.0", "[::]"})  # "all addresses": where none can connect
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|\[?[0-9A-Fa-f:.]{2,45}(%\w+)?\]?")
_VAR_NAME: Final = "var"  # In a short run directory: a link to the var it belongs to.
_FILE_BYTES_MAX: Final = 1 << 20
_ID: Final = re.compile(ID_PATTERN)
_USER_ID: Final = re.compile(r"[0-9a-f]{64}")
_KEY_FILE: Final = re.compile(r"([0-9a-f]{64})\.key")
_FIELD: Final = re.compile(r'^\s+([a-z-]+)\s*=\s*"?([^"\n]*)"?\s*$', re.MULTILINE)


class Identity(NamedTuple):
    """The name and role that a public key stands for."""

    name: str
    role: Role


class Certificate(NamedTuple):
    """A key pair with its name and role; `secret` is None where only the public half is known."""

    name: str
    role: Role
    public: bytes  # Z85, 40 bytes
    secret: bytes | None = None  # Z85, 40 bytes

    @property
    def user_id(self) -> str:
        """The hex of the public key: how the frames of its connections name the sender."""
        return z85.decode(self.public).hex()

    def __repr__(self) -> str:
        return f"Certificate(name={self.name!r}, role={self.role!r}, public={self.public!r})"


class KeyRing:
    """The identities of one var directory, and which public keys are enrolled.

    Any number of processes may use the same directory. What is remembered of it is dropped when
    the directory changes.

    Raises:
        Forbidden: the key directory is there and is not ours alone.
    """

    def __init__(self, var: Path) -> None:
        self.directory = _real(var) / "keys"
        _require_private(self.directory)
        self._path = str(self.directory)
        self._known: dict[str, Identity] = {}
        self._known_at = -1

    def enroll(self, name: str, role: Role = "agent") -> Certificate:
        """Return the key pair of `name`, made now in this role if there is none yet.

        The role of a name that exists already is left as it is and returned.

        Raises:
            Invalid: the name is no id, or there is no such role.
            Forbidden: the name is reserved or revoked, or the key directory is not ours alone.
        """
        _require_admissible(name, role)
        _make_private(self.directory)
        if (known := self.load(name)) is not None:
            return known
        public, secret = zmq.curve_keypair()
        made = Certificate(name, role, public, secret)
        public_path = self._public_path(made.user_id)
        # The public file goes first: whoever sees the secret file sees an enrolled pair.
        _write(public_path, _text_of(made._replace(secret=None)))
        if not _write_first(self._secret_path(name), _text_of(made)):
            public_path.unlink()
            return self.enroll(name, role)  # Another process was first: its pair is there now.
        return made

    def load(self, name: str) -> Certificate | None:
        """Return the key pair of `name`, or None when there is none.

        Raises:
            Forbidden: it was revoked, or others can read the secret file.
            Invalid: the file is damaged.
        """
        if not _ID.match(name):
            raise Invalid(f"{name!r} is no name ([A-Za-z0-9._-], 1-128 characters)"[:300])
        path = self._secret_path(name)
        try:
            text = _read(path, closed_to=0o077)
        except FileNotFoundError:
            return None
        pair = _parse(text)
        if pair is None or pair.name != name or not _is_pair(pair):
            raise Invalid(f"{path} does not hold the key pair of {name}", hint=_renew(name))
        enrolled = self._enrolled(pair.user_id)
        if enrolled is None or enrolled.name != name:
            raise Forbidden(f"the key of {name} was revoked", hint=_renew(name), name=name)
        return pair._replace(role=enrolled.role)

    def of_public(self, key: str | bytes) -> Identity | None:
        """Return whose public key this is (hex, or Z85 as bytes); None when it is not enrolled."""
        self.refresh()
        return self.lookup(z85.decode(key).hex() if isinstance(key, bytes) else key)

    def lookup(self, user_id: str) -> Identity | None:
        """Return whose public key this is (hex) as of the last `refresh`, without asking the disk
        for a key that was asked for since."""
        known = self._known.get(user_id)
        if known is None and (known := self._enrolled(user_id)) is not None:
            self._known[user_id] = known
        return known

    def refresh(self) -> None:
        """Forget what is known if the directory may have changed since. One `stat`."""
        generation = self.generation()
        if generation == self._known_at:
            return
        self._known.clear()
        # A change right after this one may carry the same time: keep looking until it cannot.
        settled = time.time_ns() - generation > _SETTLED_NS
        self._known_at = generation if settled else -1

    def generation(self) -> int:
        """Return a number that changes when a key comes or goes (after `_SETTLED_NS`)."""
        try:
            return os.lstat(self._path).st_mtime_ns
        except OSError:
            return 0

    def enrolled(self) -> list[Certificate]:
        """Return the public halves of all that are enrolled, by name."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                if match := _KEY_FILE.fullmatch(entry.name):
                    user_id = match[1]
                    if (identity := self._enrolled(user_id)) is not None:
                        public = z85.encode(bytes.fromhex(user_id))
                        found.append(Certificate(*identity, public))
        return sorted(found)

    def names(self) -> list[str]:
        """Return the names that are enrolled, in order."""
        return sorted({certificate.name for certificate in self.enrolled()})

    def remove(self, name: str) -> None:
        """Revoke every key of `name`, also for connections that are up. Its secret file stays,
        and keeps the name from being enrolled again until `forget`."""
        for certificate in self.enrolled():
            if certificate.name == name:
                self._public_path(certificate.user_id).unlink(missing_ok=True)
        _sync(self.directory)

    def forget(self, name: str) -> None:
        """Revoke `name` and free it: whoever enrols it next gets a new key pair."""
        self.remove(name)
        self._secret_path(name).unlink(missing_ok=True)
        _sync(self.directory)

    def carry(self, certificate: Certificate) -> None:
        """Take up a key pair that was enrolled in another ring."""
        _make_private(self.directory)
        self.forget(certificate.name)
        public = certificate._replace(secret=None)
        _write(self._public_path(certificate.user_id), _text_of(public))
        _write(self._secret_path(certificate.name), _text_of(certificate))

    def _enrolled(self, user_id: str) -> Identity | None:
        if not _USER_ID.fullmatch(user_id):
            return None
        try:
            public = _parse(_read(self._public_path(user_id), closed_to=0o022))
        except (FileNotFoundError, Forbidden):
            return None
        if public is None or public.user_id != user_id:
            return None
        return Identity(public.name, public.role)

    def _public_path(self, user_id: str) -> Path:
        return self.directory / f"{user_id}.key"

    def _secret_path(self, name: str) -> Path:
        return self.directory / f"{name}.key_secret"


class Address(msgspec.Struct, frozen=True):
    """Where an owner listens, and the public key (Z85) it proves to be itself with.

    Attributes:
        tcp: where it listens for other machines, too; empty: nowhere.
    """

    endpoint: str
    key: str
    tcp: str = ""


class Directory(msgspec.Struct, frozen=True):
    """Who owns what and where: `run/endpoints.json`, written by the supervisor.

    A directory with a `remote.json` in its place stands for the system of another machine: that
    file, and keys, are all there is in it.

    Attributes:
        commands, queries: the owner of each operation of that kind.
        domains: the owner of the topics that begin with this word.
        owners: the address of each owner.
    """

    commands: dict[str, str]
    queries: dict[str, str]
    domains: dict[str, str]
    owners: dict[str, Address]

    @staticmethod
    def read(var: Path) -> Directory:
        """Return the directory as it was published last.

        Raises:
            NotRunning: there is none.
            Invalid: what was carried from another machine is damaged.
            Forbidden: it is not ours alone.
        """
        path = var / REMOTE_NAME if is_remote(var) else run_directory(var) / _DIRECTORY_NAME
        try:
            return _decode_directory(_read(path, closed_to=0o022))
        except FileNotFoundError:
            raise NotRunning(f"nothing runs on {var}", hint="ksi start") from None
        except ValueError as error:
            text = f"{path} is unreadable: {error}"
            if is_remote(var):
                hint = "on the machine of the system: ksi agents enroll NAME --to DIR"
                raise Invalid(text, hint=hint) from None
            raise NotRunning(text, hint="ksi restart") from None

    def write(self, var: Path) -> None:
        """Publish it in one step: a reader sees the former one or this one."""
        text = msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2)
        _write(make_run_directory(var) / _DIRECTORY_NAME, text.decode())

    def carry(self, to: Path, host: str = "") -> None:
        """Make the directory `to` stand for this system on another machine.

        Args:
            host: the name or address of this machine there; by default the one it listens on.

        Raises:
            Invalid: no owner listens on tcp, or on all addresses and `host` does not say which.
            Conflict: `to` holds something else.
        """
        owners = {
            name: Address(_seen_from_afar(place.tcp, host), place.key)
            for name, place in self.owners.items()
            if place.tcp
        }
        if not owners:
            hint = "set transport.tcp_host in ksi.toml, then ksi restart"
            raise Invalid("this system does not listen on tcp", hint=hint)
        _require_ours_to_carry(to, {place.key for place in owners.values()})
        to.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = msgspec.structs.replace(self, owners=owners)
        text = msgspec.json.format(msgspec.json.encode(seen, order="sorted"), indent=2)
        _write(to / REMOTE_NAME, text.decode())

    @staticmethod
    def remove(var: Path) -> None:
        """Withdraw it: clients learn at once that nothing runs."""
        (run_directory(var) / _DIRECTORY_NAME).unlink(missing_ok=True)


# Made at import, in the fork server: once for all owners, in pages that they share.
_decode_directory: Final = msgspec.json.Decoder(Directory).decode


def run_directory(var: Path) -> Path:
    """Return the directory of sockets and what else lives as long as a run. It may not exist yet.

    It is `var/run`, or where socket paths there would be too long, a short directory of our own:
    `$XDG_RUNTIME_DIR/ksi-<hash>` or `/tmp/ksi-<uid>-<hash>`. Which one is recorded in `var/run`,
    so that processes with another environment find the same.

    Raises:
        Forbidden: it is there and is not ours alone.
    """
    usual = _real(var) / "run"
    _require_private(usual)
    directory = usual if _has_room(usual) else _recorded(usual) or _short_directory(usual.parent)
    _require_private(directory)
    return directory


def make_run_directory(var: Path) -> Path:
    """Return `run_directory(var)`, created if need be.

    Raises:
        Forbidden: it is there and is not ours alone.
    """
    usual = _real(var) / "run"
    _make_private(usual)
    if not _has_room(usual):
        recorded = _recorded(usual)
        if recorded is None or not recorded.parent.is_dir():  # Gone with the login session.
            _write(usual / "elsewhere", f"{_short_directory(usual.parent)}\n")
    directory = run_directory(var)
    _make_private(directory)
    if directory != usual and _var_of(directory) != usual.parent:
        (directory / _VAR_NAME).unlink(missing_ok=True)
        os.symlink(usual.parent, directory / _VAR_NAME)
    return directory


def hold_run_directory(directory: Path) -> int:
    """Return a descriptor that keeps the directory from being swept, with its var gone or not."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def remove_run_directory(var: Path) -> None:
    """Remove the short run directory of `var`, if it has one. For its holder, as the last thing.

    Raises:
        OSError: it cannot be removed.
    """
    directory = run_directory(var)
    if _var_of(directory) == _real(var):
        shutil.rmtree(directory)


def sweep_run_directories(parent: Path) -> None:
    """Remove the short run directories in `parent` that are ours, dead, and whose var is gone."""
    for directory in parent.glob("ksi-*"):
        with suppress(OSError, Forbidden):
            var = _var_of(directory)
            if var is None or var.is_dir():
                continue
            _require_private(directory)
            held = hold_run_directory(directory)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
            finally:
                os.close(held)


def _var_of(directory: Path) -> Path | None:
    """Return the var of which this is the short run directory; None if it does not say so."""
    try:
        return Path(os.readlink(directory / _VAR_NAME))
    except OSError:
        return None


def endpoint(var: Path, name: str) -> str:
    """Return the address on this machine of the owner `name`.

    Raises:
        Invalid: the name is no id, or too long for a socket.
        Forbidden: the run directory is not ours alone.
    """
    if not _ID.match(name) or len(name) + len(BELL_SUFFIX) > RUN_NAME_BYTES_MAX:
        raise Invalid(f"{name!r} cannot name a socket"[:300])
    return f"ipc://{run_directory(var) / name}"


def bell_endpoint(var: Path, name: str) -> str:
    """Return the address of the doorbell of the owner `name`. Raises as `endpoint`."""
    return endpoint(var, name) + BELL_SUFFIX


def _require_admissible(name: str, role: Role) -> None:
    if not _ID.match(name):
        raise Invalid(f"{name!r} is no name ([A-Za-z0-9._-], 1-128 characters)"[:300])
    if role not in ANYONE:
        raise Invalid(f"{role!r} is no role ({', '.join(sorted(ANYONE))})"[:300])
    if name in RESERVED and role != "owner":
        raise Forbidden(f"{name} is the name of an owner", hint="choose another name", name=name)


def _renew(name: str) -> str:
    return f"an operator may remove keys/{name}.key_secret; then `ksi agents enroll {name}`"


def _text_of(certificate: Certificate) -> str:
    kind, warning = (
        ("Public", "#   Exchange securely, or verify the contents after exchange.")
        if certificate.secret is None
        else ("**Secret**", "#   Do not give this file to anyone, nor change its permissions.")
    )
    lines = [
        f"#   ZeroMQ CURVE {kind} Certificate",
        warning,
        "",
        "metadata",
        f'    name = "{certificate.name}"',
        f'    role = "{certificate.role}"',
        "curve",
        f'    public-key = "{certificate.public.decode()}"',
    ]
    if certificate.secret is not None:
        lines.append(f'    secret-key = "{certificate.secret.decode()}"')
    return "\n".join([*lines, ""])


def _parse(text: str) -> Certificate | None:
    """Return the certificate, or None when the text is none that could have been enrolled."""
    fields = dict(_FIELD.findall(text))
    try:
        name, role = fields["name"], cast(Role, fields["role"])
        _require_admissible(name, role)
        public = fields["public-key"].encode("ascii")
        secret = fields["secret-key"].encode("ascii") if "secret-key" in fields else None
        if len(z85.decode(public)) != 32:
            return None
    except (Invalid, Forbidden, KeyError, ValueError, struct.error):
        return None
    return Certificate(name, role, public, secret)


def _is_pair(certificate: Certificate) -> bool:
    try:
        return zmq.curve_public(certificate.secret or b"") == certificate.public
    except (ValueError, zmq.ZMQError):
        return False


def _seen_from_afar(tcp: str, host: str) -> str:
    bound, _, port = tcp.removeprefix("tcp://").rpartition(":")
    if host and not _HOST.fullmatch(host):
        raise Invalid(f"{host[:200]!r} is no name or address of a machine")
    if not host and bound in _WILDCARDS:
        hint = "--host says under which name or address the other machine finds this one"
        raise Invalid(f"this system listens on all addresses ({bound})", hint=hint)
    return tcp_endpoint(host or bound, port)


def _require_ours_to_carry(to: Path, keys: set[str]) -> None:
    """Raise `Conflict` unless `to` is empty, or stands for the system with these keys."""
    if is_remote(to):
        former = Directory.read(to)
        if keys.isdisjoint(place.key for place in former.owners.values()):
            raise Conflict(f"{to} holds keys to another system", hint="name another directory")
    elif to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Conflict(f"{to} is not empty", hint="name a new directory")


def tcp_endpoint(host: str, port: int | str) -> str:
    """Return the address of a port; an IPv6 address gets its brackets."""
    bare = host.strip("[]")
    return f"tcp://[{bare}]:{port}" if ":" in bare else f"tcp://{bare}:{port}"


def _real(var: Path) -> Path:
    return Path(os.path.realpath(var))


def _has_room(directory: Path) -> bool:
    return len(os.fsencode(directory)) + 1 + RUN_NAME_BYTES_MAX <= SOCKET_PATH_BYTES_MAX


def _short_directory(var: Path) -> Path:
    """Return the place for sockets of a `var` whose path is too long."""
    mark = hashlib.sha256(os.fsencode(var)).hexdigest()[:8]
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session:
        directory = Path(session) / f"ksi-{mark}"
        if directory.is_absolute() and _has_room(directory) and _is_ours(directory.parent):
            return directory
    return Path(f"/tmp/ksi-{os.geteuid()}-{mark}")


def _recorded(usual: Path) -> Path | None:
    """Return the short directory that was chosen before."""
    try:
        recorded = Path(_read(usual / "elsewhere", closed_to=0o077).strip())
    except FileNotFoundError:
        return None
    return recorded if recorded.is_absolute() and _has_room(recorded) else None


def _is_ours(directory: Path) -> bool:
    try:
        return os.stat(directory).st_uid == os.geteuid()
    except OSError:
        return False


def _make_private(directory: Path) -> None:
    """Create a directory that is ours alone, or check that it is."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    _require_private(directory)


def _require_private(directory: Path) -> None:
    """Raise `Forbidden` if the directory is there and someone else could write or look into it."""
    try:
        found = os.lstat(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(found.st_mode):
        raise Forbidden(f"{directory} is not a directory", hint=f"remove {directory}")
    if found.st_uid != os.geteuid():
        raise Forbidden(f"{directory} belongs to user {found.st_uid}", hint="use another --var")
    if found.st_mode & 0o077:
        raise Forbidden(f"{directory} is open to other users", hint=f"chmod 700 {directory}")


def _read(path: Path, *, closed_to: int) -> str:
    """Return a small file of ours; raise `Forbidden` for a symlink, and for one that is someone
    else's or has a permission of `closed_to`."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Forbidden(f"{path} is a symbolic link", hint=f"remove {path}") from None
        raise
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise Forbidden(f"{path} is not a file of ours", hint=f"remove {path}")
        if found.st_mode & closed_to:
            raise Forbidden(f"{path} is open to other users", hint=f"chmod 600 {path}")
        return file.read(_FILE_BYTES_MAX).decode(errors="replace")


def _write(path: Path, text: str) -> None:
    """Set the content of a file, 0600, in one step that lasts."""
    with _draft(path, text) as draft:
        os.rename(draft, path)


def _write_first(path: Path, text: str) -> bool:
    """Create a file, 0600, in one step that lasts; return False when there was one."""
    with _draft(path, text) as draft:
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        return True


@contextmanager
def _draft(path: Path, text: str) -> Iterator[Path]:
    """Write `text` to a new file beside `path`; what is made of it is synced at the end."""
    draft = path.with_name(f".{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(fd)
        yield draft
    finally:
        draft.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    with suppress(FileNotFoundError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
