#!/usr/bin/env bash
# shellcheck shell=bash
# Makes the project's own virtual environment, <checkout>/.venv-llmwd, where it is missing or stale.
#
#   scripts/env.sh [EXTRA]                run it: EXTRA is an extra of setup.cfg, such as `test`
#   LLMWD_EXTRA=test . scripts/env.sh     source it: a sourced file would see its caller's arguments,
#                                         so the extra comes from a variable
#
# After sourcing, LLMWD_CHECKOUT is the checkout and LLMWD_PYTHON the environment's interpreter; the
# status is 0, or 1 after a sentence on standard error. Nothing is written to standard output.
#
# Every bin/ program passes through here, so the way of "nothing to do" starts no other program: it
# compares setup.cfg and pyproject.toml with the copy kept when the environment was last made.
# A build that was cut short leaves `unfinished` behind, and the next one begins with an empty folder,
# because pip takes a half-unpacked package for an installed one.

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then LLMWD_EXTRA=${1-}; fi
LLMWD_CHECKOUT=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." >/dev/null && pwd)
LLMWD_PYTHON=$LLMWD_CHECKOUT/.venv-llmwd/bin/python

_llmwd_say() { printf 'llmwd: %s\n' "$*" >&2; }

# Prints the first interpreter that can make the environment. Being on PATH proves nothing: version
# managers put up names that only print an error, and distributions split venv off.
llmwd_base_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1 </dev/null; then
            printf '%s\n' "$name"
            return 0
        fi
    done
    _llmwd_say "no Python 3.11 or newer with its venv module was found as python3.13, python3.12," \
        "python3.11 or python3; install one (Debian, Ubuntu: apt install python3-venv), then run this again."
    return 1
}

# What the environment is made from. The folder is part of it: an environment cannot be moved.
_llmwd_recipe() { printf '%s\n%s\n%s\n' "$LLMWD_CHECKOUT" "$(<"$LLMWD_CHECKOUT/setup.cfg")" "$(<"$LLMWD_CHECKOUT/pyproject.toml")"; }

# _llmwd_is_current RECIPE: with LLMWD_EXTRA, that extra has its own stamp.
_llmwd_is_current() {
    local stamp=$LLMWD_CHECKOUT/.venv-llmwd/made-from${LLMWD_EXTRA:+-$LLMWD_EXTRA}
    [[ -x $LLMWD_PYTHON && -r $stamp && $(<"$stamp") == "$1" ]]
}

_llmwd_build() {
    local recipe=$1 venv=$LLMWD_CHECKOUT/.venv-llmwd base log started=$SECONDS made_in=
    [[ -r $venv/made-from ]] && read -r made_in <"$venv/made-from"
    if [[ -L $venv ]]; then  # `venv --clear` would empty what it leads to, and then refuse to go on
        if [[ -n $made_in && $made_in != "$LLMWD_CHECKOUT" ]]; then
            _llmwd_say "$venv leads to the environment of another checkout, $made_in: remove the link, then run this again."
            return 1
        fi
        venv=$(readlink -m -- "$venv")
    fi
    log=$(mktemp) || return 1
    if [[ ! -x $LLMWD_PYTHON || -e $venv/unfinished || ${made_in:-$LLMWD_CHECKOUT} != "$LLMWD_CHECKOUT" ]]; then
        base=$(llmwd_base_python) || { rm -f "$log"; return 1; }
        _llmwd_say "making the environment $venv with $("$base" --version) (once, about a minute)"
        if ! { mkdir -p "$venv" && "$base" -m venv --clear "$venv"; } >"$log" 2>&1 </dev/null; then
            _llmwd_failed "making the environment" "$log"
            return 1
        fi
    fi
    : >"$venv/unfinished"
    rm -f "$venv"/made-from*
    _llmwd_say "installing what setup.cfg names${LLMWD_EXTRA:+, with its extra \"$LLMWD_EXTRA\"}"
    if ! "$LLMWD_PYTHON" -m pip install --disable-pip-version-check --no-input \
        -e "$LLMWD_CHECKOUT${LLMWD_EXTRA:+[$LLMWD_EXTRA]}" >"$log" 2>&1 </dev/null; then
        _llmwd_failed "installing" "$log"
        return 1
    fi
    rm -f "$log"
    printf '%s\n' "$recipe" >"$venv/made-from"
    if [[ -n ${LLMWD_EXTRA-} ]]; then printf '%s\n' "$recipe" >"$venv/made-from-$LLMWD_EXTRA"; fi
    rm -f "$venv/unfinished"
    _llmwd_say "environment ready after $((SECONDS - started)) s"
}

_llmwd_failed() {
    _llmwd_say "$1 failed; the end of its output:"
    tail -n 15 "$2" | sed 's/^/    /' >&2
    rm -f "$2"
    _llmwd_say "mend what it names, then run the same command again."
}

# A subshell, so that the lock's descriptor is closed with it. The lock is on setup.cfg, a file that is
# always there and that making the environment anew does not remove; opened for writing as well,
# because a network file system grants an exclusive lock to no other.
_llmwd_ensure() (
    recipe=$(_llmwd_recipe)
    _llmwd_is_current "$recipe" && exit 0
    if [[ -n ${LLMWD_EXTRA-} && ! $LLMWD_EXTRA =~ ^[a-z]+$ ]]; then
        _llmwd_say "\"$LLMWD_EXTRA\" is not the name of an extra in setup.cfg."
        exit 1
    fi
    exec 9<>"$LLMWD_CHECKOUT/setup.cfg" || exit 1
    if ! flock -n 9; then
        _llmwd_say "another start is making the environment; waiting for it"
        flock 9 || exit 1
    fi
    _llmwd_is_current "$recipe" || _llmwd_build "$recipe"
)

_llmwd_ensure
