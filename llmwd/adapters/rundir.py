"""The folders that llmwd lives in: where they are, that they are ours, and the small files in them.

Runtime (sockets, locks, retained facts) is node-local; state (orders, journal, logs) may be in a shared
home folder, hence one folder for each host in it.
"""

import errno
import fcntl
import os
import shlex
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from llmwd import ownership
from llmwd.adapters.procs import alive, start_ticks
from llmwd.messages import Envelope

# sun_path holds 108 bytes; the longest name we put into the runtime folder has to fit behind it.
LONGEST_SOCKET_NAME = len("/holder-cloudflared.sock.last")
SOCKET_PATH_BYTES = 107
RELEASE_SCRIPT = "release.sh"

# How long the lock may be held by somebody whose pid is not in it, before that counts as a supervisor.
ASKED_WITHIN_S = 2.0

LINKS_MOST = 40  # as the kernel has it

_decoder = msgspec.msgpack.Decoder(Envelope)


class DirError(Exception):
    """A folder cannot be used; the text is a sentence for the user."""


class Dirs(msgspec.Struct, frozen=True):
    """home: etc/, models/, active-model.env. runtime: sockets. state: orders, journal, logs."""

    home: Path
    runtime: Path
    state: Path

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def sim(self) -> Path:
        return self.runtime / "sim"


def short_host() -> str:
    return socket.gethostname().split(".")[0]


def find_dirs(environ: Mapping[str, str]) -> Dirs:
    """Where the folders are, by the environment alone; makes nothing."""
    checkout = Path(__file__).resolve().parents[2]
    home = Path(environ.get("LLMWD_HOME") or checkout)
    if environ.get("LLMWD_RUNTIME_DIR"):
        runtime = Path(environ["LLMWD_RUNTIME_DIR"])
    elif environ.get("XDG_RUNTIME_DIR"):
        runtime = Path(environ["XDG_RUNTIME_DIR"]) / "llmwd"
    else:
        runtime = Path(f"/tmp/llmwd-{os.getuid()}")
    if environ.get("LLMWD_STATE_DIR"):
        state = Path(environ["LLMWD_STATE_DIR"])
    else:
        base = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME") or "/", ".local/state")
        state = Path(base) / "llmwd" / short_host()
    return Dirs(home.absolute(), runtime.absolute(), state.absolute())


def make_ours(path: Path, what: str) -> os.stat_result:
    """Make the folder with mode 0700, or check that nobody else can have put something there, or can put another folder in
    its place: what is in it is trusted from then on. Raises DirError."""
    try:
        for folder in (*reversed(path.parents), path):
            if not os.path.lexists(folder):  # each with this mode, whatever the umask is
                folder.mkdir(mode=0o700, exist_ok=True)
        # lstat: a link planted in a shared folder must not lead us to somebody else's place.
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise DirError(f"the {what} folder {path} is not a folder (a link, or a file): remove it, or name another")
        if found.st_uid != os.getuid():
            raise DirError(f"the {what} folder {path} belongs to uid {found.st_uid}, not to us: name another folder")
        if ownership.others_may_write(found):
            raise DirError(
                f"the {what} folder {path} can be written by others, who may have put something into it: remove it, or "
                f"look through it and `chmod 700 {path}`"
            )
        for passed in _passed_on_the_way(path.parent):
            if why := _who_replaces_what_is_in(passed):
                raise DirError(f"the {what} folder {path} can be replaced by others, {why}: name another folder")
    except OSError as error:
        raise DirError(f"the {what} folder {path} cannot be made: {error.strerror}") from error
    return found


def _passed_on_the_way(path: Path) -> Iterator[Path]:
    """Every folder and link that the kernel passes when it looks `path` up, `path` itself included."""
    at, left, links = Path("/"), list(reversed(path.parts[1:])), 0
    yield at
    while left:
        name = left.pop()
        at = at.parent if name == ".." else at / name
        yield at
        if at.is_symlink():
            links += 1
            if links > LINKS_MOST:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = Path(os.readlink(at))
            left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            at = Path("/") if target.is_absolute() else at.parent


def _who_replaces_what_is_in(passed: Path) -> str:
    """Who else can put something in the place of what lies in this folder or behind this link; "" for nobody. In a sticky
    folder everybody can make something, and only its owner and the folder's can take it away."""
    found = passed.lstat()
    if not ownership.is_ours_or_roots(found):
        return f"because {passed} belongs to uid {found.st_uid}"
    if stat.S_ISDIR(found.st_mode) and not found.st_mode & stat.S_ISVTX and ownership.others_may_write(found):
        return f"who may write to {passed}"
    return ""


def make_private(path: Path, what: str) -> None:
    """Like make_ours, and nobody else can read it. Raises DirError."""
    if make_ours(path, what).st_mode & 0o077:
        try:
            if any(path.iterdir()):
                # It may be in use for something else: closing it would lock people out of what is theirs.
                raise DirError(
                    f"the {what} folder {path} can be read by others and is not empty: name another folder, or, if all "
                    f"in it is llmwd's, `chmod 700 {path}`"
                )
            path.chmod(0o700)
        except OSError as error:
            raise DirError(f"the {what} folder {path} cannot be made private: {error.strerror}") from error


def prepare(dirs: Dirs) -> None:
    """Make runtime and state folders, private to us. Raises DirError."""
    if len(os.fsencode(dirs.runtime)) + LONGEST_SOCKET_NAME > SOCKET_PATH_BYTES:
        raise DirError(
            f"the runtime folder {dirs.runtime} has too long a path for unix sockets: "
            f"set LLMWD_RUNTIME_DIR to one of at most {SOCKET_PATH_BYTES - LONGEST_SOCKET_NAME} bytes"
        )
    for path, what in (
        (dirs.runtime, "runtime"),
        (dirs.runtime / "facts", "facts"),
        (dirs.sim, "simulation"),
        (dirs.state, "state"),
        (dirs.logs, "log"),
    ):
        make_private(path, what)


class Lock:
    """The right to be this node's and user's supervisor: an flock on a file that tells the pid."""

    def __init__(self, runtime: Path):
        self.path = runtime / "supervisor.lock"
        self._fd = -1

    def take(self) -> tuple[int, int] | None:
        """None: it is ours until the process ends. Else (pid, start ticks) of who has it. Raises DirError."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise DirError(f"the lock {self.path} cannot be opened ({error.strerror}): remove it if it is a link") from error
        end_s = time.monotonic() + ASKED_WITHIN_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                other = _pid_and_start(os.pread(fd, 100, 0))
            # Who only asks (running_supervisor) has the lock for a moment, too.
            if (other is not None and alive(*other)) or time.monotonic() >= end_s:
                os.close(fd)
                return other or (0, 0)
            time.sleep(0.005)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {start_ticks(os.getpid())}\n".encode(), 0)
        self._fd = fd
        return None

    def lost(self) -> bool:
        """Whether the file is not there any more, or is another one: then it keeps nobody away."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            return True

    def close_in_child(self) -> None:
        """A forked child must not keep the lock alive beyond the root."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _pid_and_start(text: bytes) -> tuple[int, int] | None:
    words = text.split()
    if len(words) == 2 and all(word.isdigit() for word in words):
        return int(words[0]), int(words[1])
    return None


def running_supervisor(runtime: Path) -> tuple[int, int] | None:
    """(pid, start ticks) of the supervisor that holds the lock, None if nobody does."""
    try:
        fd = os.open(runtime / "supervisor.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        told = _pid_and_start(os.pread(fd, 100, 0))
        # Between its lock and its word the file holds what the one before it wrote, whose facts are still there, too.
        return told if told is not None and alive(*told) else (0, 0)
    finally:
        os.close(fd)
    return None


def missing_files(runtime: Path, workers: Iterable[str]) -> str:
    """The name of something without which a supervisor with these workers cannot be reached; "" if all is there."""
    names = ["facts", *(f"bus-{worker}" for worker in workers)]
    return next((name for name in names if not (runtime / name).exists()), "")


def write_atomic(path: Path, data: bytes, durable: bool = False) -> None:
    """Replace the file as a whole, mode 0600; `durable` waits until the disk has it."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def retain_fact(runtime: Path, worker: str, data: bytes) -> None:
    """Keep a worker's latest fact for readers that are not on the bus (llmwd-ctl, the worker's next incarnation)."""
    # A fixed temporary name: one writer per worker, and no litter after a kill in between.
    temporary = runtime / "facts" / f".{worker}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, data) < len(data):  # the disk is full now: half a fact is none
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    finally:
        os.close(fd)
    os.replace(temporary, runtime / "facts" / f"{worker}.bin")


def door_socket(runtime: Path) -> Path:
    """The unix socket that the front door answers on (HTTP, mode 0600)."""
    return runtime / "door.sock"


def release_script(python: str) -> bytes:
    """What etc/slurm/prolog-llmwd.sh has `sh` run as us: `llmwd-ctl release` by the interpreter and code that run now.

    Not bin/llmwd-ctl: that would make its environment anew where the checkout has changed, while a job waits.
    """
    checkout = Path(__file__).resolve().parents[2]
    words = ["exec", "env", f"PYTHONPATH={checkout}", python, "-s", "-P", "-m", "llmwd.ctl.main", "release"]
    return f'{shlex.join(words)} "$@"\n'.encode()


def read_fact(runtime: Path, worker: str) -> Envelope | None:
    """The worker's latest fact, None if there is none or it is not readable."""
    try:
        return _decoder.decode((runtime / "facts" / f"{worker}.bin").read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
