"""When a holder counts as hanging: it answers, or its tree is ended without it. Times are monotonic seconds."""

import math

import msgspec

OBEYS_WITHIN_S = 1.0  # a release is acknowledged at once, and over soon after its grace


class Hearing(msgspec.Struct, frozen=True):
    """What was said to the holder of one tree, and what came back."""

    asked_s: float | None = None  # when the first renewal was sent that has not been answered
    ordered_s: float | None = None  # when the release was
    gone_by_s: float = math.inf
    acknowledged: bool = False  # the release
    killed: bool = False  # it has sent SIGKILL
    heard_s: float = 0.0

    def renewed(self, now_s: float) -> "Hearing":
        return self if self.asked_s is not None else msgspec.structs.replace(self, asked_s=now_s)

    def released(self, now_s: float, grace_s: float) -> "Hearing":
        """Again: only the grace may have become shorter."""
        ordered_s = now_s if self.ordered_s is None else self.ordered_s
        gone_by_s = min(self.gone_by_s, now_s + grace_s + OBEYS_WITHIN_S)
        return msgspec.structs.replace(self, ordered_s=ordered_s, gone_by_s=gone_by_s)

    def heard(self, now_s: float, releasing: bool, killed: bool) -> "Hearing":
        return msgspec.structs.replace(self, asked_s=None, acknowledged=releasing, killed=killed, heard_s=now_s)

    def deaf_at_s(self, hung_after_s: float) -> float:
        """From when on it hangs if nothing more is heard. Never "once heard, always trusted": it may hang at any moment."""
        if self.ordered_s is None:
            return math.inf if self.asked_s is None else self.asked_s + hung_after_s
        if not self.acknowledged:
            return self.ordered_s + OBEYS_WITHIN_S
        if not self.killed:
            return self.gone_by_s
        return max(self.gone_by_s, self.heard_s + OBEYS_WITHIN_S)  # it waits for the kernel, and says so again and again
