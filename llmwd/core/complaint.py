"""A trouble that may come and go many times a second is told when it is new, and then once in a while. Pure."""

AGAIN_S = 300.0


class Complaint:
    """Asked each time with what is wrong now."""

    def __init__(self) -> None:
        self._told = ""
        self._told_s = float("-inf")

    def is_due(self, wrong: str, now_s: float) -> bool:
        """Whether to tell it: not "", and not told already within AGAIN_S. A full disk lets one write pass and not the next."""
        if not wrong or (wrong == self._told and now_s - self._told_s < AGAIN_S):
            return False
        self._told, self._told_s = wrong, now_s
        return True
