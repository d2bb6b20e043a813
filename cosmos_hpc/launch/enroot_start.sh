#!/usr/bin/env bash
# enroot_start.sh IMAGE SCRATCH NAMES BUT [OPTIONS OF enroot start] -- COMMAND ...
#
# Becomes COMMAND inside the squashfs file IMAGE. The first rank on a node that needs it unpacks it below SCRATCH, a disk
# of the node itself; it stays for the next start and job, until nobody has used it for a week. NAMES and BUT are regular
# expressions: variables whose names match the first and not the second are passed in, by their names alone, so that no
# value shows in a list of processes.
set -euo pipefail

KEPT_DAYS=7
GROWTH=2 # least free space over the size of the squashfs file; unpacked it takes two to three times that
MOST_WAIT_S=120

image=$1 scratch=$2 names=$3 but=$4
shift 4
options=()
while [ "$1" != -- ]; do
    options+=("$1")
    shift
done
shift

fail() {
    echo "error: no container on $(hostname -s): $*" >&2 # the supervisor keeps away from such a node
    exit 1
}

command -v enroot >/dev/null || fail "there is no enroot in PATH: install it on the nodes, or set container.mode=pyxis"
[ -r "$image" ] || fail "container.image $image can't be read from here: it has to lie on the shared file system"
[ -w "$scratch" ] || fail "container.scratch $scratch can't be written: set a folder on a disk of every node"

# Neither the home, which nodes share, nor /run/user, which a job often lacks. The host's name, should SCRATCH be shared.
home=$scratch/cosmos-hpc-$(id -u)/$(hostname -s)
(umask 077 && mkdir -p "$home/marks")
[ -O "$home" ] || fail "$home belongs to somebody else: set container.scratch to another folder"
export ENROOT_DATA_PATH=$home/containers ENROOT_RUNTIME_PATH=$home/run ENROOT_CACHE_PATH=$home/cache

name=$(basename "${image%.*}" | tr -c 'a-zA-Z0-9._+\n-' -)-$(stat --dereference --format=%s-%Y "$image")
ready=$home/marks/$name.ready

free_bytes() {
    df --output=avail --block-size=1 "$home" | tail -n 1
}

started() { # when a process was, in ticks of the kernel; a process id alone may be somebody else's by now
    sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20
}

# Whether a rank of whatever job of this user lives in a container: the rank is the process that left the mark.
is_used() {
    local mark
    for mark in "$home/marks/$1.users"/*; do
        [ -e "$mark" ] || continue
        [ "$(started "${mark##*/}")" != "$(cat "$mark")" ] || return 0
        rm -f "$mark"
    done
    return 1
}

remove_unused() {
    local unused=$1 lock
    exec {lock}>>"$home/marks/$unused.lock"
    if flock --exclusive --nonblock "$lock" && ! is_used "$unused"; then
        rm -f "$home/marks/$unused.ready"
        enroot remove --force "$unused" >&2 || true
    fi
    exec {lock}>&-
}

sweep() {
    local kept
    for kept in $(find "$home/marks" -name '*.ready' -mmin "+$((KEPT_DAYS * 24 * 60))" -printf '%f\n'); do
        remove_unused "${kept%.ready}"
    done
    for kept in $(ls "$ENROOT_DATA_PATH" 2>/dev/null); do # what a kill left half unpacked
        [ -e "$home/marks/$kept.ready" ] || enroot remove --force "$kept" >&2 || true
    done
}

make_room() {
    local needed=$(($(stat --dereference --format=%s "$image") * GROWTH)) kept
    for kept in $(find "$home/marks" -name '*.ready' -printf '%T@ %f\n' | sort -n | cut -d ' ' -f 2); do
        [ "$(free_bytes)" -lt "$needed" ] || return 0
        remove_unused "${kept%.ready}"
    done
    [ "$(free_bytes)" -ge "$needed" ] || fail "$scratch has $(($(free_bytes) >> 20)) MiB left, too little to unpack" \
        "$image: set container.scratch to a larger disk of the nodes"
}

create() {
    local nodes=${SLURM_STEP_NUM_NODES:-1} spread
    if [ "$nodes" -gt 1 ]; then # all nodes read the same file: half a second between two of them on average
        spread=$((nodes * 5 < MOST_WAIT_S * 10 ? nodes * 5 : MOST_WAIT_S * 10))
        sleep "$((RANDOM % spread))e-1"
    fi
    sweep
    make_room
    echo "$(hostname -s): unpacking $image in $ENROOT_DATA_PATH" >&2
    enroot create --force --name "$name" "$image" >&2 </dev/null
    touch "$ready"
}

exec {starting}>>"$home/marks/$name.lock"
flock --shared "$starting" # until enroot closes it: by then the rank's mark tells
mkdir -p "$home/marks/$name.users"
started $$ >"$home/marks/$name.users/$$"
if [ ! -e "$ready" ]; then
    exec {creating}>>"$home/marks/creating"
    flock --exclusive "$creating"
    [ -e "$ready" ] || create
    exec {creating}>&-
fi
touch "$ready"

for variable in $(compgen -e | grep -Ex "$names" | grep -Evx "$but"); do
    options+=(--env "$variable")
done
exec enroot start "${options[@]}" -- "$name" "$@"
