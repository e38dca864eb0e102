"""A disk of a test's own, which can be full or read-only."""

import contextlib
import os
import subprocess
from pathlib import Path


class Disk:
    """A small disk at `folder`; without root's rights just a folder that cannot be filled."""

    def __init__(self, folder: Path, mib: int = 24):
        self.folder = folder
        folder.mkdir()
        self.own = os.geteuid() == 0 and self._run("mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "llmwd-chaos", folder)
        self.read_only = False

    @staticmethod
    def _run(*words: object) -> bool:
        return subprocess.run([str(word) for word in words], capture_output=True).returncode == 0

    def spoil(self, how: str) -> bool:
        """`full` or `read-only`; False: that cannot be done here."""
        if not self.own:
            return False
        self.heal()
        if how == "full":
            with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            return True
        self.read_only = self._run("mount", "--bind", self.folder, self.folder)
        return self.read_only and self._run("mount", "-o", "remount,ro,bind", self.folder)

    def heal(self) -> None:
        if self.read_only:
            self._run("umount", "-l", self.folder)
            self.read_only = False
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        self.heal()
        if self.own:
            self._run("umount", "-l", self.folder)
