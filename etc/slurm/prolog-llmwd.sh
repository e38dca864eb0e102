#!/bin/bash
# Slurm prolog: has every llmwd on this node take its processes off the new job's GPUs before the job's first
# process starts. For administrators; nothing else of llmwd is needed on the node, and no other part runs as root.
#
# Install (as root):  install -o root -g root -m 0755 etc/slurm/prolog-llmwd.sh /etc/slurm/prolog.d/
# slurm.conf:         Prolog=/etc/slurm/prolog.d/*
#
# From slurmd:  SLURM_JOB_ID; SLURM_JOB_GPUS, the job's GPUs on this node by Slurm's indices ("0,1"). Without GPUs it
#               ends at once. No arguments.
# Settings:     the three below, by editing the installed copy (slurmd passes no user's variables to a prolog).
# It always exits with 0, at the latest LLMWD_WITHIN + 2 seconds after its start: a dead, stopped or broken llmwd costs
# that time and nothing more. It asks Slurm nothing. What did not go well is said on standard error.
#
# An llmwd whose root has just been killed takes no orders, and ends its server by itself: that is waited for, too.
#
# What it trusts. An llmwd is found by a living process named "llmwd: root" that belongs wholly to one user and is in no
# Slurm job. root then only names folders; as that user, with no privilege, no inherited descriptor and an empty
# environment, the script looks into them, and runs what their owner, the same user, has put there. Whatever a user
# plants runs as that user, outside jobs, where that user has a process already. A user who wants to be a nuisance can
# make it wait for LLMWD_WITHIN + 2 seconds: name the users in LLMWD_USERS, and nobody else is ever asked.

LLMWD_WITHIN=${LLMWD_WITHIN:-10}                                          # seconds; between 1 and 600
LLMWD_USERS=${LLMWD_USERS:-}                                              # uids, such as "1000 1017"; empty: all
LLMWD_RUNTIMES=${LLMWD_RUNTIMES:-/run/user/%u/llmwd /tmp/llmwd-%u}        # runtime folders; %u: the uid

trap 'exit 0' EXIT # whatever happens: a prolog that fails drains the node
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH LC_ALL=C
umask 077
cd / || exit 0

number='^[0-9]{1,18}$' list='^[0-9]{1,3}(-[0-9]{1,3})?(,[0-9]{1,3}(-[0-9]{1,3})?)*$'
[[ ${SLURM_JOB_ID-} =~ $number && ${SLURM_JOB_GPUS-} =~ $list ]] || exit 0
[[ $LLMWD_WITHIN =~ ^[1-9][0-9]{0,2}$ ]] || LLMWD_WITHIN=10

say() { printf 'prolog-llmwd: job %s: %s\n' "$SLURM_JOB_ID" "$*" >&2; }

# Hundredths of a second since boot, into `now`.
look_at_clock() {
    local up
    read -r up _ </proc/uptime
    now=$((10#${up/./}))
}

# real_uid PID: into `uid`; fails unless all four uids are the same. What runs as somebody else than who started it
# (a set-uid program under a borrowed name) is nobody's llmwd.
real_uid() {
    local key real effective saved files
    while read -r key real effective saved files; do
        if [[ $key == Uid: ]]; then
            uid=$real
            [[ $real == "$effective" && $real == "$saved" && $real == "$files" ]]
            return
        fi
    done <"/proc/$1/status"
    return 1
} 2>/dev/null

# Living roots: pid_of[uid], and the processes that keep a server: holder_of[uid]. The name only: command lines and
# memory maps of other processes may be slow to read.
find_users() {
    local comm name pid
    for comm in /proc/[0-9]*/comm; do
        { read -r name <"$comm"; } 2>/dev/null || continue
        [[ $name == 'llmwd: root' || $name == "$HOLDER" ]] || continue
        pid=${comm#/proc/} pid=${pid%/comm}
        real_uid "$pid" || continue
        [[ -z $LLMWD_USERS || " $LLMWD_USERS " == *" $uid "* ]] || continue
        if [[ $name == "$HOLDER" ]]; then holder_of[$uid]=$pid; else pid_of[$uid]=$pid; fi
    done
}

# A process inside a job may not make anything happen outside of it.
in_job() {
    local cgroups
    cgroups=$(<"/proc/$1/cgroup") || return 0
    [[ $cgroups =~ slurmstepd|/slurm[^/]*/uid_|/job_[0-9] ]]
}

# Run by the user's own rights; in a folder that is not that user's alone it does nothing. 3: no llmwd here.
# shellcheck disable=SC2016
as_user='
    [[ -d $1 && ! -L $1 ]] && cd -P -- "$1" && [[ -O . && $(stat -c %a .) == *700 ]] || exit 3
    [[ -f release.sh && ! -L release.sh && -O release.sh ]] || exit 3
    LLMWD_RUNTIME_DIR=$PWD exec sh ./release.sh --job "$2" --gpus "$3" --within "$4"
'

# release UID PID FOLDER: replaces the subshell that it is called in.
release() {
    local fd gid home groups
    in_job "$2" && exit 3
    for fd in "/proc/$BASHPID/fd/"*; do
        fd=${fd##*/}
        if ((fd > 2 && fd != 255)); then eval "exec $fd>&-"; fi # 255 is bash's own, and not inherited
    done
    # From the user database, not from the process: that may have a group that its user has not.
    IFS=: read -r _ _ _ gid _ home _ < <(getent passwd "$1")
    groups=(--regid "$gid" --init-groups)
    [[ $gid =~ $number ]] || groups=(--regid 65534 --clear-groups)
    exec timeout -k 0.5 "$((LLMWD_WITHIN + 1))" \
        setpriv --reuid "$1" "${groups[@]}" --no-new-privs setsid \
        env -i PATH="$PATH" LC_ALL=C.UTF-8 HOME="${home:-/}" \
        bash --noprofile --norc -c "$as_user" prolog-llmwd "$3" "$SLURM_JOB_ID" "$SLURM_JOB_GPUS" "$LLMWD_WITHIN"
}

# await_end PID: of a holder without a root. It outlives the last process of its server.
await_end() {
    local turns=$(((LLMWD_WITHIN + 1) * 10)) name
    in_job "$1" && exit 3
    while { read -r name <"/proc/$1/comm"; } 2>/dev/null && [[ $name == "$HOLDER" ]]; do
        ((turns-- > 0)) || exit 4
        sleep 0.1
    done
    exit 0
}

look_at_clock
deadline=$((now + (LLMWD_WITHIN + 2) * 100))
declare -A pid_of=() holder_of=()
HOLDER='llmwd: holder v' # "llmwd: holder vllm", as far as the kernel keeps a name
find_users
((${#pid_of[@]} + ${#holder_of[@]})) || exit 0

exec {ended}<> <(:) # a pipe without a name; each release writes one line into it when it has ended
declare -A out=() # calls that are out, by "uid number"
read -ra patterns <<<"$LLMWD_RUNTIMES"
for uid in "${!pid_of[@]}"; do
    for place in "${!patterns[@]}"; do
        # slurmd waits for everybody who has its descriptors, so nobody who may outlive us gets them.
        {
            (release "$uid" "${pid_of[$uid]}" "${patterns[place]//%u/$uid}")
            printf '%s %s %s\n' "$uid" "$place" "$?" >&"$ended"
        } </dev/null >/dev/null 2>&1 &
        out["$uid $place"]=$uid
    done
done
for uid in "${!holder_of[@]}"; do
    [[ -n ${pid_of[$uid]-} ]] && continue
    {
        (await_end "${holder_of[$uid]}")
        printf '%s %s %s\n' "$uid" end "$?" >&"$ended"
    } </dev/null >/dev/null 2>&1 &
    out["$uid end"]=$uid
done

while ((${#out[@]})); do
    look_at_clock
    ((now < deadline)) || break
    printf -v wait_s '%d.%02d' $(((deadline - now) / 100)) $(((deadline - now) % 100))
    read -r -t "$wait_s" -u "$ended" uid place status || break
    unset "out[$uid $place]"
    # 3: no supervisor, or none of that folder
    [[ $status == [03] ]] || say "the llmwd of uid $uid did not prove in time that it is off GPUs $SLURM_JOB_GPUS (exit code $status)"
done
for uid in "${out[@]}"; do
    say "the llmwd of uid $uid was left alone after $((LLMWD_WITHIN + 2)) s: what was called hangs where no signal reaches it"
done
exit 0
