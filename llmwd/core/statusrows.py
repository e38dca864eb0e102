"""The lines of `llmwd-ctl status` for people, from the object for programs (core/shown.py). Pure."""

import textwrap
from datetime import datetime

import msgspec

from llmwd.core.shown import ShownDoor, ShownExpected, ShownJob, ShownNeighbour, ShownNotices, ShownTunnel, Status
from llmwd.core.wording import name_gpus, spell_duration
from llmwd.messages import MemoryPressure, SourceState
from llmwd.vocab import Phase

WHY_COLUMNS = 67  # of 80: the rest is the margin and the label


def age_s(since: str | None, now_at: float) -> float | None:
    """Seconds from an ISO time of the status to the wall time `now_at`."""
    return None if since is None else now_at - datetime.fromisoformat(since).timestamp()


def briefed(status: Status) -> Status:
    """For a screen: each source's reason in one line, cut at a word. Programs and the logs get the whole of it."""
    return msgspec.structs.replace(status, sources=tuple(_briefed(source) for source in status.sources))


def _briefed(source: SourceState) -> SourceState:
    width = WHY_COLUMNS - len(f"{source.name}: ")
    return msgspec.structs.replace(source, why=textwrap.shorten(source.why, width, placeholder=" …"))


def summary_rows(status: Status, now_at: float) -> list[tuple[str, str]]:
    """(label, text) of everything that fits on a line; rows with nothing to say are left out."""
    server, hold, tunnel = status.server, status.hold, status.tunnel
    rows = []
    if hold is not None:
        until = f"until {hold.until}" if hold.until else "until `llmwd-ctl resume`"
        told = hold.detail or (f"asked for by {hold.by}" if hold.by else "")
        rows.append(("held", f"{until}, {told}" if told else until))
    if status.model.profile:
        name = status.model.name if status.model.name != status.model.profile else None
        rows.append(("model", " · ".join(part for part in (status.model.profile, name) if part)))
    if status.lease is not None:
        rows.append(("lease", f"{name_gpus(status.lease.gpus)} · epoch {status.lease.epoch}"))
    if status.release is not None and not status.release.proved and status.release.left:
        rows.append(("release", f"of {name_gpus(status.release.gpus)} is not complete: {status.release.left}"))
    if not status.gpu_map.certain and status.gpus:
        rows.append(("GPU map", status.gpu_map.why))
    if server.pid is not None:
        ready = age_s(server.ready_since, now_at)
        told = f"ready for {spell_duration(ready)}" if ready is not None else str(server.phase)
        url = server.url if server.phase == Phase.ready else None
        rows.append(("server", " · ".join(part for part in (url, f"pid {server.pid}", told) if part)))
    if status.neighbour is not None:
        rows.append(("neighbour", _spell_neighbour(status.neighbour)))
    if status.memory is not None:
        rows.append(("memory", _spell_memory(status.memory)))
    if status.next is not None:
        rows.append(("next", _spell_next(status.next, now_at)))
    if status.jobs:
        rows.append(("jobs", "; ".join(_spell_job(job) for job in status.jobs)))
    elif status.gpus:
        rows.append(("jobs", "none"))
    if status.door.phase != Phase.stopped:
        rows.append(("door", _spell_door(status.door)))
    elif status.workers:
        rows.append(("door", status.door.detail or "off"))
    if tunnel.phase != Phase.stopped:
        place = f"https://{tunnel.hostname}" if tunnel.hostname else None
        rows.append(("tunnel", " · ".join(part for part in (_spell_tunnel(tunnel, now_at), place, tunnel.detail) if part)))
    elif status.workers:
        rows.append(("tunnel", tunnel.detail or "off"))
    if status.notices.phase != Phase.stopped:
        rows.append(("notices", _spell_notices(status.notices, now_at)))
    return rows


def _spell_notices(found: ShownNotices, now_at: float) -> str:
    """`none waits · last sent 3m ago · dead man's notice in 28m`, `ALARM: … · 3 wait`."""
    parts = [f"ALARM: {found.detail}" if found.phase == Phase.failed else "", f"{found.waiting or 'none'} wait{'' if found.waiting > 1 else 's'}"]
    age, fires = age_s(found.last_sent, now_at), age_s(found.deadman, now_at)
    parts.append(f"last sent {spell_duration(age)} ago" if age is not None else "")
    parts.append(f"{found.lost} never told" if found.lost else "")
    parts.append(found.detail if found.phase != Phase.failed else "")
    parts.append(f"in memory only ({found.kept})" if found.kept else "")
    parts.append(f"dead man's notice in {spell_duration(-fires)}" if fires is not None else "")
    parts.append(f"dead man's notice: {found.deadman_detail}" if found.deadman_detail else "")
    return " · ".join(part for part in parts if part)


def _spell_door(door: ShownDoor) -> str:
    """`open · 2 keys · 127.0.0.1:8080`, `says yielded_to_job · …`, `failed · why`."""
    if door.phase != Phase.ready:
        return " · ".join(part for part in (str(door.phase), door.detail) if part)
    keys = f"{door.keys} key{'s' if door.keys != 1 else ''}" if door.keys else "no key: llmwd-ctl key add NAME"
    place = f"127.0.0.1:{door.port}" if door.port else ""
    return " · ".join(part for part in ("open" if door.reachable else f"says {door.code}", keys, place, door.detail) if part)


def _spell_tunnel(tunnel: ShownTunnel, now_at: float) -> str:
    """`ready for 3m (named lab, 4 connections: ams01, fra03)`."""
    age = age_s(tunnel.since, now_at)
    count = f"{tunnel.connections} connection{'s' if tunnel.connections != 1 else ''}" if tunnel.connections else ""
    places = f"{count}: {', '.join(tunnel.locations)}" if tunnel.locations else count
    kind = " ".join(part for part in (tunnel.mode, tunnel.name) if part)
    more = ", ".join(part for part in (kind, places) if part)
    told = f"{tunnel.phase} for {spell_duration(age)}" if age is not None else str(tunnel.phase)
    return f"{told} ({more})" if more else told


def _spell_neighbour(found: ShownNeighbour) -> str:
    level = "as inherited" if found.io_priority is None else f"best-effort {found.io_priority}"
    cpus = f"CPUs {found.cpus}" + (f" ({found.detail})" if found.detail else "")
    return " · ".join((f"nice {found.nice}", f"oom_score_adj {found.oom_score_adj}", f"I/O {level}", cpus))


def _spell_memory(memory: MemoryPressure) -> str:
    if memory.some_percent is None:
        return f"pressure not watched: {memory.why}"
    limit = f"yields at {memory.limit_percent:g} % beside others" if memory.limit_percent else "not watched (MEMORY_PRESSURE=0)"
    return f"pressure {memory.some_percent:g} % · {limit}" + (" · short" if memory.short else "")


def _spell_next(coming: ShownExpected, now_at: float) -> str:
    needs = "the whole node" if coming.gpus is None else f"{coming.gpus} GPU{'' if coming.gpus == 1 else 's'}"
    age = age_s(coming.start, now_at)
    if age is None:
        return f"{coming.who} at a time that was not understood ({needs})"
    when = f"in {spell_duration(-age)}" if age < 0 else "begun"
    return f"{coming.who} at {coming.start}, {when} ({needs})"


def _spell_job(job: ShownJob) -> str:
    if job.gpus is None:
        return f"{job.id} on GPUs nobody could tell"
    return f"{job.id} on {name_gpus(job.gpus)}" if job.gpus else f"{job.id} without GPUs"
