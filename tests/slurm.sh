#!/usr/bin/env bash
# Runs a command on a Slurm cluster of two nodes that share a disk, both on this machine; needs root, slurm-wlm and munge:
#
#     tests/slurm.sh FOLDER COMMAND ARGUMENTS...
#
# The cluster has its own processes and its own /etc/slurm, and ends with the command.
set -euo pipefail
if [ -z "${SLURM_TEST:-}" ]; then
  SLURM_TEST=1 exec unshare --mount --pid --fork --kill-child --mount-proc bash "$0" "$@"
fi
folder=$1
shift
mkdir -p /etc/slurm "$folder"/{etc,state,run}
cat > "$folder/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)
SlurmUser=root
SlurmctldPort=16817
AuthInfo=socket=$folder/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool_%n
SlurmctldPidFile=$folder/run/slurmctld
SlurmdPidFile=$folder/run/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
# The nodes count as what is said here, whatever memory this machine has.
SlurmdParameters=config_overrides
NodeName=one NodeHostname=$(hostname) Port=16818 CPUs=1 RealMemory=16000
NodeName=two NodeHostname=$(hostname) Port=16819 CPUs=1 RealMemory=16000
PartitionName=main Nodes=ALL Default=YES
CONF
mount --bind "$folder/etc" /etc/slurm
head -c 1024 /dev/urandom > "$folder/key"
chmod 600 "$folder/key"
munged --force --foreground --key-file="$folder/key" --socket="$folder/munge" --pid-file="$folder/run/munged" \
  --log-file="$folder/munged.log" --seed-file="$folder/seed" 2> "$folder/munged.out" &
timeout 60 bash -c 'until [ -S "$0" ]; do sleep 0.1; done' "$folder/munge"
slurmctld -D 2> "$folder/slurmctld.out" &
for node in one two; do slurmd -D -N $node 2> "$folder/$node.out" & done
timeout 60 bash -c 'until [ "$(sinfo --noheader --states=idle --format=%D)" = 2 ]; do sleep 0.2; done'
"$@"
