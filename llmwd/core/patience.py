"""How long the NVIDIA driver may take for an answer before it counts as hanging, and its GPUs as in use by others."""

import msgspec

FIRST_S = 20.0  # without persistence mode the first call of a process initialises every GPU
LEAST_S = 5.0
TIMES = 2.0  # as long as it took the last time


class Patience(msgspec.Struct, frozen=True):
    """Seconds for each of the two questions: which GPUs there are, and who is on them."""

    inventory_s: float = FIRST_S
    use_s: float = LEAST_S


def answered(patience: Patience, inventory: bool, took_s: float) -> Patience:
    """A slow driver is given time; one that was quick may not be silent for long, for a stranger who comes meanwhile is
    seen only afterwards."""
    within_s = min(FIRST_S, max(LEAST_S, TIMES * took_s))
    return Patience(within_s if inventory else patience.inventory_s, within_s)


def failed() -> Patience:
    """A new process asks from the beginning."""
    return Patience()
