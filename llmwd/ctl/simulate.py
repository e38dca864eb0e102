"""`simulate`: jobs that are only files, to see on any machine what llmwd does about a job."""

import os
from pathlib import Path

import click
import msgspec

from llmwd.adapters.rundir import Dirs
from llmwd.config.settings import Settings
from llmwd.core.wording import name_gpus, spell_duration, spell_gpus
from llmwd.ctl.arguments import DURATION, GPUS, JOB, as_json
from llmwd.ctl.place import Look, find_place, look, not_running, served_home
from llmwd.ctl.program import Refusal, examples
from llmwd.vocab import Source

FIRST_ID = 900001  # far above what a cluster's own counter shows, so nobody takes it for a real job
LAST_ID = 999999


class Made(msgspec.Struct, frozen=True):
    id: str
    gpus: tuple[int, ...]
    for_s: float | None
    file: str


@click.group(epilog=examples("llmwd-ctl simulate job --gpus 0-1 --for 30s", "llmwd-ctl simulate end 900001"))
def simulate() -> None:
    """Let a Slurm job come and go, without Slurm."""


@simulate.command(epilog=examples("llmwd-ctl simulate job --gpus 0-1 --for 30s", "llmwd-ctl simulate job --gpus none"))
@click.option("--gpus", type=GPUS, required=True, help="The job's GPUs: 0-1, 0,2,5-7, or none.")
@click.option("--for", "for_s", type=DURATION, help="It ends by itself after this time: 30s, 5m.")
@as_json()
def job(gpus: tuple[int, ...], for_s: float | None, as_json: bool) -> None:
    """A job arrives on these GPUs. Prints its id."""
    dirs = find_place()
    seen = _running(dirs)
    known = {gpu.index for gpu in seen.status.gpus}
    if known and not known.issuperset(gpus):
        raise Refusal(f"this node has GPUs {spell_gpus(tuple(known))}, not {spell_gpus(gpus)}")
    off = [source for source in seen.status.sources if source.name == Source.sim and not source.works]
    if off:
        click.echo(f"warning: nobody looks at simulated jobs here: {off[0].why}", err=True)
    folder = sim_folder(dirs, written_settings(dirs, seen))
    text = (spell_gpus(gpus) if gpus else "") + "\n" + (f"for={for_s:.3f}\n" if for_s else "")
    path = write_job(folder, text, {each.id for each in seen.status.jobs})
    made = Made(path.name.removeprefix("job_"), gpus, for_s, str(path))
    if as_json:
        click.echo(msgspec.json.encode(made).decode())
        return
    where = f"on {name_gpus(gpus)}" if gpus else "without GPUs"
    until = f"for {spell_duration(for_s)}" if for_s else f"until `llmwd-ctl simulate end {made.id}`"
    click.echo(made.id)  # alone on standard output: JOB=$(llmwd-ctl simulate job …)
    click.echo(f"simulated job {made.id} {where}, {until}", err=True)


def _running(dirs: Dirs) -> Look:
    seen = look(dirs)
    if seen.running is None:
        raise not_running()
    return seen


def written_settings(dirs: Dirs, seen: Look) -> Settings:
    """The settings as they are in the files now. Refusal where they are not valid."""
    from llmwd.config import load

    loaded = load(served_home(dirs, seen))
    if loaded.settings is None:
        raise Refusal("\n".join(["the settings are not valid:", *map(str, loaded.problems)]))
    return loaded.settings


def sim_folder(dirs: Dirs, settings: Settings) -> Path:
    """SIM_DIR, or `sim` in the runtime folder."""
    return Path(settings.sim_dir) if settings.sim_dir else dirs.sim


def write_job(folder: Path, text: str, taken: set[str]) -> Path:
    """Make `job_<id>` with the lowest free id, whole from its first moment. Refusal where that cannot be.

    The hidden file that is renamed into place is also the right to its id: made exclusively, so two at
    once never take the same one.
    """
    try:
        return _write_job(folder, text, taken)
    except OSError as error:
        raise Refusal(f"no simulated job can be made in {folder}: {error.strerror}") from error


def _write_job(folder: Path, text: str, taken: set[str]) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(FIRST_ID, LAST_ID + 1):
        path, hidden = folder / f"job_{number}", folder / f".job_{number}"
        if str(number) in taken or path.exists():
            continue
        try:
            fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        placed = False
        try:
            with os.fdopen(fd, "w") as file:
                file.write(text)
            if not path.exists():  # else somebody made it between the look and the right to it
                hidden.rename(path)
                placed = True
                return path
        finally:
            if not placed:
                hidden.unlink()
    raise Refusal(f"all ids from {FIRST_ID} to {LAST_ID} are taken in {folder}: end some")


@simulate.command(epilog=examples("llmwd-ctl simulate end 900001"))
@click.argument("job", type=JOB)
def end(job: str) -> None:
    """A simulated job ends."""
    dirs = find_place()
    folder = sim_folder(dirs, written_settings(dirs, _running(dirs)))
    try:
        (folder / f"job_{job}").unlink()
    except FileNotFoundError:
        there = sorted(path.name.removeprefix("job_") for path in folder.glob("job_*"))
        raise Refusal(f"there is no simulated job {job}; there are: {', '.join(there) or 'none'}") from None
    except OSError as error:
        raise Refusal(f"the simulated job {job} in {folder} cannot be ended: {error.strerror}") from error
    click.echo(f"simulated job {job} has ended")
