"""How fast it goes: throughput and model FLOP utilisation."""

import time

import jax
import jax.numpy as jnp

# Peak dense bf16 FLOP/s per chip, from the makers' data sheets.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A40": 150e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(mesh) -> float:
    """FLOP/s of all devices of a mesh: from `PEAK` by the longest matching name, or, for a CPU (whose simulated
    devices share it), measured with a float32 matrix product. 0 if unknown."""
    devices = mesh.devices.ravel()
    if devices[0].platform == "cpu":
        return _measured_cpu_flops(devices[0])
    names = [name for name in PEAK if devices[0].device_kind.startswith(name)]
    return PEAK[max(names, key=len)] * len(devices) if names else 0.0


def _measured_cpu_flops(device, size: int = 1024) -> float:
    a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


class Clock:
    """Rates since the last call of `tick`."""

    def __init__(self, *, start_step: int, peak: float):
        self._peak = peak
        self._last_step, self._last_time = start_step, time.perf_counter()
        self._examples = self._flops = 0.0

    def add(self, *, examples: float, flops: float) -> None:
        """What one step processed: real examples, and the FLOPs of the whole (padded) training step."""
        self._examples += examples
        self._flops += flops

    def pause(self) -> "Clock":
        """`with clock.pause():` leaves out what is not training (evaluation, checkpoints)."""
        return self

    def __enter__(self):
        self._paused = time.perf_counter()

    def __exit__(self, *_):
        self._last_time += time.perf_counter() - self._paused

    def tick(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds, steps = max(now - self._last_time, 1e-9), max(step - self._last_step, 1)
        rates = {
            "examples_per_second": self._examples / seconds,
            "seconds_per_step": seconds / steps,
        }
        if self._flops and self._peak:
            rates["mfu_percent"] = 100.0 * self._flops / seconds / self._peak
        self._last_step, self._last_time = step, now
        self._examples = self._flops = 0.0
        return rates
