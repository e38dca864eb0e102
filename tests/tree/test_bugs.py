"""The look for faults of our own code in a log."""

from tests.tree import bugs

LOG = """\
2026-11-27 09:32:24.674 vllm     CRITICAL vllm crashed:
Traceback (most recent call last):
  File "llmwd/workers/vllm.py", line 110, in begin
    self._ask()
           ^^^^
AttributeError: 'NoneType' object has no attribute 'vllm_args'

Exception in thread beside:
Traceback (most recent call last):
  File "llmwd/workers/ahead.py", line 80, in heard
    self._say(text)
TypeError: say() takes 2 arguments
2026-11-27 09:32:25.674 door     CRITICAL door crashed:
Traceback (most recent call last):
  File "llmwd/workers/door.py", line 3, in begin
OSError: [Errno 24] Too many open files
2026-11-27 09:32:26.674 root     ERROR    TypeError: a word in a line
"""


def test_only_tracebacks_that_nothing_outside_can_cause_count() -> None:
    assert bugs.in_text(LOG) == ["AttributeError: 'NoneType' object has no attribute 'vllm_args'", "TypeError: say() takes 2 arguments"]
