#!/usr/bin/env bash
# Lists the model profiles, or switches to one: ./switch-model.sh [PROFILE]
self=$(readlink -f -- "${BASH_SOURCE[0]}")
ctl=${self%/*}/bin/llmwd-ctl

case ${1-} in
    "") exec "$ctl" models --names ;;
    -h | --help)
        printf 'usage: ./switch-model.sh [PROFILE]\n\nWithout PROFILE: lists the profiles in models/, the active one with a star.\n'
        printf 'With PROFILE: serves it from now on. "bin/llmwd-ctl switch --help" tells more.\n'
        exit 0
        ;;
esac
if (($# > 1)) || [[ $1 == -* ]]; then
    printf 'usage: ./switch-model.sh [PROFILE]\n' >&2
    exit 2
fi
exec "$ctl" switch -- "$1"
