"""The play: acts out a plan on a stage, restarts a dead root as an operator would, and tells the observer all of it."""

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable

from tests.chaos.plan import Action
from tests.chaos.stage import TTL_S, Stage
from tests.observer.sight import Process
from tests.waiting import wait_until

PHASE_WITHIN_S = 5.0
CALM_WITHIN_S = 90.0
STOPPED_ROOT_S = 8.0  # a root that hangs is killed by its operator after so long


class Stuck(Exception):
    """Everything was healed, and it does not serve."""


class Play:
    """say(text) for people; the observer is told by itself."""

    def __init__(self, stage: Stage, seed: int, say: Callable[[str], None]):
        self.stage, self.say = stage, say
        self.dice = random.Random(-seed)  # for what the plan leaves open: which process of a tree, how soon a restart
        self.done: Counter[str] = Counter()
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.restart_s: float | None = None
        self.root_stopped_s: float | None = None
        self.starts = 0

    # --- time

    def go_on(self, for_s: float) -> None:
        """Let so much time pass, and do what is due in it."""
        end_s = time.monotonic() + for_s
        wait_until(lambda: self.tick() or time.monotonic() >= end_s, for_s + 60, every_s=0.05, what="the passing of time")

    def tick(self) -> None:
        now_s = time.monotonic()
        self.stage.let_go_on()
        for when_s, then in [each for each in self.later if each[0] <= now_s]:
            self.later.remove((when_s, then))
            then()
        self._root(now_s)

    def _root(self, now_s: float) -> None:
        if not self.stage.root_dead():
            stopped = any(each.state == "T" for each in self.stage.roles().get("root", ()))
            self.root_stopped_s = (self.root_stopped_s or now_s) if stopped else None
            if self.root_stopped_s is not None and now_s - self.root_stopped_s > STOPPED_ROOT_S:
                self.say("     the root hangs: killed")
                self.tell("fault", name="root killed")
                self.stage.tree.process.kill()
                self.root_stopped_s = None
        elif self.restart_s is None:
            # At once, soon, or once all the rest of it must be gone.
            self.restart_s = now_s + self.dice.choice([0.0, 0.0, 1.0, 8.0])
        elif now_s >= self.restart_s:
            self.restart_s = None
            self.starts += 1
            self.stage.tree.start()

    def tell(self, event: str, **words: object) -> None:
        self.stage.observer.tell(event, **words)

    # --- what is done

    def act(self, action: Action) -> None:
        self.go_on(action.after_s)
        result = getattr(self, f"_{action.kind}")(**action.words)
        self.done[action.kind] += 1
        self.say(f"{action}{f'  -> {result}' if result else ''}")

    def _job(self, gpus: str) -> str:
        return f"job {self.stage.job(gpus)}"

    def _job_over(self, which: float, all: bool) -> str:
        jobs = self.stage.jobs()
        for path in jobs if all else jobs[int(which * len(jobs)) :][:1]:
            path.unlink()
        return f"of {len(jobs)}"

    def _phase(self, phase: str | None) -> None:
        """Bring it about that it is in this phase, if that can be had soon."""
        if phase is None:
            return
        if phase in ("waiting", "yielding"):
            if phase == "yielding":
                self.reach("serving")
            self.stage.job("0-7")
            self.reach(phase, 0.3 if phase == "yielding" else PHASE_WITHIN_S)
            return
        for path in self.stage.jobs():
            path.unlink()
        self.reach({"resuming": "loading"}.get(phase, phase))

    def reach(self, phase: str, within_s: float = PHASE_WITHIN_S) -> None:
        end_s = time.monotonic() + within_s

        def there() -> bool:
            self.tick()
            return self.stage.tree.status()["phase"] == phase or time.monotonic() >= end_s

        wait_until(there, within_s + 60, every_s=0.01)

    def _targets(self, targets: str) -> list[Process]:
        return self.stage.pick(targets, self.dice)

    def _kill(self, targets: str, phase: str | None) -> str:
        self._phase(phase)
        processes = self._targets(targets)
        self.tell("killed", roles=[each.role for each in processes])
        for process in processes:
            self.stage.send(process, 9)
        return self._names(processes)

    @staticmethod
    def _names(processes: list[Process]) -> str:
        return " ".join(f"{each.role}:{each.pid}" for each in processes) or "nobody there"

    def _kill_all(self) -> str:
        return self._kill("root vllm holder", "serving")

    def _stop(self, targets: str, phase: str | None, cont_s: float | None) -> str:
        self._phase(phase)
        processes = self._targets(targets)
        self.tell("fault", name="stopped", roles=[each.role for each in processes])
        self.stage.stop(processes, cont_s)
        return self._names(processes)

    def _order(self, order: str) -> str:
        self.tell("unheld" if order != "yield" else "happened")
        if order == "reload":
            return self._reload()
        try:
            answer = self.stage.tree.ctl(*order.split(), within_s=20)
        except subprocess.TimeoutExpired:
            return "no answer"
        if order == "yield" and answer.returncode == 0 and "not kept" not in answer.stdout:
            self.tell("held")
        return f"{answer.returncode} {(answer.stdout + answer.stderr).strip()[:100]}"

    def _reload(self) -> str:
        for root in self.stage.roles().get("root", ())[:1]:
            self.stage.send(root, signal.SIGHUP)
        return ""

    def _spoil(self, how: str, reload: bool, for_s: float) -> str:
        """The operator saves something that is not valid: it takes nothing down, and delays no job."""
        path = self.stage.spoil(how)
        if path is None:
            return "it is so already"
        if reload:
            self._reload()

        def mended() -> None:
            self.stage.mend(path)
            self._reload()

        self.later.append((time.monotonic() + for_s, mended))
        return path.name

    def _disk(self, how: str, for_s: float) -> str:
        self.tell("fault", name="disk", open=True)
        self.tell("unheld")  # an order may be lost with it
        disk = self.stage.node_disk if how == "full runtime" else self.stage.disk
        spoiled = disk.spoil(how.split()[0])

        def heal() -> None:
            disk.heal()
            self.tell("healed", name="disk")

        self.later.append((time.monotonic() + for_s, heal))
        return "" if spoiled else "not possible here"

    def _runtime(self) -> str:
        self.tell("fault", name="runtime")
        self.stage.lose_runtime()
        return ""

    def _garbage(self, bytes: int, dice: int) -> str:
        self.tell("fault", name="garbage")
        return f"{self.stage.throw(random.Random(dice).randbytes(bytes))} sockets"

    def _starve(self, target: str, of: str, for_s: float) -> str:
        processes = self._targets(target)
        self.tell("fault", name="starved", open=True, roles=[target])
        for process in processes:
            if (before := self.stage.starve(process, of)) is not None:
                self.later.append((time.monotonic() + for_s, lambda: self.stage.feed(process, *before)))
        self.later.append((time.monotonic() + for_s, lambda: self.tell("healed", name="starved")))
        return self._names(processes)

    def _driver(self, how: str, gpu: int, ours: bool, for_s: float) -> str:
        # No fault of ours: the bounds of jobs stay as narrow as they are.
        self.tell("happened")
        lease = self.stage.tree.status()["lease"]
        leased = lease["gpus"] if lease else []
        done, heal = self.stage.faults.spoil(how, leased[gpu % len(leased)] if ours and leased else gpu, leased)

        def healed() -> None:
            self.tell("happened")
            heal()

        if done:
            self.later.append((time.monotonic() + for_s, healed))
        return done or "nobody there"

    def _clock(self, by_s: float) -> str:
        self.tell("happened")
        self.stage.clock.shift(by_s)
        return ""

    def _strict(self, target: str, root: bool) -> str:
        """Nothing else happens: one worker dies, then a job comes, and all bounds are the narrow ones; then the root."""
        self.go_on(2 * TTL_S + 0.5)
        self.reach("serving")
        done = self._kill(target, None)
        self.go_on(2.5)
        self.reach("serving")
        self.go_on(2 * TTL_S + 0.5)
        self.stage.job("0-7")
        self.reach("waiting")
        self.go_on(0.3)  # the observer has to see that it is over before the job is
        self._job_over(0.0, True)
        if root:
            self.reach("serving")
            self.restart_s = time.monotonic() + 9.0  # late enough to see whether anything of it stays
            done += " " + self._kill("root", None)
            self.go_on(9.0)
        return done

    # --- whether it is still there

    def _calm(self) -> str:
        return self.calm("fake")

    def calm(self, profile: str) -> str:
        """Heal everything: then it has to serve this profile within its time, with all of its workers."""
        self.tell("unheld")
        for path in self.stage.jobs():
            path.unlink()
        for _, then in self.later:
            then()
        self.later.clear()
        self.stage.let_go_on(everything=True)
        self.stage.heal_disks()
        began_s = time.monotonic()
        ordered_s = began_s - 5.0

        def serves() -> bool:
            nonlocal ordered_s
            self.tick()
            status = self.stage.tree.status()
            if status["phase"] == "serving" and all(worker["phase"] == "ready" for worker in status["workers"]):
                return status["model"]["profile"] in (profile, "slow") and self.stage.tree.answers(status["model"]["profile"])
            if time.monotonic() - ordered_s > 5.0:
                ordered_s = time.monotonic()
                for order in ("reset", "resume", f"switch {profile}"):
                    self._order(order)
            return False

        if self.stage.tree.status()["model"]["profile"] != profile:
            self._order(f"switch {profile}")
        try:
            wait_until(serves, CALM_WITHIN_S, every_s=0.1)
        except AssertionError:
            raise Stuck(f"it does not serve {CALM_WITHIN_S:g} s after everything was healed: {self.stage.tree.status()}") from None
        return f"serves after {time.monotonic() - began_s:.1f} s"


