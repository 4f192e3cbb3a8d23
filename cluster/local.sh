#!/usr/bin/env bash
# A Ray cluster of two nodes on this machine, with a token: the way to try `orchestrator submit`.
#   cluster/local.sh up [CPUS_PER_NODE]   start it and tell how to reach it
#   cluster/local.sh down                 stop it
# Needs the extra `cluster` (pip install 'transfer-orchestrator[cluster]'), in the environment that is active.
set -euo pipefail

home="${XDG_STATE_HOME:-$HOME/.local/state}/transfer-orchestrator/local-cluster"
token_file="$home/token"
port=6397
dashboard=8265
agent=52375 # Not the default one, which any other Ray on this machine has.

need_ray() {
  if ! command -v ray >/dev/null || ! python -c 'import aiohttp' 2>/dev/null; then
    echo "error: there is no Ray with a dashboard in this environment" >&2
    echo "    -> pip install 'transfer-orchestrator[cluster]', and activate the environment" >&2
    exit 2
  fi
}

up() {
  need_ray
  local cpus="${1:-2}"
  mkdir -p "$home"
  chmod 700 "$home"
  if [ ! -s "$token_file" ]; then
    (umask 077 && python -c 'import secrets; print(secrets.token_urlsafe(32))' >"$token_file")
  fi
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token_file"
  # Nobody but this machine: the dashboard runs whatever it is sent.
  ray start --head --node-ip-address 127.0.0.1 --port "$port" --num-cpus "$cpus" \
    --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --dashboard-agent-listen-port "$agent" \
    --disable-usage-stats >/dev/null
  # In a folder of its own: two nodes with one would unpack what a job brings over each other.
  ray start --address "127.0.0.1:$port" --num-cpus "$cpus" --temp-dir "${TMPDIR:-/tmp}/ray-$(id -u)-second" \
    --dashboard-agent-listen-port "$((agent + 1))" --disable-usage-stats >/dev/null
  cat <<TEXT
The cluster runs, two nodes with $cpus CPUs each. In the shell that submits:

    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token_file
    orchestrator submit RECIPE scale.workers=2 --follow
TEXT
}

down() {
  # Not `ray stop`, which would end every other cluster on this machine too.
  local ours="gcs[-_](address=[^ ]*:|server_port=)$port( |\$)"
  pkill -f -- "$ours" || echo "no cluster of this script runs" >&2
  sleep 2
  pkill -KILL -f -- "$ours" || true # Its head node may not end by itself.
}

case "${1:-}" in
  up) up "${@:2}" ;;
  down) down ;;
  *)
    sed -n '2,5p' "$0" >&2
    exit 2
    ;;
esac
