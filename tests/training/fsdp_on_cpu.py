"""train.py with FSDP on CPUs: what accelerate offers for GPUs alone, and torch can do with gloo.

accelerate turns FSDP on for the backends of accelerators only. Here it is told that gloo is one;
all the rest is its own: sharding, gathering, saving and loading. Weights that are offloaded are not
in pinned memory, which torch cannot allocate without a GPU.
"""

import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy


def backend(self, *args, **kwargs):
    return "gloo", DistributedType.MULTI_GPU


def set_device(self):
    self.device = torch.device("cpu")


PartialState._prepare_backend = backend
PartialState.set_device = set_device
CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pin_memory
top = Path(__file__).parents[2]
sys.path.insert(0, str(top))

from ddpm import accelerator  # noqa: E402

make_accelerator = accelerator.make_accelerator


def make_with_gloo(*args, **options):
    """make_accelerator, to which gloo is an accelerator too."""
    with mock.patch.object(torch.accelerator, "is_available", lambda: True):
        return make_accelerator(*args, **options)


accelerator.make_accelerator = make_with_gloo
runpy.run_path(str(top / "train.py"), run_name="__main__")
