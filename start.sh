#!/usr/bin/env bash
# Starts llmwd on this node or, over ssh, on another one. `./start.sh --help` says the rest.
# Every step looks first whether it is done already, so running it again is harmless and quick.
set -uo pipefail

usage() {
    cat <<TEXT
usage: ./start.sh [--no-wait] [NODE]

Starts llmwd-supervisor in the tmux session "$session" (without tmux: detached, with a log file),
waits until the model answers, and says what you can do next. Ctrl-C ends the waiting only.

  NODE         start it there, over ssh (home folders are shared between nodes)
  --no-wait    do not wait for the model

The first time it copies etc/config.env.example to etc/config.env and makes the environment. On a machine
without an NVIDIA driver it sets up vLLM's CPU build and a small model, and simulates SIM_GPUS (4) GPUs.
TEXT
}

self=$(readlink -f -- "${BASH_SOURCE[0]}")
root=${self%/*}
home=${LLMWD_HOME:-$root}
session=${LLMWD_TMUX_SESSION:-llm_watchdog}
ctl=$root/bin/llmwd-ctl
embedded=smollm2-135m
node='' wait=1

say() { printf 'start: %s\n' "$*"; }
refuse() { printf 'start: %s\n' "$*" >&2; exit "${code:-1}"; }

read_arguments() {
    local word
    for word in "$@"; do
        case $word in
            -h | --help) usage; exit 0 ;;
            --no-wait | --detach) wait=0 ;;
            -*) code=2 refuse "there is no option $word; ./start.sh --help" ;;
            *)
                [[ -z $node ]] || code=2 refuse "one node at a time, not $node and $word"
                # What goes to ssh must not be able to look like one of its options.
                [[ $word =~ ^[A-Za-z0-9]([A-Za-z0-9._@-]*[A-Za-z0-9])?$ ]] || code=2 refuse "\"$word\" is not a node's name"
                node=$word
                ;;
        esac
    done
}

start_there() {
    local name words="./start.sh"
    ((wait)) || words+=" --no-wait"
    for name in LLMWD_TMUX_SESSION LLMWD_STATE_DIR LLMWD_RUNTIME_DIR LLMWD_HOME; do
        if [[ -n ${!name-} ]]; then words="$name=$(printf %q "${!name}") $words"; fi
    done
    say "on $node:"
    exec ssh -t "$node" "cd $(printf %q "$root") && env $words"
}

settings_file() {
    local file=$home/etc/config.env example=$home/etc/config.env.example
    [[ -e $file ]] && return
    [[ -e $example ]] || example=$root/etc/config.env.example
    # For us alone from its first instant: secrets will be written into it.
    mkdir -p "$home/etc" && (umask 077; cp "$example" "$file") || refuse "etc/config.env cannot be made in $home"
    say "made etc/config.env from etc/config.env.example: your settings go there"
}

has_driver() {
    [[ -e /proc/driver/nvidia ]] || command -v nvidia-smi >/dev/null ||
        PATH=$PATH:/usr/sbin:/sbin ldconfig -p 2>/dev/null | grep -q 'libnvidia-ml\.so'
}

active_profile() {
    local target
    target=$(readlink -- "$home/active-model.env") || return 1
    target=${target##*/}
    printf '%s\n' "${target%.env}"
}

# choose PROFILE: the link, where the operator has not chosen yet.
choose() {
    [[ -e $home/active-model.env || -L $home/active-model.env ]] && return
    "$ctl" switch -- "$1" >/dev/null || exit 1
    say "$1 is the active model: ./switch-model.sh shows the others"
}

prepare_model() {
    if has_driver; then
        choose glm-4.7-flash
    else
        local profile
        profile=$(active_profile) || profile=$embedded
        if [[ $profile == "$embedded" ]] && ! "$root/scripts/setup-embedded.sh" --check; then
            say "no NVIDIA driver here: setting up vLLM's CPU build and a small chat model"
            "$root/scripts/setup-embedded.sh" || exit 1
        fi
        export SIM_GPUS=${SIM_GPUS:-4} # etc/config.env wins over it
        choose "$embedded"
    fi
    local said
    said=$("$ctl" check 2>&1) || refuse "this has to be mended first:"$'\n'"$said"
    grep '^warning: ' <<<"$said" >&2
}

# The runtime and the log folder, made private to us: the line `runtime`, the line `logs`.
find_folders() {
    "$LLMWD_PYTHON" -I -c 'import os, sys
from llmwd.adapters import rundir
dirs = rundir.find_dirs(os.environ)
try:
    rundir.prepare(dirs)
except rundir.DirError as error:
    sys.exit(f"start: {error}")
print(dirs.runtime, dirs.logs, sep="\n")'
}

# The tmux server may be older than this shell, so it has another environment: ours goes there in a file
# that only we can read (an argument would show it to every user of the node).
# shellcheck disable=SC2016
in_pane='. "$1"; rm -f -- "$1"
"$2/bin/llmwd-supervisor"; status=$?
((status == 0)) || { (umask 077; echo "$status" >"$3"); printf "\nllmwd-supervisor ended with exit code %s. Enter closes this window.\n" "$status"; read -r; }'

start_in_tmux() {
    local file how=(new-session -d -s "$session")
    file=$(mktemp "$runtime/start.XXXXXX") || return 1
    (unset TMUX TMUX_PANE TERM SHLVL PWD OLDPWD; export -p) >"$file"
    tmux has-session -t "=$session" 2>/dev/null && how=(new-window -d -t "=$session:")
    pane=$(tmux "${how[@]}" -P -F '#{pane_id}' -n llmwd -c "$root" bash -c "$in_pane" llmwd "$file" "$root" "$ended") && return
    rm -f -- "$file"
    return 1
}

start_detached() {
    # The supervisor gets our umask, which is its services'; the files are for us alone.
    (umask 077; : >"$log") && chmod 600 "$log" || refuse "$log cannot be written"
    # shellcheck disable=SC2016
    setsid nohup bash -c '"$1/bin/llmwd-supervisor" || { status=$?; umask 077; echo "$status" >"$2"; }' llmwd "$root" "$ended" </dev/null >"$log" 2>&1 &
    say "$1: it runs detached, and what it says goes to $log"
}

# What the supervisor said before it ended, where the user would not see it.
why_not_up() {
    if [[ -n $pane ]]; then
        tmux capture-pane -p -J -S -100 -t "$pane" 2>/dev/null | grep . | grep -v 'Enter closes' >&2
        tmux kill-pane -t "$pane" 2>/dev/null
    else
        tail -n 20 "$log" >&2
    fi
    exit 1
}

read_arguments "$@"
here=$(uname -n)
[[ -z $node || $node == localhost || ${node%%.*} == "${here%%.*}" ]] || start_there
settings_file
unset PYTHONPATH PYTHONHOME
# shellcheck source=scripts/env.sh
. "$root/scripts/env.sh" || exit 1
if "$ctl" status --json >/dev/null; then
    say "llmwd is running on this node already"
    exec "$ctl" status
fi
prepare_model

folders=$(find_folders) || exit 1
runtime=${folders%$'\n'*} log=${folders#*$'\n'}/start.log ended=${folders%$'\n'*}/start.ended
rm -f -- "$ended"
pane='' attach=(--ended "$ended")
if ! command -v tmux >/dev/null; then
    start_detached "there is no tmux here"
elif start_in_tmux; then
    say "llmwd-supervisor runs in the tmux session $session"
    attach+=(--attach "tmux attach -t $session")
else
    start_detached "tmux could not open a session"
fi
# Without waiting for the model, it is still seen whether the supervisor came up at all.
((wait)) || attach+=(--no-wait)
"$ctl" welcome "${attach[@]}"
status=$?
rm -f -- "$ended"
((status == 3)) && why_not_up
exit "$status"
