"""How much the whole node waits for memory, as the kernel tells it (pressure stall information)."""

from pathlib import Path

MEMORY = Path("/proc/pressure/memory")


def memory_pressure(path: Path = MEMORY) -> tuple[str, str]:
    """(text, ""), or ("", why it cannot be read). The kernel averages anew every 2 s, so more often is of no use."""
    try:
        return path.read_text(), ""
    except FileNotFoundError:
        return "", f"{path} is not there: the kernel was built or started without pressure stall information"
    except OSError as error:
        return "", f"{path} cannot be read: {error.strerror}"
