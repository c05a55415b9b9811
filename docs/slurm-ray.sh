#!/bin/bash
# One `nh2st-pipe embed` over all GPUs of a Slurm job. Adapt the five lines below, then
#     sbatch slurm-ray.sh --slides manifest.csv --encoder uni2-h --store /shared/store.zarr
# What follows the script's name goes to `embed`. Out of time, the job keeps what it has and is queued again.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN  # so that nobody else on these nodes runs code as you
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname -I | awk '{print $1}')
address="$head_ip:$((20000 + SLURM_JOB_ID % 20000))"  # a port of this job's own: others may share the node
have=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block)

on() {  # run a command on one node of the job, for as long as the job lasts
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" "$@" > "ray-$SLURM_JOB_ID-$node.log" 2>&1 &
    started+=($!)
}
started=()
trap 'kill "${started[@]}" 2> /dev/null || true; wait' EXIT

out_of_time='' embed='' told=''
end() {  # 300 s before the end, whenever it comes: embed, if it runs, keeps what it has encoded; told once
    out_of_time=yes
    if [ -n "$embed" ] && [ -z "$told" ]; then
        told=yes
        kill -TERM "$embed" 2> /dev/null || true
    fi
}
trap end TERM

on "${nodes[0]}" ray start --head --node-ip-address="$head_ip" --port="${address#*:}" --include-dashboard=false "${have[@]}"
for _ in $(seq 60); do  # until it listens
    (exec 3<> "/dev/tcp/$head_ip/${address#*:}") 2> /dev/null && break
    sleep 1
done
for node in "${nodes[@]:1}"; do
    on "$node" ray start --address="$address" "${have[@]}"
done
python - "$address" "${#nodes[@]}" << 'END'  # until all are there, or two minutes are over: it goes on with those that are
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
for _ in range(60):
    if sum(node["Alive"] for node in ray.nodes()) >= int(sys.argv[2]):
        break
    time.sleep(2)
END

status=143
if [ -z "$out_of_time" ]; then
    nh2st-pipe embed --engine ray --address "$address" "$@" &
    embed=$!
    if [ -n "$out_of_time" ]; then end; fi  # it came between the lines above
    status=0
    wait "$embed" || status=$?
    while kill -0 "$embed" 2> /dev/null; do  # the signal ended the waiting, and not embed
        status=0
        wait "$embed" || status=$?
    done
fi
if [ $status -eq 130 ] || [ $status -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
