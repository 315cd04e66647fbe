#!/usr/bin/env bash
# A Slurm cluster of two nodes on this host, to try a job script on. Not for work: no accounting, no limits, no cgroups.
#
#   launch/slurm/one_host_cluster.sh start FOLDER     # then: export SLURM_CONF=FOLDER/slurm.conf
#   launch/slurm/one_host_cluster.sh stop FOLDER
#
# As root, with Debian's packages `slurm-wlm` and `munge`. Everything is under FOLDER; daemons listen on ports of their
# own (BASE_PORT, 17817, and the two above it) and are ended by their process ids.
set -euo pipefail

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
[[ $# -eq 2 ]] || usage
folder="$(realpath -m "$2")"
port="${BASE_PORT:-17817}"

start() {
    mkdir -p "$folder"/{state,n1,n2}
    head -c 128 /dev/urandom > "$folder/munge.key"
    chmod 400 "$folder/munge.key"
    cat > "$folder/slurm.conf" <<CONF
ClusterName=onehost
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
AuthType=auth/munge
CredType=cred/munge
# A requeued job is held back until its credentials have expired: 120 s, unless it is said.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
# What containers allow: processes are found in /proc, not in cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
ReturnToService=2
SchedulerParameters=sched_interval=2
KillWait=5
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 State=UNKNOWN
# A job of \`urgent\` takes the place of one of \`all\`, which has 30 s from its warning on.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
CONF
    # --force: munged is strict about who may write above its socket, which does not matter here.
    munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
        if [[ $(sinfo --noheader --states=idle --format=%D) == 2 ]]; then return; fi
        sleep 0.5
    done
    echo "the nodes did not come up; see the logs in $folder" >&2
    exit 1
}

stop() {
    for file in "$folder"/slurmd-n1.pid "$folder"/slurmd-n2.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
        if [[ -f $file ]]; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
}

case "$1" in
start) start ;;
stop) stop ;;
*) usage ;;
esac
