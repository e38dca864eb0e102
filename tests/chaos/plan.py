"""What will be done, as a pure function of the seed: the same seed is the same sequence. Times are as they come."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

GPUS = 8
TARGETS = (
    "root", "detector", "resolver", "vllm", "door", "tunnel", "notifier", "holder", "server",
    "guard", "holder-caddy", "holder-cloudflared",
)  # fmt: skip
DRIVER_MOST_S = 15.0  # longer than it takes to notice that it hangs
STARVED_MOST_S = 9.0  # longer than any bound: nothing may be waiting for the end of it
PHASES = ("waiting", "loading", "serving", "yielding", "resuming")
PROFILES = ("fake", "slow", "stubborn", "hang", "refork", "exits", "silent")
CALM_EVERY = 25  # actions, then everything is healed, has to serve again, and is held to the strict bounds

KINDS = {  # kind: weight
    "job": 30, "job_over": 26, "kill": 22, "stop": 12, "order": 14, "disk": 3, "runtime": 1, "garbage": 4, "starve": 4,
    "clock": 3, "kill_all": 1, "spoil": 4,
}  # fmt: skip
DRIVER_WEIGHT = 14  # where there is one
DRIVER_HANGS = ("nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses_v3")
DRIVER_LEAVES = ("stranger", "lost", "mismatch", *DRIVER_HANGS)  # what makes us leave the GPU that it befalls
DRIVER_STAYS = ("forgotten", "forgotten-stranger", "ghost", "slices", "memory")


@dataclass(frozen=True)
class Action:
    """`after_s` after the one before it. words: what it takes, by kind."""

    number: int
    after_s: float
    kind: str
    words: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([f"{self.number:4} {self.kind}", *(f"{name}={value}" for name, value in self.words.items())])


def actions(seed: int, pace: float = 1.0, driver: bool = False) -> Iterator[Action]:
    """Without end. pace: how many times as long to wait between them; driver: whether there is one, with faults of its own."""
    dice = random.Random(seed)
    kinds = KINDS | ({"driver": DRIVER_WEIGHT} if driver else {})
    number = 0
    while True:
        number += 1
        calm = {0: "calm", 1: "strict"}.get(number % CALM_EVERY) if number > 1 else None
        kind = calm or dice.choices(list(kinds), list(kinds.values()))[0]
        yield Action(number, min(dice.expovariate(1.0), 4.0) * pace, kind, _words(kind, dice))


def _words(kind: str, dice: random.Random) -> dict:
    match kind:
        case "job":
            first = dice.randrange(GPUS)
            texts = {f"0-{GPUS - 1}": 4, f"{first}-{dice.randrange(first, GPUS)}": 4, f"{first}": 8, "": 2, "what": 1}
            return {"gpus": dice.choices(list(texts), list(texts.values()))[0]}
        case "job_over":
            return {"which": round(dice.random(), 3), "all": dice.random() < 0.7}
        case "kill":
            return {"targets": _targets(dice), "phase": dice.choice((None, *PHASES))}
        case "stop":
            cont_s = dice.choice([None, None, round(dice.uniform(0.2, 6), 1)])
            return {"targets": _targets(dice), "phase": dice.choice((None, *PHASES)), "cont_s": cont_s}
        case "order":
            order = dice.choice(["yield", "yield --for 2", "resume", "resume", "reset", "reload", "switch", "switch", "switch"])
            return {"order": f"switch {dice.choice(PROFILES)}" if order == "switch" else order}
        case "disk":
            return {"how": dice.choice(["full", "read-only", "full runtime"]), "for_s": round(dice.uniform(1, 6), 1)}
        case "garbage":
            return {"bytes": dice.randrange(1, 3000), "dice": dice.randrange(1 << 30)}
        case "starve":
            return {"target": dice.choice(TARGETS[1:8]), "of": dice.choice(["files", "memory"]), "for_s": round(dice.uniform(1, STARVED_MOST_S), 1)}
        case "strict":
            return {"target": dice.choice(TARGETS[1:7]), "root": dice.random() < 0.5}
        case "driver":
            where = {"gpu": dice.randrange(GPUS), "ours": dice.random() < 0.7}  # ours: on one that the tree has, if it has any
            return {"how": dice.choice((*DRIVER_LEAVES, *DRIVER_STAYS, "stranger", "stranger")), **where, "for_s": round(min(1 + dice.expovariate(0.2), DRIVER_MOST_S), 1)}
        case "spoil":
            how = dice.choice(["profile", "profile", "no profile", "settings"])
            return {"how": how, "reload": dice.random() < 0.5, "for_s": round(dice.uniform(1, 6), 1)}
        case "clock":
            return {"by_s": dice.choice([-3600, 3600, 0])}
    return {}


def _targets(dice: random.Random) -> str:
    return " ".join(dice.sample(TARGETS, dice.choice((1, 1, 1, 2, 2, 3))))
