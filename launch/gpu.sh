#!/usr/bin/env bash
# All GPUs of one machine: launch/gpu.sh --config=configs/hlip.py --config.mesh.fsdp=8 --config.mesh.data=1
# Install jax for the GPU first: pip install -U 'jax[cuda12]'
set -euo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
python -c "import jax; d = jax.devices(); assert d[0].platform == 'gpu', f'jax sees {d}, no GPU'; print(d)"
exec "$(dirname "$0")/local.sh" "$@"
