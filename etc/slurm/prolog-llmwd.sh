#!/bin/bash
# Slurm prolog: has every llmwd on this node take its processes off the new job's GPUs before the job's first
# process starts. For administrators; nothing else of llmwd is needed on the node, and no other part runs as root.
#
# Install (as root):  install -o root -g root -m 0755 etc/slurm/prolog-llmwd.sh /etc/slurm/prolog.d/
# slurm.conf:         Prolog=/etc/slurm/prolog.d/*
#                     PrologFlags=Alloc             (or Contain, which includes it; not RunInJob)
#
# From slurmd:  SLURM_JOB_ID; SLURM_JOB_GPUS, the job's GPUs on this node by Slurm's indices ("0,1"). Without GPUs it
#               ends at once; a list that it does not understand counts as all GPUs. No arguments.
# Settings:     the three below, by editing the installed copy (slurmd passes no user's variables to a prolog).
# It always exits with 0, at the latest LLMWD_WITHIN + 2 seconds after its start: a dead, stopped or broken llmwd costs
# that time and nothing more. It asks Slurm nothing. What did not go well is said on standard error.
#
# That time, together with all other prologs, has to be well below BatchStartTimeout (slurm.conf, by default 10 s): a
# batch job that takes longer to begin may be taken for missing, and given up.
#
# An llmwd that takes no orders (its root has just been killed, or its runtime folder is none of LLMWD_RUNTIMES) is said
# to do so, and the end of its server is waited for: without a root it ends by itself. A user has one llmwd on a node.
#
# What it trusts. An llmwd is found by a living process named "llmwd: root" that belongs wholly to one user and is in no
# Slurm job. root then only names folders; as that user, with no privilege, no inherited descriptor and an empty
# environment, the script looks into them, and runs what their owner, the same user, has put there. Whatever a user
# plants runs as that user, outside jobs, where that user has a process already, and ends before this script does. A user
# who wants to be a nuisance can make it wait for LLMWD_WITHIN + 2 seconds: name the users in LLMWD_USERS, and nobody
# else is ever asked.

LLMWD_WITHIN=${LLMWD_WITHIN:-6}                                           # seconds; between 1 and 600
LLMWD_USERS=${LLMWD_USERS:-}                                              # uids, such as "1000 1017"; empty: all
LLMWD_RUNTIMES=${LLMWD_RUNTIMES:-/run/user/%u/llmwd /tmp/llmwd-%u}        # runtime folders; %u: the uid

trap 'exit 0' EXIT # whatever happens: a prolog that fails drains the node
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH LC_ALL=C
umask 077
cd / || exit 0

say() { printf 'prolog-llmwd: job %s: %s\n' "$SLURM_JOB_ID" "$*" >&2; }

number='^[0-9]{1,18}$' list='^[0-9]{1,3}(-[0-9]{1,3})?(,[0-9]{1,3}(-[0-9]{1,3})?)*$'
gpus=${SLURM_JOB_GPUS-}
[[ ${SLURM_JOB_ID-} =~ $number && -n $gpus ]] || exit 0
if ! [[ $gpus =~ $list ]]; then
    printf -v gpus '%q' "${gpus:0:100}"
    say "SLURM_JOB_GPUS=$gpus is not understood and counts as all GPUs"
    gpus=0-999
fi
[[ $LLMWD_WITHIN =~ ^[1-9][0-9]{0,2}$ ]] || LLMWD_WITHIN=6

# Hundredths of a second since boot, into `now`.
look_at_clock() {
    local up
    read -r up _ </proc/uptime
    now=$((10#${up/./}))
}

# living_as PID NAME...: into `uid` and `name`; fails unless the process has one of the names, lives (what is dead and not
# reaped yet still has a name) and all its four uids are the same. What runs as somebody else than who started it (a
# set-uid program under a borrowed name) is nobody's llmwd. The name only: command lines and memory maps of other
# processes may be slow to read.
living_as() {
    local key real effective saved files
    read -r name <"/proc/$1/comm" && [[ $name == "$2" || $name == "${3-$2}" ]] || return 1
    while read -r key real effective saved files; do
        case $key in
            State:) [[ $real != [ZX] ]] || return 1 ;;
            Uid:)
                uid=$real
                [[ $real == "$effective" && $real == "$saved" && $real == "$files" ]]
                return
                ;;
        esac
    done <"/proc/$1/status"
    return 1
} 2>/dev/null

# Living roots, and the processes that keep a server: roots_of[uid] and holders_of[uid], pids with blanks between them.
find_users() {
    local pid
    for pid in /proc/[0-9]*; do
        pid=${pid#/proc/}
        living_as "$pid" 'llmwd: root' "$HOLDER" || continue
        [[ -z $LLMWD_USERS || " $LLMWD_USERS " == *" $uid "* ]] || continue
        if [[ $name == "$HOLDER" ]]; then holders_of[$uid]+=" $pid"; else roots_of[$uid]+=" $pid"; fi
    done
}

# find_outside PID...: those that are in no Slurm job, into `outside`. A process inside a job may not make anything happen
# outside of it. This may hang in the kernel: not for the main shell.
find_outside() {
    local pid cgroups
    outside=()
    for pid; do
        cgroups=$(<"/proc/$pid/cgroup") || continue
        [[ $cgroups =~ slurmstepd|/slurm[^/]*/uid_|/job_[0-9] ]] || outside+=("$pid")
    done
} 2>/dev/null

# Run by the user's own rights; in a folder that is not that user's alone it does nothing. 3: no llmwd here.
# shellcheck disable=SC2016
as_user='
    [[ -d $1 && ! -L $1 ]] && cd -P -- "$1" && [[ -O . && $(stat -c %a .) == *700 ]] || exit 3
    [[ -f release.sh && ! -L release.sh && -O release.sh ]] || exit 3
    LLMWD_RUNTIME_DIR=$PWD exec sh ./release.sh --job "$2" --gpus "$3" --within "$4"
'

# release UID FOLDER: replaces the subshell that it is called in, which becomes the leader of a session.
release() {
    local fd gid home groups bare=(--inh-caps=-all --bounding-set=-all) apart=(unshare --pid --fork)
    for fd in "/proc/$BASHPID/fd/"*; do
        fd=${fd##*/}
        if ((fd > 2 && fd != 255)); then eval "exec $fd>&-"; fi # 255 is bash's own, and not inherited
    done
    # slurmd's own privileges are not the user's: it may be the last that the kernel kills, and lock all memory.
    echo 0 >/proc/self/oom_score_adj
    ulimit -c 0
    ulimit -l 64
    ulimit -e 0 -r 0
    # From the user database, not from the process: that may have a group that its user has not.
    IFS=: read -r _ _ _ gid _ home _ < <(getent passwd "$1")
    groups=(--regid "$gid" --init-groups)
    [[ $gid =~ $number ]] || groups=(--regid 65534 --clear-groups)
    # In a pid namespace of its own nothing outlives the `timeout`; a container may allow neither.
    setpriv "${bare[@]}" true || bare=()
    "${apart[@]}" true || apart=()
    exec setsid "${apart[@]}" timeout --foreground -k 0.5 "$((LLMWD_WITHIN + 1))" \
        setpriv --reuid "$1" "${groups[@]}" "${bare[@]}" --no-new-privs \
        env -i PATH="$PATH" LC_ALL=C.UTF-8 HOME="${home:-/}" \
        bash --noprofile --norc -c "$as_user" prolog-llmwd "$2" "$SLURM_JOB_ID" "$gpus" "$LLMWD_WITHIN"
}

# call UID PLACE FOLDER: one release. It tells the main shell `UID PLACE began SESSION` and `UID PLACE ended STATUS`; the
# status is 5 where none of the user's roots is outside of jobs.
call() {
    local session status=5 outside
    # shellcheck disable=SC2086
    find_outside ${roots_of[$1]}
    if ((${#outside[@]})); then
        (release "$1" "$3") >/dev/null &
        session=$!
        printf '%s %s began %s\n' "$1" "$2" "$session"
        wait "$session"
        status=$?
        kill -KILL -- "-$session" # whoever it left behind there
    fi
    printf '%s %s ended %s\n' "$1" "$2" "$status"
}

# await_end UID: of this user's holders. Each outlives the last process of its server.
await_end() {
    local outside pid status=0
    # shellcheck disable=SC2086
    find_outside ${holders_of[$1]}
    for pid in "${outside[@]}"; do
        while living_as "$pid" "$HOLDER"; do
            look_at_clock
            if ((now + 50 >= deadline)); then
                status=4
                break
            fi
            sleep 0.1
        done
    done
    printf '%s holders ended %s\n' "$1" "$status"
}

# begin KEY COMMAND...: beside us. slurmd waits for everybody who has its descriptors, so nobody else gets them.
begin() {
    "${@:2}" </dev/null >&"$ended" 2>/dev/null &
    out[$1]=$!
}

# settle UID: once each of this user's calls has ended, or where there is nobody to call.
settle() {
    ((${proved[$1]:-0})) && return
    if [[ ${said_of[$1]-} == deaf ]]; then say "the llmwd of uid $1 has no folder in LLMWD_RUNTIMES that takes orders"; fi
    if [[ -n ${holders_of[$1]-} ]]; then begin "$1 holders" await_end "$1"; fi
}

look_at_clock
deadline=$((now + (LLMWD_WITHIN + 2) * 100))
declare -A roots_of=() holders_of=()
HOLDER='llmwd: holder v' # "llmwd: holder vllm", as far as the kernel keeps a name
find_users
((${#roots_of[@]} + ${#holders_of[@]})) || exit 0

exec {ended}<> <(:) # a pipe without a name
declare -A out=() session_of=()               # by "uid place": the subshell, and what it has started
declare -A calls=() proved=() said_of=()      # by uid: how many are out, how many went well, what is to be said of the others
read -ra patterns <<<"$LLMWD_RUNTIMES"
for uid in "${!roots_of[@]}"; do
    calls[$uid]=${#patterns[@]}
    for place in "${!patterns[@]}"; do
        begin "$uid $place" call "$uid" "$place" "${patterns[place]//%u/$uid}"
    done
done
for uid in "${!holders_of[@]}"; do
    if [[ -z ${roots_of[$uid]-} ]]; then settle "$uid"; fi
done

while ((${#out[@]})); do
    look_at_clock
    ((now < deadline)) || break
    printf -v wait_s '%d.%02d' $(((deadline - now) / 100)) $(((deadline - now) % 100))
    read -r -t "$wait_s" -u "$ended" uid place what value || break
    if [[ $what == began ]]; then
        session_of["$uid $place"]=$value
        continue
    fi
    unset "out[$uid $place]" "session_of[$uid $place]"
    if [[ $place == holders ]]; then
        [[ $value == 0 ]] || say "the llmwd of uid $uid still had its server when time was over"
        continue
    fi
    case $value in
        0) ((++proved[$uid])) ;;
        3) said_of[$uid]=${said_of[$uid]-deaf} ;; # no supervisor of that folder
        5) ;;
        *)
            said_of[$uid]=failed
            say "the llmwd of uid $uid did not prove in time that it is off GPUs $gpus (exit code $value)"
            ;;
    esac
    if ((--calls[$uid] == 0)); then settle "$uid"; fi
done
for key in "${!out[@]}"; do
    say "the llmwd of uid ${key% *} was left alone after $((LLMWD_WITHIN + 2)) s"
    kill -KILL -- "${out[$key]}" ${session_of[$key]+"-${session_of[$key]}"} 2>/dev/null
done
exit 0
