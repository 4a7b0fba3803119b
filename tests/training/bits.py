"""Everything of a run that must survive a kill, as tensors; and how tests kill a run."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ddpm import run_folder
from ddpm.diffusion import power_ema
from tests.tiny import STEPS


class Killed(BaseException):
    """Stands for SIGKILL: the product neither catches it nor cleans up after it."""


def kill(monkeypatch, owner: Any, name: str, at_call: int) -> None:
    """Raise Killed in the n-th call of a function, before it does anything."""
    original, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == at_call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, deadly)


def final_state(folder: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Return weights, averages, snapshots and optimizer moments of a finished run by name."""
    last = folder / f"checkpoint-{steps}"
    tensors = {f"raw {k}": v for k, v in load_file(last / "model.safetensors").items()}
    tensors |= {f"ema {k}": v for k, v in load_file(last / "ema.safetensors").items()}
    tensors |= {f"out {k}": v for k, v in load_file(folder / run_folder.UNET_WEIGHTS).items()}
    for path in (last / run_folder.POWER_EMA, *power_ema.list_snapshots(folder).values()):
        if path.exists():
            tensors |= {f"{path.name} {k}": v for k, v in load_file(path).items()}
    optimizer = torch.load(last / "optimizer.bin", weights_only=True)
    for index, moments in optimizer["state"].items():
        tensors |= {f"optimizer {index} {k}": v for k, v in moments.items()}
    return tensors


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of metrics.jsonl, each of which must be valid."""
    return [json.loads(line) for line in (folder / run_folder.METRICS).read_text().splitlines()]
