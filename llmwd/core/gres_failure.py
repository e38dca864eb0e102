"""What scontrol and sinfo say when they fail. They exit with 1 for everything: only the text tells."""

import enum
import re


class Failure(enum.StrEnum):
    """Why Slurm gave no answer."""

    invalid_job = enum.auto()  # unknown, purged, or hidden by PrivateData=jobs: not the same as "ended"
    unreachable = enum.auto()
    timed_out = enum.auto()
    no_permission = enum.auto()
    no_config = enum.auto()
    unknown = enum.auto()


# In this order: "Unable to contact slurm controller" also follows more precise lines.
_PATTERNS: tuple[tuple[Failure, re.Pattern[str]], ...] = tuple(
    (failure, re.compile(pattern, re.IGNORECASE))
    for failure, pattern in (
        (Failure.invalid_job, r"invalid (?:job|sluid)|\bjob \S+ not found"),
        (
            Failure.no_config,
            r"cannot stat file|configuration source|no config|slurm\.conf|SLURM_CONF|dns_srv|parse config",
        ),
        (Failure.no_permission, r"permission denied|authentication|munge|not authori[sz]ed|security violation"),
        (Failure.timed_out, r"timed? ?out"),
        (
            Failure.unreachable,
            r"unable to contact|connect failure|connection (?:refused|reset)|no route to host"
            r"|unable to resolve|zero bytes|communications? (?:error|failure|connection)|standby mode|is DOWN\b",
        ),
    )
)

_SENTENCES = {
    Failure.invalid_job: "Slurm does not know this job, or hides it (PrivateData=jobs)",
    Failure.unreachable: "slurmctld cannot be reached",
    Failure.timed_out: "slurmctld did not answer in time",
    Failure.no_permission: "Slurm refuses to tell this user",
    Failure.no_config: "Slurm's commands find no configuration",
    Failure.unknown: "Slurm gave no answer that can be understood",
}


def classify_failure(stderr: str) -> Failure:
    """Why Slurm gave no answer, from the error text of scontrol or sinfo (run with LC_ALL=C)."""
    for failure, pattern in _PATTERNS:
        if pattern.search(stderr):
            return failure
    return Failure.unknown


def sentence(stderr: str) -> str:
    """One sentence for a person: the class of the failure and the start of what Slurm said."""
    stderr = stderr[:4096]
    said = "".join(char if char.isprintable() else "?" for char in " ".join(stderr.split())[:120])
    return _SENTENCES[classify_failure(stderr)] + (f" ({said})" if said else " (the text is empty)")


def form_of(why: str, text: str = "") -> str:
    """What makes a text that was not understood a form of its own: its GRES and the fault, whatever numbers are in it."""
    details = re.findall(r"GRES\S{0,10}=\S{1,200}|\S{0,200}\(IDX\S{0,100}", text)[:8]
    return re.sub(r"[0-9]+(?:[-,/][0-9]+)*", "#", " ".join([why.split(" (")[0], *details]))


def read_config(text: str) -> dict[str, str]:
    """`scontrol show config` as a dict: SlurmdSpoolDir, ClusterName, … Values as printed, `(null)` too.

    Of a key that stands in several sections, the first counts: slurm.conf's comes before cgroup.conf's.
    """
    config: dict[str, str] = {}
    for line in text.splitlines():
        found = re.match(r"([A-Za-z][^\s=]*)\s*=(.*)", line)
        if found:
            config.setdefault(found[1], found[2].strip())
    return config
