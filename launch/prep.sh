#!/usr/bin/env bash
# Raw scans to shards with all cores: launch/prep.sh /data/dicom --out=/data/shards --recipe=hlip_brain_mri
# Kill it whenever you like; the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
exec python -m jaxmed.prep --workers="${WORKERS:-$(nproc)}" "$@"
