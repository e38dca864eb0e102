"""A stand-in NVIDIA driver library: built from C, loaded by the real pynvml, its world written by the test.

    driver = FakeDriver(build(folder), folder / "world")
    driver.write("gpu uuid=GPU-a minor=0 pci=00000000:1B:00.0 memory=1000", "process gpu=0 pid=77 used=500")
    Probe(env=driver.env())
"""

import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("libnvidia_ml.c")


def build(folder: Path, *flags: str) -> Path:
    """Compile the stand-in into `folder`; returns the folder, for LD_LIBRARY_PATH. CalledProcessError: it failed."""
    library = folder / "libnvidia-ml.so.1"
    warnings = ("-Wall", "-Wextra", "-Werror")
    argv = ["cc", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", *warnings, *flags, "-o", str(library), str(SOURCE)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return folder


class FakeDriver:
    """The world that the stand-in library shows; the language of its lines is told in libnvidia_ml.c."""

    def __init__(self, library: Path, world: Path) -> None:
        self.library = library
        self.world = world
        self.lines: list[str] = []

    def env(self) -> dict[str, str]:
        """The environment in which a process finds this driver."""
        return os.environ | {"LD_LIBRARY_PATH": str(self.library), "LLMWD_FAKE_NVML": str(self.world)}

    def write(self, *lines: str) -> None:
        """Replace the whole world, in one step: a reader sees the old one or the new one."""
        self.lines = list(lines)
        draft = self.world.with_suffix(".new")
        draft.write_text("driver 550.54.15\n" + "".join(f"{line}\n" for line in self.lines))
        draft.replace(self.world)

    def add(self, *lines: str) -> None:
        """Add a process, a fault, ..."""
        self.write(*self.lines, *lines)

    def remove(self, *lines: str) -> None:
        """Take back what was added: the process is forgotten, the fault is over."""
        self.write(*(line for line in self.lines if line not in lines))
