"""`scontrol show job [JOB] -d` as text, in lines or with -o, of any version.

A record starts with JobId= at the start of a line. Of its fields only whole words are taken: a word
at the very end of the text may be cut (`NodeList=gpu0`), so it is as if it were not there.
"""

import re
from datetime import UTC, datetime

import msgspec

from llmwd.core import gres_failure
from llmwd.core.gres_claim import Claim, JobFacts, Line, is_sluid, judge
from llmwd.core.gres_detail import Detail, read_detail, read_totals, tres_has_gpu

# A record with a line for each of thousands of nodes; what is longer is no record, and would keep us busy for seconds.
RECORD_CHARS = 1 << 19

_RECORD = re.compile(r"^JobId=(\S+)", re.MULTILINE)
# A blank before the name keeps ReqNodeList, NumNodes and ReqTRES out.
_FIELD = re.compile(
    r"(?<=\s)(JobState|NodeList|NumNodes|JOB_GRES|AllocTRES|TRES|SLUID"
    r"|ArrayJobId|ArrayTaskId|HetJobId|HetJobOffset)=(\S*)"
)
_LINE = re.compile(
    r"(?<=\s)Nodes=(?P<nodes>\S+)[ \t]+CPU_IDs=\S*"
    r"(?:[ \t]+(?!Nodes=|GRES)[A-Za-z_/]+=\S*)*?[ \t]+GRES(?P<legacy>_IDX)?=(?P<detail>\S*)"
)
# On a line of its own, so that no job's name can imitate it (with -o it is not told).
_USER = re.compile(r"^[ \t]+UserId=([^\s()=]{1,64})\(\d+\)", re.MULTILINE)
_ENDS = re.compile(r"^[ \t]+StartTime=\S+ EndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d) Deadline=", re.MULTILINE)
# The word that follows on the same line.
_NEXT = re.compile(r"[ \t]+(\S+)")


class _Record:
    """One record of the text and its fields."""

    def __init__(self, text: str, job_id: str, start: int, end: int) -> None:
        self.job_id = job_id
        self._body = text[start:end]
        self._last = end == len(text)
        self.fields: dict[str, str] = {}
        self.why = ""
        for found in _FIELD.finditer(self._body):
            if not self._is_whole(found):
                continue
            if self.fields.setdefault(found[1], found[2]) != found[2]:
                # A job's name or comment may imitate a field; which one is Slurm's cannot be told.
                self.why = f"the record tells {found[1]} twice, and differently"

    def _is_whole(self, found: re.Match[str]) -> bool:
        return not self._last or found.end() < len(self._body)

    def _detail(self, found: re.Match[str]) -> Detail:
        """The line's list; what follows on the line must be another field, or the list has gone on after a blank."""
        after = _NEXT.match(self._body, found.end())
        if after is not None and "=" not in after[1]:
            return Detail(None, f"the GRES list is followed by {after[1][:40]!r}", readable=False)
        return read_detail(found["detail"])

    def ids(self) -> set[str]:
        """The names under which this job can be asked for."""
        fields = self.fields
        ids = {self.job_id, fields.get("SLUID", "")}
        if "ArrayTaskId" in fields:
            ids.add(f"{fields.get('ArrayJobId')}_{fields['ArrayTaskId']}")
        if "HetJobOffset" in fields:
            ids.add(f"{fields.get('HetJobId')}+{fields['HetJobOffset']}")
        return ids - {""}

    def claim(self, node: str) -> Claim:
        fields = self.fields
        count = fields.get("NumNodes", "")
        totals = fields.get("JOB_GRES")
        lines = tuple(
            Line(found["nodes"], self._detail(found), self._is_whole(found), found["legacy"] is not None)
            for found in _LINE.finditer(self._body)
        )
        facts = JobFacts(
            states=tuple(word for word in re.split(r"[,+]", fields.get("JobState", "").upper()) if word),
            nodes=fields.get("NodeList"),
            node_count=int(count) if re.match(r"[0-9]{1,9}\Z", count) else None,
            lines=lines,
            totals=None if totals is None else read_totals(totals),
            alloc_has_gpu=tres_has_gpu(fields[name] for name in ("AllocTRES", "TRES") if name in fields),
            why=self.why,
            user=user[1] if (user := _USER.search(self._body)) else "",
            ends_at=_time(ends[1]) if (ends := _ENDS.search(self._body)) else None,
        )
        return judge(facts, node)


def _time(text: str) -> float | None:
    """Slurm's time; its commands are told to speak UTC (adapters/slurm.py)."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None


def _bounds(text: str, starts: list[re.Match[str]], job: str | None = None) -> list[tuple[re.Match[str], int]]:
    """(its beginning, its end) of every record of the text whose number is whole, or of those of one JobId."""
    ends = [found.start() for found in starts[1:]] + [len(text)]
    return [
        (found, end)
        for found, end in zip(starts, ends, strict=False)
        if found.end() < len(text) and job in (None, found[1])
    ]


def _agreed(claims: list[Claim]) -> Claim:
    """The claim of records with one JobId (they may be repeated), if they agree."""
    if all(msgspec.structs.replace(claim, user=claims[0].user, ends_at=claims[0].ends_at) == claims[0] for claim in claims):
        return claims[0]
    return Claim(None, "several records have this JobId and differ", any(claim.completing for claim in claims))


def read_job(text: str, node: str, job: str | None) -> Claim:
    """What one job of the text holds on this node.

    job: a JobId, `5_1` (array task), `5+1` (het component) or a SLUID; None if the text has one record.
    The record must be the one asked for: a query for an array or a het leader returns all of them.
    """
    starts = list(_RECORD.finditer(text))
    known_id = job is not None and job.isdecimal() and any(found[1] == job for found in starts)
    # An array's answer has the records of all its tasks: only those asked for are read.
    bounds = _bounds(text, starts, job if known_id else None)
    if sum(end - found.start() for found, end in bounds) > RECORD_CHARS:
        return Claim(None, f"what the text says of job {job or '(not named)'} is too long to be a record")
    records = [_Record(text, found[1], found.start(), end) for found, end in bounds]
    if (job is None or is_sluid(job)) and len(records) == 1:
        return records[0].claim(node)
    mine = records if known_id else [] if job is None else [record for record in records if job in record.ids()]
    if mine:
        return _agreed([record.claim(node) for record in mine])
    if not records:
        return Claim(None, f"the text holds no job: {gres_failure.sentence(text)}")
    if job is None:
        return Claim(None, f"the text holds {len(records)} jobs, and none was named")
    return Claim(None, f"the text holds {len(records)} jobs, but not {job}")


def read_jobs(text: str, node: str) -> dict[str, Claim]:
    """What every job of the text holds on this node, by JobId.

    A job that is not in it is not known to have nothing: the text may be cut, or the job hidden.
    """
    claims: dict[str, list[Claim]] = {}
    for found, end in _bounds(text, list(_RECORD.finditer(text))):
        record = _Record(text, found[1], found.start(), end)
        claims.setdefault(record.job_id, []).append(record.claim(node))
    return {job_id: _agreed(found) for job_id, found in claims.items()}
