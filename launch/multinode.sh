#!/usr/bin/env bash
# One node's part of a run on several: the same command on every node.
#
#   launch/multinode.sh [--interface NAME] CONFIG [--nproc N] [--max-restarts N] [--a.b VALUE ...]
#
# A fixed set of nodes, known by number:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/multinode.sh ...     # NODE_RANK=1 on the other one
# Nodes that may be replaced or lost (NODE_RANK says only who holds the store):
#   NNODES=1:2 NODE_RANK=0 RDZV_ENDPOINT=10.0.0.1:29400 launch/multinode.sh ...
#
# A smaller world continues from the newest checkpoint, whatever its layout. Give train.global_batch_size and leave out
# train.gradient_accumulation_steps, so that a step stays the same step. run.dir must be on storage that all nodes share.
#
#   MASTER_PORT       29500
#   LOCAL_ADDR        the address under which the other nodes reach this one; that of --interface, or of its host name
#   RUN_ID            minizero; two runs with one endpoint need two
#   NO_WORKER_LIMIT   20: seconds after which a node without live ranks gives up (supervise.py); more where nodes that
#                     died come back later than that, or ranks compute for longer without a collective
#   JOIN_LIMIT        900: seconds that the nodes have to find one another
#   GRACE             120: seconds that ranks have to save after SIGTERM
#
# Exit codes are those of local.sh.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
[[ $# -gt 0 ]] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }

if [[ $1 == --interface ]]; then
    # Hosts have several interfaces, and what their name resolves to is often loopback, which no other node reaches.
    export GLOO_SOCKET_IFNAME="$2" NCCL_SOCKET_IFNAME="$2"
    LOCAL_ADDR="${LOCAL_ADDR:-$(ip -4 -oneline address show dev "$2" | sed -n '1s/.* inet \([0-9.]*\).*/\1/p')}"
    shift 2
fi

# torchrun reads every option of its own from PET_*; a scheduler may have set them (Kubeflow's Trainer does).
export PET_NNODES="${NNODES:-${PET_NNODES:?how many nodes: NNODES=2, or 1:2 when one of two may be lost}}"
export PET_RDZV_ID="${RUN_ID:-minizero}"
export JOIN_LIMIT="${JOIN_LIMIT:-900}"
[[ -z ${LOCAL_ADDR:-} ]] || export PET_LOCAL_ADDR="$LOCAL_ADDR"
rank="${NODE_RANK:-${PET_NODE_RANK:-${SLURM_NODEID:-}}}"

if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    export PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT="$RDZV_ENDPOINT"
    # A node is missed after 3 x 3 s without a word, and those that are left wait 3 s more for others to join.
    conf="join_timeout=$JOIN_LIMIT,read_timeout=$JOIN_LIMIT,last_call_timeout=3,keep_alive_interval=3"
    # Ranks of each round meet in a store of its own. In the agents' store, which nodes that come later do not ask
    # for the address of, they would wait for each other in vain.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # Who holds the store is found by comparing names, which fails where nodes do not know their own: so it is said.
    [[ -z $rank ]] || conf+=",is_host=$((rank == 0))"
    export PET_RDZV_CONF="$conf"
    unset PET_NODE_RANK
else
    export PET_NODE_RANK="${rank:?which node this is: NODE_RANK=0 to NNODES-1}"
    export PET_MASTER_ADDR="${MASTER_ADDR:-${PET_MASTER_ADDR:?the address of node 0, or RDZV_ENDPOINT=host:port}}"
    export PET_MASTER_PORT="${MASTER_PORT:-${PET_MASTER_PORT:-29500}}"
    export PET_RDZV_CONF="timeout=$JOIN_LIMIT"
fi

python="${PYTHON:-python}"
exec "$python" "$here/supervise.py" "$python" -m minizero train --nproc auto --max-restarts 3 "$@"
