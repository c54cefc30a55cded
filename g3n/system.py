"""What a process and its GPU are doing: memory, load, open files, power, temperature."""

from __future__ import annotations

import logging

import psutil
import torch

log = logging.getLogger(__name__)
GIB = 2**30


class System:
    """Figures of this process, by plain names with units."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call begins the interval of the second
        self._management = device.type == "cuda"  # whether NVML (nvidia-ml-py) answers

    def read(self) -> dict[str, float]:
        """``cpu_percent`` is the mean since the last call, 100 a core; the GPU's load and power are of this moment."""
        with self._process.oneshot():
            found = {
                "rss_gib": self._process.memory_info().rss / GIB,
                "cpu_percent": self._process.cpu_percent(),
                "open_files": float(self._process.num_fds()),
            }
        if self._device.type == "cuda":
            found |= {
                "gpu_memory_gib": torch.cuda.memory_allocated(self._device) / GIB,
                "gpu_reserved_gib": torch.cuda.memory_reserved(self._device) / GIB,
                "gpu_peak_memory_gib": torch.cuda.max_memory_allocated(self._device) / GIB,
            }
        return found | self._gpu()

    def _gpu(self) -> dict[str, float]:
        if not self._management:
            return {}
        try:
            return {
                "gpu_utilization_percent": float(torch.cuda.utilization(self._device)),
                "gpu_power_watts": torch.cuda.power_draw(self._device) / 1e3,
                "gpu_temperature_c": float(torch.cuda.temperature(self._device)),
            }
        except Exception as error:  # no nvidia-ml-py, a driver that refuses, a part of a GPU: meters never stop a run
            self._management = False
            log.info("no utilization, power and temperature of the GPU (%s)", " ".join(str(error).split())[:160])
            return {}
