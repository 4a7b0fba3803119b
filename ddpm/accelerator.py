"""The `accelerate.Accelerator` of a launch, with all CPU cores in use."""

import importlib.util
import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    broadcast_object_list,
)

from ddpm.cpu_threads import set_wait_policy, use_all_cores
from ddpm.device import keep_freed_memory
from ddpm.errors import UserError

T = TypeVar("T")
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_MIXED_PRECISION": "fp8",
}
"""Variables of `accelerate launch` that are "true" or "fp8" for what training cannot do."""


def make_accelerator(
    mixed_precision: str | None,
    loggers: tuple[str, ...] = (),
    cpu_wait_policy: str = "active",
    ddp_timeout: int = 1800,
) -> Accelerator:
    """Return the Accelerator of this process, with its part of the machine's CPU cores.

    accelerate joins processes without a GPU only with `cpu=True`, and its launcher gives each of
    them a single thread. A collective fails after `ddp_timeout` seconds without another process.
    Raise UserError for a tracker that is not installed, for fp16 or FSDP
    without a GPU, and for what is not supported: DeepSpeed, Megatron-LM, fp8.
    """
    missing = [name for name in loggers if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--logger {missing[0]} needs a package: pip install {' '.join(missing)}, or leave it "
            "out (metrics.jsonl is always written)."
        )
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    has_accelerator = torch.accelerator.is_available()
    requested = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if requested == "fp16" and not has_accelerator:
        source = "--mixed_precision" if mixed_precision else "The accelerate config's precision"
        raise UserError(
            f"{source} fp16 needs a GPU, but there is none: use --mixed_precision bf16, or no "
            "(float32)."
        )
    for variable, choice in UNSUPPORTED.items():
        if os.environ.get(variable) in ("true", "fp8"):
            raise UserError(
                f"The accelerate config uses {choice}, which this command does not support. Launch "
                "with --config_file accelerate_config.yaml --num_processes N instead."
            )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not has_accelerator:
        raise UserError(
            "The accelerate config uses FSDP, which needs GPUs, and this machine has none. Launch "
            "with --config_file accelerate_config.yaml --num_processes N instead."
        )
    timeout = timedelta(seconds=ddp_timeout)
    if num_processes > 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        _join_again(timeout)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=num_processes > 1 and not has_accelerator,
        # It would wrap the model, whose weights then have other names; training compiles in place.
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    if accelerator.num_processes == 1 and _address_without_processes():
        print(
            "Note: accelerate launch started one process. If its config asks for more (MULTI_CPU, "
            "NO: they need mpirun), launch with --config_file accelerate_config.yaml "
            "--num_processes N instead."
        )
    if accelerator.device.type == "cpu":
        use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        set_wait_policy(cpu_wait_policy)
        keep_freed_memory()
    return accelerator


def from_main(accelerator: Accelerator, value: T) -> T:
    """Return the main process's `value`. Call on every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether FSDP keeps a part of each weight on each process."""
    return accelerator.distributed_type == DistributedType.FSDP


def _join_again(timeout: timedelta) -> None:
    """Join the processes that the launcher has started again after a failure (--max_restarts).

    torch 2.14 reads the store of the launcher as it was left, with the addresses of processes that
    have ended. Under a prefix it is empty.
    """
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    store = torch.distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    torch.distributed.init_process_group(store=store, rank=rank, world_size=size, timeout=timeout)


def _address_without_processes() -> bool:
    """Return whether `accelerate launch` prepared several processes, but left them to mpirun."""
    names = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"}
    return names <= os.environ.keys() and "WORLD_SIZE" not in os.environ
