#!/usr/bin/env bash
# A workload on a GKE cluster made with xpk: CLUSTER=c TPU_TYPE=v5litepod-256 SLICES=2 NAME=run1 launch/xpk.sh --config=... --workdir=/mnt/bucket/run
set -euo pipefail
: "${CLUSTER:?}" "${TPU_TYPE:?}" "${NAME:?}"
cd "$(dirname "$0")/.."
exec xpk workload create --cluster "$CLUSTER" --workload "$NAME" --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" \
  --script-dir . --command "pip install -q -e '.[tpu]' && bash launch/local.sh --multihost $(printf '%q ' "$@")"
