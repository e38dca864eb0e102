"""The start of a service by the holder: fork, and what exec said. Standard library only.

subprocess can do neither: set the death signal between fork and exec without preexec_fn, nor tell of a
failed exec without blocking (an executable on a network file system may take minutes to say no).
"""

import errno
import os
import signal

from llmwd.adapters import courtesy, procs


class Service:
    """A service that has been forked. `report` is readable once exec has failed or worked."""

    def __init__(self, argv: list[str], env: dict[str, str], cwd: str, output: int, wish: dict | None = None,
                 umask: int | None = None) -> None:
        """Start `argv` in a session of its own, killed when our thread ends, output to the descriptor `output`.

        `wish`: how it stands back behind others (messages.Courtesy); what of it cannot be had is said in its output.
        """
        self.report, report_end = os.pipe()
        os.set_blocking(self.report, False)
        self._path, parent = argv[0], os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # none may meet our handlers there
        self.pid = os.fork()
        if self.pid == 0:
            failure = f"cannot run in the folder {cwd}"
            try:
                os.chdir(cwd)
                failure = f"cannot start {argv[0]}"
                if umask is not None:
                    os.umask(umask)
                _become(argv, env, output, parent, wish)
            except (OSError, ValueError) as problem:
                os.write(report_end, f"{failure}: {getattr(problem, 'strerror', None) or problem}".encode())
            finally:
                os._exit(127)
        os.close(report_end)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def failure(self) -> str | None:
        """Why it could not be started, one sentence; "" once it has been; None while that is not known."""
        try:
            said = os.read(self.report, 4096).decode(errors="replace")
        except BlockingIOError:
            return None
        if said == f"cannot start {self._path}: {os.strerror(errno.ENOENT)}" and os.path.exists(self._path):
            return f"cannot start {self._path}: the interpreter named in its first line does not exist"
        return said


def _become(argv: list[str], env: dict[str, str], output: int, parent: int, wish: dict | None) -> None:
    os.setsid()  # signals of a terminal, or to our own group, do not reach it
    procs.set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that: nobody would
        return
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)  # all other descriptors of ours are close-on-exec
    for problem in courtesy.stand_back(wish) if wish else ():
        os.write(2, f"llmwd: {problem}\n".encode())
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)  # an inherited "ignore SIGINT" would reach vLLM otherwise
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execvpe(argv[0], argv, env)
