"""What a measurement of speed needs from the device it runs on, be it a CPU or a GPU."""

from __future__ import annotations

import gc
import platform
import time

import torch

from benchmarks._resident import reset_peak, resident
from sdp_llm.training.environment import device_type

MATMUL_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}
MATMUL_SECONDS = 0.3  # at least so long for each size
SLOWEST_MATMUL = 2.0  # seconds: larger sizes are left out where a product would take longer


class Device:
    """The GPU where there is one (and ``DS_ACCELERATOR`` is not cpu), otherwise the CPU."""

    def __init__(self) -> None:
        self.torch = torch.device(device_type())
        self._before: int | None = None

    def __str__(self) -> str:
        if self.torch.type == "cuda":
            return torch.cuda.get_device_name(self.torch)
        return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"

    def synchronize(self) -> None:
        """Return when everything that was started is done."""
        if self.torch.type == "cuda":
            torch.cuda.synchronize(self.torch)

    def start_peak(self) -> None:
        """Forget the peak of memory so far. What is allocated now is there before the measured."""
        gc.collect()
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated(self.torch)
        else:
            reset_peak()
            self._before = resident("VmRSS")

    def drop_peak(self) -> bool:
        """Forget the peak since :meth:`start_peak`, not what was there before."""
        if self.torch.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.torch)
            return True
        return reset_peak()

    def peak(self) -> int:
        """The most bytes since :meth:`drop_peak` over those at :meth:`start_peak`.

        On a GPU those of the allocator, on a CPU those of the resident set.
        """
        assert self._before is not None
        if self.torch.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch) - self._before
        return resident("VmHWM") - self._before

    def matmul_ceiling(self, dtype: torch.dtype) -> float | None:
        """The largest throughput of products of square matrices, operations per second.

        As they lie or one transposed, as in linear layers: kernels differ much. None where this
        device has no such product.
        """
        try:
            return max(self._largest(dtype, is_transposed) for is_transposed in (True, False))
        except (KeyError, RuntimeError):
            return None

    def _largest(self, dtype: torch.dtype, is_transposed: bool) -> float:
        best = 0.0
        for size in MATMUL_SIZES[self.torch.type]:
            if best and 2.0 * size**3 / best > SLOWEST_MATMUL:
                break
            best = max(best, self._matmul(size, dtype, is_transposed))
        return best

    def _matmul(self, size: int, dtype: torch.dtype, is_transposed: bool) -> float:
        a, b = (torch.randn(size, size, device=self.torch).to(dtype) for _ in range(2))
        if is_transposed:
            b = b.T
        out = torch.empty_like(a)
        torch.matmul(a, b, out=out)
        shortest, spent = float("inf"), 0.0
        while spent < MATMUL_SECONDS:
            self.synchronize()
            start = time.perf_counter()
            torch.matmul(a, b, out=out)
            self.synchronize()
            seconds = time.perf_counter() - start
            shortest, spent = min(shortest, seconds), spent + seconds
        return 2.0 * size**3 / shortest
