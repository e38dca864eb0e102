"""./bench.sh: load on the served model with vLLM's own `vllm bench serve`, and its results kept.

It stands outside the daemon: it learns everything from `llmwd-ctl status --json`, starts one client
program at a time and never signals anything of llmwd's.

    served    what is being served, and what became of it
    plan      the kinds of benchmark and the client's command line
    client    the client running, until it or the server ends
    results   files and the table
"""
