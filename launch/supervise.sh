#!/usr/bin/env bash
# Runs a launcher, passes signals on to it, and kills it when it has been without workers for too long.
#
#   launch/supervise.sh LAUNCHER [ARGS ...]
#
# Why: torchrun's agent asks a store on the first node what to do next. When the link to it is cut, the agent waits in
# the store's client for ever, and takes no notice of SIGTERM. Its ranks have a deadline of their own (dist.timeout), so
# an agent whose ranks are all dead, and that does not start new ones, is one that is cut off, or that waits for a node
# which does not come back. Either way a scheduler can only help once this process has ended.
set -euo pipefail

limit="${NO_WORKER_LIMIT:-20}"  # seconds without workers, after the first ones; more than a restart takes
allowed="${JOIN_LIMIT:-900}"    # seconds before the first ones: all nodes have to come first

"$@" &
agent=$!
pass_on() { # unless the agent has it already (train.sbatch): a second one would break off its waiting for the ranks
    [[ -n ${SIGNALS_REACH_ALL:-} ]] || kill "-$1" "$agent" 2>/dev/null || true
}
trap 'pass_on TERM' TERM INT HUP # INT too as TERM: a command in the background takes no notice of it
trap 'pass_on USR1' USR1

has_workers() { # children of the agent; those that are dead and not yet asked after do not count
    { cat /proc/[0-9]*/status 2>/dev/null || true; } | awk -v agent="$agent" '
        /^State:/ {state = $2}  /^PPid:/ && $2 == agent && state != "Z" {found = 1}  END {exit !found}'
}

since=$SECONDS
while kill -0 "$agent" 2>/dev/null; do
    if has_workers; then
        since=$SECONDS allowed=$limit
    elif ((SECONDS - since > allowed)); then
        echo "supervise.sh: no worker for more than $allowed s; the launcher (process $agent) is killed" >&2
        kill -KILL "$agent"
        exit 1
    fi
    sleep 1 &
    wait $! || true # ended by a signal at once, unlike a sleep in the foreground
done
wait "$agent" # its exit code is ours
