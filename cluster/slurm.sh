#!/usr/bin/env bash
# A Ray cluster of all nodes of a Slurm job, for one command of the orchestrator:
#   sbatch --nodes 4 --gpus-per-node 8 cluster/slurm.sh train RECIPE scale.workers=32 scale.storage=/shared/runs
# The environment that is active when it is submitted must hold the orchestrator, on every node under the same path, and
# its PyTorch must suit the nodes' NVIDIA driver (srun --gpus 1 orchestrator doctor).
#SBATCH --job-name=orchestrator
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
set -euo pipefail

if [ "$#" -eq 0 ] || [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  sed -n '2,5p' "$0" >&2
  exit 2
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
address="$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')"
# Of this job alone: others may run on the same network.
port="$((20000 + SLURM_JOB_ID % 10000))"
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_urlsafe(32))')"
# In the environment, not on a command line, which everybody on a node can read.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
per_node=(--num-cpus "${SLURM_CPUS_ON_NODE:-1}")
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  per_node+=(--num-gpus "$SLURM_GPUS_ON_NODE")
fi

stop() {
  jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true
}
trap stop EXIT

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --node-ip-address "$address" --port "$port" --include-dashboard=false \
  --disable-usage-stats "${per_node[@]}" &
for node in "${nodes[@]:1}"; do
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
    ray start --block --address "$address:$port" --disable-usage-stats "${per_node[@]}" &
done

export RAY_ADDRESS="$address:$port"
python - "${#nodes[@]}" <<'PYTHON'
import sys
import time

import ray

wanted, until = int(sys.argv[1]), time.monotonic() + 300
while True:
    try:
        ray.init(logging_level="ERROR")
        break
    except (ConnectionError, RuntimeError):
        if time.monotonic() > until:
            sys.exit("error: the head node did not start within 5 minutes")
        time.sleep(2)
while (count := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > until:
        sys.exit(f"error: {count} of {wanted} nodes joined within 5 minutes")
    time.sleep(1)
PYTHON
orchestrator "$@"
