#!/usr/bin/env bash
# Benchmarks the model that is being served: ./bench.sh --help
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/scripts/env.sh" || exit 1
exec "$LLMWD_PYTHON" -m llmwd.bench "$@"
