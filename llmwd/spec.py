"""Child specs: what the root starts, as data."""

from collections.abc import Callable

import msgspec

from llmwd.vocab import Worker


class ChildSpec(msgspec.Struct, frozen=True):
    """One worker. All are permanent: they are restarted however they end, alone (one_for_one).

    module: dotted name of the module whose `main(shell)` is the worker; imported by the root, so that a restart
    is a fork. stop_within_s: how long an ordered stop may take before the worker is killed.
    """

    name: Worker
    module: str
    stop_within_s: float


# In start order. Stopped in reverse: the public side, the model, the eyes; who tells people goes last.
CHILDREN: tuple[ChildSpec, ...] = (
    ChildSpec(Worker.notifier, "llmwd.workers.notifier", 5.0),
    ChildSpec(Worker.detector, "llmwd.workers.detector", 2.0),
    ChildSpec(Worker.resolver, "llmwd.workers.resolver", 2.0),
    ChildSpec(Worker.vllm, "llmwd.workers.vllm", 8.0),
    ChildSpec(Worker.door, "llmwd.workers.door", 4.0),
    ChildSpec(Worker.tunnel, "llmwd.workers.tunnel", 8.0),
)


class SpecError(ValueError):
    """A child spec is wrong; the text says which field of which child."""


def check(children: tuple[ChildSpec, ...], find: Callable[[str], object | None]) -> None:
    """Validate every spec before anything starts. `find` tells whether a module exists. Raises SpecError."""
    names = [spec.name for spec in children]
    for spec in children:
        if names.count(spec.name) > 1:
            raise SpecError(f"two children are named {spec.name}")
        if find(spec.module) is None:
            raise SpecError(f"child {spec.name}: there is no module {spec.module}")
        if not spec.stop_within_s > 0:
            raise SpecError(f"child {spec.name}: stop_within_s must be more than 0, not {spec.stop_within_s}")
