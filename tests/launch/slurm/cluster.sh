#!/usr/bin/env bash
# Sets up Slurm with this machine as its controller and its one node, in a folder.
#
#   source tests/launch/slurm/cluster.sh FOLDER   starts it; exports SLURM_CONF
#   stop_cluster                                  ends jobs and daemons
#
# Debian, as root: installs slurm-wlm and munge if they are not there. Nothing outside
# FOLDER is configured, no daemon of the system is touched, and nothing is accounted.

cluster=$(realpath "$1")
cluster_pids=()

stop_cluster() {
  local pid
  scancel --me 2> /dev/null
  for _ in $(seq 40); do
    [[ $(squeue --noheader 2> /dev/null) ]] || break
    sleep 1
  done
  for pid in "${cluster_pids[@]}"; do kill "$pid" 2> /dev/null; done
  wait "${cluster_pids[@]}" 2> /dev/null
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

if ! command -v slurmctld > /dev/null || ! command -v munged > /dev/null; then
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    slurm-wlm munge > "$cluster/apt.log" 2>&1 || return 77
fi

mkdir -p "$cluster/state" "$cluster/spool" /run/munge
(umask 077 && head -c 1024 /dev/urandom > "$cluster/munge.key")
munged --foreground --force --socket="$cluster/munge.socket" \
  --key-file="$cluster/munge.key" --pid-file="$cluster/munged.pid" \
  --log-file="$cluster/munged.log" --seed-file="$cluster/munged.seed" \
  > "$cluster/munged.out" 2>&1 &
cluster_pids+=($!)

host=$(hostname -s)
cat > "$cluster/slurm.conf" << CONF
ClusterName=try
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$cluster/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd.log
# in a container there are no cgroups to hold jobs in
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=5
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$cluster/slurm.conf
slurmctld -D > "$cluster/slurmctld.out" 2>&1 &
cluster_pids+=($!)
slurmd -D -N "$host" > "$cluster/slurmd.out" 2>&1 &
cluster_pids+=($!)

for _ in $(seq 60); do
  [[ $(sinfo --noheader --format=%t 2> /dev/null) == idle ]] && return 0
  sleep 1
done
echo "Slurm did not come up; see $cluster/*.log" >&2
return 1
