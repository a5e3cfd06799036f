"""Peak of the memory that a step adds."""

import ctypes
import gc
import resource
import threading
import time
from pathlib import Path

import torch


class PeakMemory:
    """Peak of the memory a step adds, in MiB: the device's allocator, or this process's resident set."""

    def __enter__(self):
        gc.collect()
        # What earlier steps freed but the allocator kept would hide what this one needs
        ctypes.CDLL(None).malloc_trim(0)
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        self.before = self.peak = self._resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.running = False
            self.thread.join()
        self.added = (self.peak - self.before) / 2**20

    def _watch(self):
        while self.running:
            self.peak = max(self.peak, self._resident())
            time.sleep(0.002)

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
