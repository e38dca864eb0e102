"""The disposable process that talks to the NVIDIA driver, and the only file that imports pynvml.

A driver call can hang in the kernel for ever, so it happens here, where nothing depends on it: questions come
as JSON lines on standard input, answers go as JSON lines to standard output (llmwd.adapters.nvml has their
shapes), and whoever asks kills this process when it is late. It takes next to nothing of the rest of llmwd: it
starts in a tenth of a second and stays small.

NVML is opened for each question and closed again: a client that stays open would keep the administrator from
resetting a GPU or replacing the driver.
"""

import ctypes
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path under -P: the package is found from here, after the standard library
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from llmwd.adapters.jobprocs_probe import jobs_of

PR_SET_PDEATHSIG = 1
GROWTH_RETRIES = 3  # the list of processes may grow between asking for its size and reading it
SENTENCES = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": "libnvidia-ml.so.1 is not on this machine: install the NVIDIA driver",
    "NVML_ERROR_DRIVER_NOT_LOADED": "the NVIDIA kernel module is not loaded: load it, or reboot the node",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "the NVIDIA library and the kernel module have different versions, as"
    " after an update without a reboot: reboot the node, or reload the module",
    "NVML_ERROR_NO_PERMISSION": "this user may not talk to the NVIDIA driver: check the modes of /dev/nvidia*",
    "NVML_ERROR_GPU_IS_LOST": "a GPU has fallen off the bus: the node needs its administrator",
}


def main() -> int:
    """Answer until standard input ends or the parent dies."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the root, which ends us through our parent
    warnings.simplefilter("ignore")  # pynvml's advice about its own name
    import setproctitle

    setproctitle.setproctitle("llmwd: nvml")
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line)["ask"])).encode() + b"\n")
        sys.stdout.buffer.flush()
    return 0


def _end_with_parent() -> None:
    parent = int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(0)


def answer(kind: str) -> dict[str, Any]:
    """One of the three answers: Inventory, Use or DriverFailure, with its name under "type"."""
    at_s = time.monotonic()
    try:
        import pynvml
    except ImportError as error:
        return {"type": "DriverFailure", "name": "PYNVML_MISSING", "text": f"pynvml cannot be imported: {error}"}
    nvml = Driver(pynvml)
    try:
        pynvml.nvmlInit()
        try:
            gpus = nvml.inventory() if kind == "inventory" else nvml.use()
            driver = nvml.text(pynvml.nvmlSystemGetDriverVersion)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        name = nvml.name_of(error)
        text = SENTENCES.get(name, f"the NVIDIA driver answers {name} ({error})")
        return {"type": "DriverFailure", "name": name, "text": text}
    return {"type": "Inventory" if kind == "inventory" else "Use", "at_s": at_s, "driver": driver, "gpus": gpus}


class Driver:
    """NVML's calls, with its errors as data: a GPU that fails does not hide the others."""

    def __init__(self, pynvml: Any) -> None:
        self.p = pynvml
        # What a model or an old driver does not offer is no failure of the GPU.
        self.absent = (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        self.names = {getattr(pynvml, name): name for name in dir(pynvml) if name.startswith("NVML_ERROR_")}
        self.errors: list[str] = []  # of the GPU being read

    def name_of(self, error: Exception) -> str:
        """The error's name in nvml.h."""
        code = getattr(error, "value", None)
        return self.names.get(code, f"NVML_ERROR_{code}")

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns; None if the driver does not have it, or failed, which `errors` then says."""
        try:
            return function(*arguments)
        except self.p.NVMLError as error:
            if error.value not in self.absent:
                self.errors.append(self.name_of(error))
            return None

    def text(self, function: Callable[..., Any], *arguments: Any) -> str:
        value = self.call(function, *arguments)
        return value.decode(errors="replace") if isinstance(value, bytes) else value or ""

    def each(self) -> Iterator[tuple[int, Any]]:
        """Index and handle of every GPU; the handle is None where there is no access."""
        for index in range(self.p.nvmlDeviceGetCount()):
            self.errors = []
            yield index, self.call(self.p.nvmlDeviceGetHandleByIndex, index)

    def inventory(self) -> list[dict[str, Any]]:
        """What the GPUs are (GpuInfo)."""
        p, handles, gpus = self.p, [], []
        for index, handle in self.each():
            handles.append(handle)
            gpu: dict[str, Any] = {"index": index, "uuid": ""}
            gpus.append(gpu)
            if handle is not None:
                gpu |= self._identity(handle)
            gpu["error"] = self.errors[0] if self.errors else ""
        for a, one in enumerate(handles):
            self.errors = []  # of a pair: a lost GPU has said so above
            pairs = [(b, other) for b, other in enumerate(handles) if b != a and one is not None and other is not None]
            gpus[a]["nvlink"] = [
                b
                for b, other in pairs
                if self.call(p.nvmlDeviceGetP2PStatus, one, other, p.NVML_P2P_CAPS_INDEX_NVLINK) == p.NVML_P2P_STATUS_OK
            ]
        return gpus

    def _identity(self, handle: Any) -> dict[str, Any]:
        p = self.p
        pci = self.call(p.nvmlDeviceGetPciInfo_v3, handle)
        memory = self.call(p.nvmlDeviceGetMemoryInfo, handle)
        slices = [self.text(p.nvmlDeviceGetUUID, one) for one in self._slices(handle)]
        return {
            "uuid": self.text(p.nvmlDeviceGetUUID, handle),
            "minor": self.call(p.nvmlDeviceGetMinorNumber, handle),
            "pci": pci_address(pci.domain, pci.bus, pci.device) if pci else "",
            "name": self.text(p.nvmlDeviceGetName, handle),
            "memory_bytes": memory.total if memory else None,
            "mig": self._in_mig_mode(handle),
            "mig_uuids": [uuid for uuid in slices if uuid],
            "numa": numa_node(pci_address(pci.domain, pci.bus, pci.device)) if pci else None,
        }

    def _in_mig_mode(self, handle: Any) -> bool:
        modes = self.call(self.p.nvmlDeviceGetMigMode, handle)
        return bool(modes) and modes[0] == 1

    def _slices(self, handle: Any) -> Iterator[Any]:
        """Handles of the MIG devices. Places without one answer NOT_FOUND."""
        if not self._in_mig_mode(handle):
            return
        for place in range(self.call(self.p.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            try:
                yield self.p.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
            except self.p.NVMLError as error:
                if error.value != self.p.NVML_ERROR_NOT_FOUND:
                    self.errors.append(self.name_of(error))

    def use(self) -> list[dict[str, Any]]:
        """Who uses the GPUs (GpuUse)."""
        gpus = []
        for index, handle in self.each():
            gpu: dict[str, Any] = {"index": index, "uuid": "", "processes": [], "used_bytes": None}
            if handle is not None:
                memory = self.call(self.p.nvmlDeviceGetMemoryInfo, handle)
                gpu["uuid"] = self.text(self.p.nvmlDeviceGetUUID, handle)
                gpu["used_bytes"] = memory.used if memory else None
                slices = list(self._slices(handle))
                gpu["mig"] = self._in_mig_mode(handle)
                gpu["mig_uuids"] = [uuid for one in slices if (uuid := self.text(self.p.nvmlDeviceGetUUID, one))]
                gpu["processes"] = self._processes(handle, slices)
            gpu["error"] = self.errors[0] if self.errors else ""
            gpus.append(gpu)
        return gpus

    def _processes(self, handle: Any, slices: list[Any]) -> list[dict[str, Any]]:
        """Of the GPU and of each of its MIG devices: the GPU's own list is whole for privileged users only."""
        found: dict[tuple[int, str], dict[str, Any]] = {}
        for one in [handle, *slices]:
            for kind in ("Compute", "Graphics"):
                for process in self._listed(one, kind, may_refuse=bool(slices) and one is handle):
                    used = process.usedGpuMemory
                    key = (process.pid, kind.lower())
                    if key not in found:
                        found[key] = {"pid": process.pid, "kind": kind.lower(), "used_bytes": used, "jobs": _jobs(process.pid)}
        return [found[key] for key in sorted(found)]

    def _listed(self, handle: Any, kind: str, may_refuse: bool) -> list[Any]:
        """Drivers before 510 have only the older call of the two. A driver that has none cannot vouch for a GPU."""
        failure = "NVML_ERROR_FUNCTION_NOT_FOUND"
        for version in ("v3", "v2"):
            function = getattr(self.p, f"nvmlDeviceGet{kind}RunningProcesses_{version}")
            for _ in range(GROWTH_RETRIES):
                try:
                    return function(handle)
                except self.p.NVMLError as error:
                    failure = self.name_of(error)
                    if error.value != self.p.NVML_ERROR_INSUFFICIENT_SIZE:
                        break
            if failure != "NVML_ERROR_FUNCTION_NOT_FOUND":
                break
        refused = may_refuse and failure in ("NVML_ERROR_NO_PERMISSION", "NVML_ERROR_NOT_SUPPORTED")
        no_graphics = kind == "Graphics" and failure == "NVML_ERROR_NOT_SUPPORTED"
        if not refused and not no_graphics:
            self.errors.append(failure)
        return []


def _jobs(pid: int) -> list[str]:
    """Slurm's jobs that the process belongs to, by its cgroup: here, because reading /proc can hang as well."""
    try:
        return sorted({job.decode() for job, _ in jobs_of(str(pid), "/proc")[0]})
    except OSError:  # it has just ended
        return []


def pci_address(domain: int, bus: int, device: int) -> str:
    """As sysfs writes it: 0000:1b:00.0."""
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def numa_node(pci: str, sysfs: Path = Path("/sys")) -> int | None:
    """The NUMA node next to a PCI device; None where the machine has no such notion (-1), or does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / pci / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


if __name__ == "__main__":
    sys.exit(main())
