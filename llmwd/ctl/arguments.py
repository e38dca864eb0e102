"""The kinds of arguments: durations, GPU lists, profiles, job ids; how they are read and completed."""

import re

import click
from click.shell_completion import CompletionItem

from llmwd.core.wording import spell_duration
from llmwd.ctl.place import find_place, look, profiles_in, served_home

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", re.ASCII)
_UNIT_S = (86400, 3600, 60, 1)
_GPUS = re.compile(r"\d{1,3}(?:-\d{1,3})?(?:,\d{1,3}(?:-\d{1,3})?)*", re.ASCII)
LONGEST_S = 10 * 365 * 86400.0


class Duration(click.ParamType):
    """2h, 30m, 90s, 1h30m, or seconds: gives seconds."""

    name = "duration"

    def convert(self, value, param, ctx) -> float:
        if isinstance(value, int | float):
            return float(value)
        found = _DURATION.fullmatch(value.strip().lower())
        parts = found.groups() if found else ()
        if not any(parts):
            self.fail(f"{value!r} is not a duration: write 2h, 30m, 90s, 1h30m or seconds", param, ctx)
        seconds = sum(float(part) * unit for part, unit in zip(parts, _UNIT_S) if part)
        if not 0 < seconds <= LONGEST_S:
            self.fail(f"{value!r} must be more than nothing and at most {spell_duration(LONGEST_S)}", param, ctx)
        return seconds


class Gpus(click.ParamType):
    """0-1,4, as Slurm writes it; none or nothing for a job without GPUs: gives a sorted tuple of indices."""

    name = "gpus"

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        text = value.replace(" ", "")
        if text in ("", "none"):
            return ()
        if not _GPUS.fullmatch(text):
            self.fail(f"{value!r} is not a list of GPUs: write 0-1 or 0,2,5-7, or none", param, ctx)
        indices: set[int] = set()
        for part in text.split(","):
            first, _, last = part.partition("-")
            if int(last or first) < int(first):
                self.fail(f"{part!r} counts backwards", param, ctx)
            indices.update(range(int(first), int(last or first) + 1))
        return tuple(sorted(indices))

    def shell_complete(self, ctx, param, incomplete):
        return [CompletionItem(str(gpu.index)) for gpu in look(find_place()).status.gpus]


class ProfileName(click.ParamType):
    """The name of a file in models/, without .env. Whether it exists is for the verb to say."""

    name = "profile"

    def shell_complete(self, ctx, param, incomplete):
        dirs = find_place()
        names = profiles_in(served_home(dirs, look(dirs)))
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class JobId(click.ParamType):
    """A job's id; `job_900001` is understood as well."""

    name = "job"

    def convert(self, value, param, ctx) -> str:
        job = value.removeprefix("job_")
        if not re.fullmatch(r"[0-9]{1,18}", job, re.ASCII):
            self.fail(f"{value!r} is not the id of a job (a number)", param, ctx)
        return job

    def shell_complete(self, ctx, param, incomplete):
        jobs = look(find_place()).status.jobs
        return [CompletionItem(job.id) for job in jobs if job.id.startswith(incomplete)]


DURATION, GPUS, PROFILE, JOB = Duration(), Gpus(), ProfileName(), JobId()


def as_json(what: str = "Print one JSON object instead."):
    """The option --json, alike everywhere."""
    return click.option("--json", "as_json", is_flag=True, help=what)
