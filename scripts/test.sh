#!/usr/bin/env bash
# The test command: makes what the tests need, then runs all of them. Arguments go to pytest.
#
#   scripts/test.sh                 everything
#   scripts/test.sh tests/core -q   a part
#
# A real one-node Slurm comes from the distribution's package slurm-wlm, which needs root to install and to run;
# real vLLM from scripts/setup-embedded.sh, a browser from the package chromium. Where one cannot be had, its tests are left out and said to be, except
# with CI=true: there nothing is left out.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "$0")")/.."

say() { printf 'test.sh: %s\n' "$*" >&2; }
without=()

# leave_out WHAT WHY: for good in CI, else with a word.
leave_out() {
    if [[ ${CI-} == true ]]; then
        say "$2; in CI nothing is left out, so this run has failed"
        exit 1
    fi
    say "$2: the tests that need $1 are left out"
    without+=("$1")
}

LLMWD_EXTRA=test . scripts/env.sh

# install WHAT PACKAGE: the distribution's package, or its tests are left out.
install() {
    local log
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        leave_out "$1" "$2 is not installed, and only root with apt-get could do that"
        return
    fi
    say "installing the package $2"
    log=$(mktemp)
    # The packages' own services have no configuration and are not for us.
    if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$2"; } \
        >"$log" 2>&1 </dev/null; then
        rm -f "$log"
    else
        tail -n 5 "$log" >&2
        leave_out "$1" "$2 could not be installed"
    fi
}

if [[ $(id -u) != 0 ]]; then
    leave_out slurm "a Slurm node can only be started by root"
elif ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null; then
    install slurm slurm-wlm
fi
command -v chromium >/dev/null || install browser chromium
command -v gcc >/dev/null || say "there is no C compiler: tests with the stand-in driver and cgroup v2 will fail"

# Nothing to set up for a run that names its tests and none of them needs the model.
if [[ $* == *tests/* && $* != *tests/vllm* ]]; then
    scripts/setup-embedded.sh --check || without+=(vllm)
else
    scripts/setup-embedded.sh || leave_out vllm "the embedded vLLM could not be set up"
fi

# Three at a time: most tests wait for real processes. A file stays together, for the fixtures that it shares.
[[ $* == *-n* ]] || set -- -n 3 --dist loadfile "$@"

# Nothing of the caller's own llmwd may leak in, nor reach it.
unset LLMWD_HOME LLMWD_RUNTIME_DIR LLMWD_STATE_DIR SIM_GPUS DETECTION SLURM_CONF SLURM_JOB_ID
# A short path: unix sockets have 108 bytes for theirs. Kept where something failed.
folder=$(mktemp -d /tmp/lt.XXXX)
status=0
LLMWD_TEST_WITHOUT="${LLMWD_TEST_WITHOUT-}${without[*]:+ ${without[*]}}" \
    "$LLMWD_PYTHON" -m pytest --basetemp "$folder/t" "$@" || status=$?
if ((status == 0)); then rm -rf "$folder"; else say "what the failed tests wrote is in $folder"; fi
exit "$status"
