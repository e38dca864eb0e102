"""Which Slurm jobs are on this node: what all sources see, merged. Pure.

Any one source is enough for a job to be here; a job is gone when all sources have lost it. A source that cannot look
keeps what it saw last: not seeing is no news. Sets of ids are compared, never counts, so that a job that ends while
another begins is two changes.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from llmwd.messages import JobSeen, JobsFact, SourceState
from llmwd.vocab import Source

Gpus = tuple[int, ...] | None  # told by the source itself; None: has to be asked for

FOLDER_SOURCES = frozenset({Source.cgroup1, Source.cgroup2})
NO_CGROUPS = "Slurm's configuration gives jobs no cgroups here, so it sees none"
LEFTOVER_AFTER_S = 30.0


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """One whole look of one source. jobs None: it could not look, and `why` says why.

    `absent`: there is nothing to look at here, which explains it; otherwise it is a failure.
    back: those of the jobs that had gone since its last look, and came back.
    """

    source: Source
    jobs: Mapping[str, Gpus] | None
    began_s: float
    back: frozenset[str] = frozenset()
    absent: bool = False
    why: str = ""


class SourceView(msgspec.Struct, frozen=True, kw_only=True):
    """What one source said last, and whether it has ever worked."""

    jobs: Mapping[str, Gpus] = {}
    looked: bool = False
    works: bool = False
    worked: bool = False
    absent: bool = False
    why: str = "has not looked yet"
    began_s: float = 0.0


class Track(msgspec.Struct, frozen=True):
    """A job's first sign, since when nothing but its folder shows it (None: something else does), and when each source
    that shows it began to.

    lost: sources that showed it and do no more, while others still do; one of them that shows it again tells of another
    run (a requeue), whatever the slower ones say. late: those that still showed the run before when that was told, and
    have yet to lose it. procfs tells neither: it looks now and then, and what it misses has not gone."""

    seen_s: float
    folder_only_s: float | None
    since_s: Mapping[Source, float] = {}
    lost: frozenset[Source] = frozenset()
    late: frozenset[Source] = frozenset()


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """The state. `named`: the operator named these sources, so every one of them has to work.

    slurm_here: this host has a configuration of Slurm's; sightless: sources that see no job by it, however well they work."""

    named: bool
    views: Mapping[Source, SourceView]
    slurm_here: bool = False
    sightless: frozenset[Source] = frozenset()
    tracks: Mapping[str, Track] = {}


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a look changed: jobs that came, came back and went, and whether the source's working changed."""

    arrived: frozenset[str] = frozenset()
    back: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    working: bool | None = None


def begin(sources: Iterable[Source], named: bool) -> Presence:
    return Presence(named=named, views={source: SourceView() for source in sources})


def choose(state: Presence, sources: Iterable[Source], named: bool) -> Presence:
    """Other sources from now on; what the remaining ones saw is kept until they look again."""
    views = {source: state.views.get(source, SourceView()) for source in sources}
    ids = {job for view in views.values() for job in view.jobs}
    tracks = {job: state.tracks[job] for job in ids}
    return msgspec.structs.replace(state, named=named, views=views, tracks=tracks)


def configured(state: Presence, job_cgroups: bool) -> Presence:
    """Slurm is on this host, and by its configuration jobs have cgroups or not."""
    return msgspec.structs.replace(state, slurm_here=True, sightless=frozenset() if job_cgroups else FOLDER_SOURCES)


def seeing(state: Presence) -> frozenset[Source]:
    """The sources that work and would see a job of Slurm's."""
    working = {source for source, view in state.views.items() if view.works}
    return frozenset(working - {Source.sim} - state.sightless)


def take(state: Presence, look: Look, now_s: float) -> tuple[Presence, Change]:
    """The state after a look, and what it changed. `now_s` is when its news arrived."""
    before = state.views[look.source]
    after = _view(before, look)
    views = {**state.views, look.source: after}
    ids = {job for view in views.values() for job in view.jobs}
    beyond_folders = {job for source, view in views.items() if source not in FOLDER_SOURCES for job in view.jobs}
    tracks = {
        job: _track(state.tracks.get(job), look, job, [s for s, view in views.items() if job in view.jobs], now_s)
        for job in ids
    }
    tracks = {job: _alone(track, job in beyond_folders, now_s) for job, track in tracks.items()}
    change = Change(
        arrived=frozenset(ids - state.tracks.keys()),
        back=frozenset(job for job in ids & state.tracks.keys() if tracks[job].seen_s != state.tracks[job].seen_s),
        gone=frozenset(state.tracks.keys() - ids),
        working=after.works if (before.works, before.why) != (after.works, after.why) else None,
    )
    return msgspec.structs.replace(state, views=views, tracks=tracks), change


def _view(before: SourceView, look: Look) -> SourceView:
    works = look.jobs is not None
    kept = {} if look.absent else before.jobs
    return SourceView(
        jobs=look.jobs if works else kept,
        looked=True,
        works=works,
        worked=works or before.worked,
        absent=look.absent,
        why=look.why,
        began_s=look.began_s,
    )


def _track(before: Track | None, look: Look, job: str, sources: Sequence[Source], now_s: float) -> Track:
    """The job's track after a look, for the sources that show it now."""
    if before is None:
        return Track(now_s, now_s, dict.fromkeys(sources, now_s))
    told = look.source in sources and (job in look.back or look.source in before.lost)
    if told and look.source not in before.late:
        late = frozenset(sources) - {look.source, Source.procfs}
        return Track(now_s, now_s, dict.fromkeys(sources, now_s), late=late)
    since_s = {source: before.since_s.get(source, now_s) for source in sources}
    gone = frozenset(before.since_s) - since_s.keys()
    late = before.late - gone - (frozenset({look.source}) if told else frozenset())
    lost = (before.lost | gone - before.late - {Source.procfs}) - since_s.keys()
    return Track(before.seen_s, before.folder_only_s, since_s, lost, late)


def _alone(track: Track, beyond_folder: bool, now_s: float) -> Track:
    """With the time since when nothing but its folder shows it."""
    if beyond_folder:
        return msgspec.structs.replace(track, folder_only_s=None)
    return track if track.folder_only_s is not None else msgspec.structs.replace(track, folder_only_s=now_s)


def all_looked(state: Presence) -> bool:
    return all(view.looked for view in state.views.values())


def scanned(state: Presence) -> bool:
    """Whether the picture is whole: only then can it say that no job is here. Each source may have its excuse, but where
    Slurm is, one has to be without: else a job would come, and GresUsed alone would tell of it, seconds too late."""
    whole = all(view.looked and (view.works or _excused(state, view)) for view in state.views.values())
    return whole and (not state.slurm_here or bool(seeing(state)))


def _excused(state: Presence, view: SourceView) -> bool:
    """A source that nobody named may be missing here; one that worked and broke may not."""
    return not state.named and (view.absent or not view.worked)


def seen_only_by(state: Presence, source: Source) -> frozenset[str]:
    """Jobs that no other source sees."""
    view = state.views.get(source)
    others = {job for name, other in state.views.items() if name is not source for job in other.jobs}
    return frozenset(view.jobs) - others if view is not None else frozenset()


def jobs_fact(state: Presence, now_s: float) -> JobsFact:
    return JobsFact(
        jobs=tuple(_seen(state, job) for job in sorted(state.tracks)),
        sources=tuple(_source(state, source) for source in state.views),
        scanned=scanned(state),
        at_s=now_s,
    )


def _source(state: Presence, source: Source) -> SourceState:
    view = state.views[source]
    if view.works and source in state.sightless:
        return SourceState(name=source, works=False, why=NO_CGROUPS)
    return SourceState(name=source, works=view.works, why=view.why)


def _seen(state: Presence, job: str) -> JobSeen:
    track = state.tracks[job]
    sources = tuple(source for source, view in state.views.items() if job in view.jobs)
    # A simulated job never hides a real one that has the same id: two sources, so Slurm is asked.
    gpus = state.views[sources[0]].jobs[job] if len(sources) == 1 else None
    lags_s = tuple(track.since_s.get(source, track.seen_s) - track.seen_s for source in sources)
    return JobSeen(id=job, sources=sources, seen_s=track.seen_s, lags_s=lags_s, gpus=gpus, empty=_empty(state, track))


def _empty(state: Presence, track: Track) -> bool:
    """Certain only when all processes were looked at after the folder had been alone for LEFTOVER_AFTER_S."""
    procfs = state.views.get(Source.procfs)
    if procfs is None or not procfs.works or track.folder_only_s is None:
        return False
    return procfs.began_s >= track.folder_only_s + LEFTOVER_AFTER_S
