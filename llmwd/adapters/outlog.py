"""A service's output: a pipe drained into a file that is rotated by size. Standard library only.

logging.handlers.RotatingFileHandler rotates the same way, but wants records instead of a stream of bytes,
stops at a full disk with a traceback for each record, and costs the holder two megabytes.
"""

import array
import fcntl
import os
import select
import stat
import sys
import termios
import threading
import time

PIPE_BYTES = 1 << 20  # of the service's output may wait for the disk


class OutLog:
    """log, log.1 … log.<keep>, each at most `max_bytes`, mode 0600.

    A thread, which nothing waits for, writes it: state folders lie on network file systems, where a
    write can hang for minutes, and the end of a process tree must not. Fork before `start`.
    """

    def __init__(self, path: str, max_bytes: int, keep: int) -> None:
        self.path, self.max_bytes, self.keep = path, max(max_bytes, 4096), keep
        self._source, self.service_end = os.pipe()
        try:
            fcntl.fcntl(self.service_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:  # the user's share of pipe memory is used up; the usual 64 KiB do as well
            pass
        # Our own end is opened anew, because O_NONBLOCK on a duplicate would reach the service as well.
        self._own_end = os.open(f"/proc/self/fd/{self.service_end}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._file: int | None = None
        self._size = self._lost = 0
        self._holds = False  # the thread has, or is about to take, something that is not written yet
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def start(self) -> None:
        """Begin draining. Our own standard error goes to the same file from here on."""
        os.close(self.service_end)
        os.dup2(self._own_end, 2)
        self._thread.start()

    def say(self, text: str) -> None:
        """A line of our own, dropped rather than waited for."""
        try:
            os.write(self._own_end, f"llmwd holder: {text}\n".encode())
        except OSError:
            pass

    def settle(self, within_s: float) -> None:
        """Wait until what is in the pipe now has been written, if the disk lets it in time."""
        end_s = time.monotonic() + within_s
        # In this order: what is no longer in the pipe was taken after `_holds` had been set.
        while (self._waiting() or self._holds) and time.monotonic() < end_s:
            time.sleep(0.002)

    def _waiting(self) -> int:
        waiting = array.array("i", [0])
        fcntl.ioctl(self._source, termios.FIONREAD, waiting)
        return waiting[0]

    def close(self, within_s: float) -> None:
        """Give up our ends of the pipe, and wait until all is written, if the disk lets it in time."""
        for fd in (self._own_end, 2):
            os.close(fd)
        self._thread.join(within_s)

    def _drain(self) -> None:
        readable = select.poll()
        readable.register(self._source, select.POLLIN)
        while True:
            readable.poll()
            self._holds = True
            chunk = os.read(self._source, 65536)
            if not chunk:
                return
            try:
                self._write(chunk)
            except OSError:  # disk full, folder gone: the service must not notice
                self._lost += len(chunk)
            self._holds = False

    def _write(self, chunk: bytes) -> None:
        if self._file is None:
            self._open()
        if self._lost:
            note = f"llmwd holder: about {self._lost} bytes of output could not be written here\n".encode()
            self._size += os.write(self._file, note)
            self._lost = 0
        while chunk:
            room = max(self.max_bytes - self._size, 0)
            cut = len(chunk)
            if room < cut:
                cut = chunk.rfind(b"\n", 0, room) + 1 or (room if self._size == 0 else 0)
            written = os.write(self._file, chunk[:cut]) if cut else 0
            self._size += written
            chunk = chunk[written:]
            if chunk and self._size + len(chunk) > self.max_bytes:
                self._rotate()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        found = os.fstat(self._file)
        self._size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            self.max_bytes = sys.maxsize  # a device is never renamed

    def _rotate(self) -> None:
        os.close(self._file)
        self._file = None
        names = [self.path] + [f"{self.path}.{n}" for n in range(1, self.keep + 1)]
        for old, new in reversed(list(zip(names, names[1:]))):
            if os.path.exists(old):
                os.rename(old, new)
        if self.keep < 1:
            os.unlink(self.path)
        self._open()
