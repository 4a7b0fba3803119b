"""FSDP through an accelerate config: sharded weights, gathered for the pipeline, saved by all."""

import json
import re

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file

from tests import tiny

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: ResnetBlock2D
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""


@pytest.fixture
def flags(shared_folder, tiny_unet):
    """The flags of a run of 6 steps, with classes."""
    pictures = shared_folder("class-pictures", tiny.write_class_pictures)
    return [
        f"--train_data_dir={pictures}",
        "--class_conditional",
        f"--model_config_name_or_path={tiny_unet}",
        "--resolution=8",
        "--train_batch_size=2",
        "--max_train_steps=6",
        "--lr_warmup_steps=2",
        "--learning_rate=1e-2",
        "--lr_scheduler=constant_with_warmup",
        "--eval_batch_size=2",
        "--ddpm_num_inference_steps=2",
        "--logging_steps=1",
        "--post_hoc_ema",
    ]


@pytest.fixture
def launch(script, tmp_path, flags):
    """launch(processes, *flags, offload=False) -> a sharded run of 4 micro-batches a step."""

    def run(processes: int, *more: str, offload: bool = False):
        config = tmp_path / "fsdp.yaml"
        config.write_text(CONFIG + f"  fsdp_offload_params: {str(offload).lower()}\n")
        return script(
            f"--config_file={config}",
            f"--num_processes={processes}",
            "tests/training/fsdp_on_cpu.py",
            *flags,
            f"--gradient_accumulation_steps={4 // processes}",
            *more,
            launch=True,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("processes, later, offload", [(2, 4, False), (4, 2, True)])
def test_a_sharded_run_is_the_same_run_and_is_resumed(
    script, launch, flags, tmp_path, processes, later, offload
):
    """Against 1 process x accumulation 4; stopped after 3 steps, and resumed on other processes."""
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    done = script("train.py", *flags, "--gradient_accumulation_steps=4", f"--output_dir={whole}")
    assert done.returncode == 0, done.stderr
    output = f"--output_dir={sharded}"
    done = launch(processes, output, "--max_train_steps=3", offload=offload)
    assert done.returncode == 0, done.stderr
    pieces = list((sharded / "checkpoint-3" / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert len(pieces) == processes
    done = launch(later, output, offload=offload)
    assert done.returncode == 0 and "Resuming from" in done.stdout, done.stderr

    for file in (
        "unet/diffusion_pytorch_model.safetensors",
        "conditional/diffusion_pytorch_model.safetensors",
        "checkpoint-6/ema.safetensors",
        "checkpoint-6/tracks.safetensors",
        "ema/step-000006.safetensors",
    ):
        one, other = load_file(whole / file), load_file(sharded / file)
        assert one.keys() == other.keys()
        assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-3
    index = [
        json.loads((f / "unet" / "config.json").read_text())["_class_name"]
        for f in (whole, sharded)
    ]
    assert index == ["UNet2DModel", "UNet2DModel"]
    norms = [
        [json.loads(line)["grad_norm"] for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (whole, sharded)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    stock = DDPMPipeline.from_pretrained(sharded)
    assert all(torch.isfinite(weight).all() for weight in stock.unet.parameters())

    more = ["--gradient_accumulation_steps=4", "--max_train_steps=7", output]
    done = script("train.py", *flags, *more)
    assert done.returncode != 0 and "was saved with FSDP" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_dry_run_says_what_each_process_needs(launch, tmp_path, offload):
    done = launch(2, f"--output_dir={tmp_path / 'dry'}", "--dry_run", offload=offload)
    assert done.returncode == 0, done.stderr
    assert "Memory of each of the 2 processes at its peak, predicted: about" in done.stdout
    numbers = re.search(r"Of ([\d.]+) MiB of weights.*FSDP keeps ([\d.]+) MiB", done.stdout)
    whole, part = map(float, numbers.groups())
    assert part == pytest.approx(whole / 2, rel=0.1)
