"""For every test."""

import signal

# A shell that starts a command in its background has it ignore Ctrl-C, and what that starts ignores it as well: the
# tests that press Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
