"""The standing order to stay away from the GPUs: the operator's (`yield`), or our own (`park`). Kept on disk."""

import time
from collections.abc import Callable

import msgspec

from llmwd.adapters.rundir import write_atomic
from llmwd.messages import Done, Hold, Reply, ResumeOrder, YieldOrder
from llmwd.vocab import Reason
from llmwd.workers.base import Shell


class Orders(msgspec.Struct):
    """What `<state>/orders.json` holds."""

    hold: Hold | None = None


class Standing:
    """`hold` is what is in force; changed() is called at once when it changes, before any disk."""

    def __init__(self, shell: Shell, changed: Callable[[], None]):
        self._shell = shell
        self._changed = changed
        self._path = shell.boot.state / "orders.json"
        self.hold = self._read()
        if self.hold is not None and self.hold.until_at is not None:
            self._end_in(self.hold.until_at - time.time())

    def _read(self) -> Hold | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Orders).hold
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            # An order to stay away may be lost in there: staying away is the side that hurts nobody.
            self._shell.log.error("%s cannot be read (%s): staying away until `llmwd-ctl resume`", self._path, error)
            return Hold(since_at=time.time(), by="an unreadable orders file")

    def on_yield(self, order: YieldOrder, reply: Callable[[Reply], None]) -> None:
        if self.hold is not None and self.hold.reason is not Reason.held:
            # What we stay away for is not over with an order that ends by itself.
            reply(Done(detail=f"held already, until `llmwd-ctl resume`: {self.hold.detail}"))
            return
        until_at = None if order.for_s is None else time.time() + order.for_s
        kept = self._begin(Hold(since_at=time.time(), until_at=until_at, by=order.by), order.for_s)
        reply(Done(detail="all GPUs are being given back" + kept))

    def on_resume(self, order: ResumeOrder, reply: Callable[[Reply], None]) -> None:
        was = self.hold
        self._end(order.by)
        reply(Done(detail="resumed" if was else "nothing was held"))

    def park(self, reason: Reason, detail: str) -> None:
        """Our own order, until the operator resumes: an operator's that would end by itself gives way to it."""
        self._shell.log.error("staying away until `llmwd-ctl resume`: %s", detail)
        self._begin(Hold(since_at=time.time(), by="llmwd", reason=reason, detail=detail), None)

    def _begin(self, hold: Hold, for_s: float | None) -> str:
        self.hold = hold
        self._shell.cancel("hold")
        if for_s is not None:
            self._end_in(for_s)
        self._changed()  # first the GPUs, then the disk
        kept = self._keep()
        self._shell.journal.write("held", by=hold.by, until_at=hold.until_at, reason=hold.reason, detail=hold.detail)
        return kept

    def _end_in(self, for_s: float) -> None:
        self._shell.at("hold", time.monotonic() + for_s, lambda: self._end("its time is over"))

    def _end(self, by: str) -> None:
        self.hold = None
        self._shell.cancel("hold")
        self._keep()
        self._shell.journal.write("resumed", by=by)
        self._changed()

    def _keep(self) -> str:
        try:
            write_atomic(self._path, msgspec.json.encode(Orders(self.hold)), durable=True)
        except OSError as error:
            self._shell.log.error("%s cannot be written: %s", self._path, error.strerror)
            return f"; but the order is not kept over a restart: {self._path} cannot be written ({error.strerror})"
        return ""
