"""Numbers and GPUs in words for people. Pure."""


def spell_duration(seconds: float) -> str:
    """The two biggest units: 4 s, 3m 12s, 2h 5m, 3d 4h."""
    left = max(0, int(seconds))
    if left < 60:
        return f"{left} s"
    parts: list[tuple[int, str]] = []
    for name, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append((count, name))
    return " ".join(f"{count}{name}" for count, name in parts[:2] if count)


def spell_gpus(gpus: tuple[int, ...] | None) -> str:
    """GPU indices as Slurm writes them: (0, 1, 2, 5) is 0-2,5."""
    if gpus is None:
        return "unknown"
    runs: list[list[int]] = []
    for index in sorted(gpus):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"


def name_gpus(gpus: tuple[int, ...]) -> str:
    """`no GPU`, `GPU 3` or `GPUs 0-2,5`."""
    return f"GPU{'s' if len(gpus) > 1 else ''} {spell_gpus(gpus)}" if gpus else "no GPU"
