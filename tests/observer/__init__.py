"""A judge beside a whole llmwd, which shares no code with it: what it sees in /proc and in the jobs' folder has to
agree with the guarantees. `python -m tests.observer --help` says how to use it."""
