#!/usr/bin/env bash
# One workstation: launch/local.sh --config=configs/hlip.py:demo --workdir=runs/demo
set -euo pipefail
cd "$(dirname "$0")/.."
# glibc gives volume-sized buffers back to the kernel after every record unless told to keep them: reading is 4-6x dearer.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
exec python -m jaxmed.main "$@"
