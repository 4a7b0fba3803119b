"""The device of a process, and its memory allocator."""

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ddpm.cpu_threads import limit_threads, set_wait_policy
from ddpm.errors import UsageError, first_line

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; UsageError for one that cannot be used here.

    `auto` is an accelerator of this machine, chosen by LOCAL_RANK, or the CPU without one.
    """
    if name == "auto":
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator()
        if accelerator.type == "mps":
            return accelerator
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
        return torch.device(accelerator.type, index)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without it
        raise UsageError(f"--device {name} cannot be used here: {first_line(error)}") from None
    return device


def prepare_device(name: str, cpu_wait_policy: str = "active") -> torch.device:
    """Return `choose_device(name)`; for a CPU, also prepare its threads and keep_freed_memory."""
    device = choose_device(name)
    if device.type == "cpu":
        limit_threads()
        set_wait_policy(cpu_wait_policy)
        keep_freed_memory()
    return device


@functools.cache
def compile_failure_reason(device_type: str, **options: Any) -> str:
    """Return a sentence on why torch.compile does not work here; empty if it works.

    Its requirements (on a CPU a C++ compiler and Python's headers, on a GPU Triton) show only when
    something is compiled, so this compiles a small function, which takes some seconds.
    """
    try:
        torch.compile(_increment, **options)(torch.zeros(8, device=device_type))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error)
        return f"torch cannot compile on this machine ({reason})."
    return ""


def _increment(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next step; return whether that is possible.

    By default it returns large blocks to the system at the end of every step or operator and gets
    them back as new pages, which the kernel clears first. With this the process keeps its peak
    memory to the end. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def import_diffusers_for_unets() -> None:
    """Import diffusers as if packages for other models and schedulers were not installed.

    It looks for them when it is first imported, and imports those that it finds: without them an
    image of sample.py takes 10 CPU seconds instead of 15 (docs/performance.md). peft imports
    transformers.
    """
    with hide_packages("transformers", "peft", "scipy", "torchvision"):
        from diffusers import DDPMPipeline  # noqa: F401


@contextmanager
def hide_packages(*names: str) -> Iterator[None]:
    """Make imports inside the block do without optional packages that are installed.

    A package that imports a hidden one must be hidden too.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # None: the import system's mark of a missing module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
