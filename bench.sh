#!/usr/bin/env bash
# Benchmarks the model that is being served: ./bench.sh --help
# The same care as in bin/llmwd-ctl: no module of another Python, or of the current folder, in the place of ours.
unset PYTHONPATH PYTHONHOME
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/scripts/env.sh" || exit 1
exec "$LLMWD_PYTHON" -I -m llmwd.bench "$@"
