#!/usr/bin/env bash
# Every host of a TPU slice: TPU=name ZONE=zone launch/tpu_vm.sh --config=configs/hlip.py --workdir=/mnt/bucket/run
# The workdir is a folder that all hosts see (a mounted bucket or NFS).
# Copies this checkout to all workers, installs it there and starts the same command on each.
set -euo pipefail
: "${TPU:?set TPU to the name of the TPU VM}" "${ZONE:?set ZONE to its zone}"
cd "$(dirname "$0")/.."
git archive --format=tar.gz -o /tmp/jaxmed.tar.gz HEAD
gcloud compute tpus tpu-vm scp /tmp/jaxmed.tar.gz "$TPU:" --zone="$ZONE" --worker=all
command="mkdir -p jaxmed && tar xzf jaxmed.tar.gz -C jaxmed && cd jaxmed && pip install -q -e '.[tpu]' && bash launch/local.sh --multihost $(printf '%q ' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
