"""FSDP through an accelerate config: sharded weights, gathered for the pipeline, saved by all."""

import json

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


@pytest.mark.slow
def test_a_sharded_run_is_the_same_run_and_is_resumed(script, shared_folder, tiny_unet, tmp_path):
    """2 sharded processes against 1 x accumulation 2, with classes; stopped after 3 steps."""
    pictures = shared_folder("class-pictures", tiny.write_class_pictures)
    (tmp_path / "fsdp.yaml").write_text(CONFIG)
    flags = [
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
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    done = script("train.py", *flags, "--gradient_accumulation_steps=2", f"--output_dir={whole}")
    assert done.returncode == 0, done.stderr
    launch = [
        "--config_file",
        tmp_path / "fsdp.yaml",
        "tests/training/fsdp_on_cpu.py",
        *flags,
        f"--output_dir={sharded}",
    ]
    done = script(*launch, "--max_train_steps=3", launch=True)
    assert done.returncode == 0, done.stderr
    assert (sharded / "checkpoint-3" / "pytorch_model_fsdp_0").is_dir()  # a piece of each process
    done = script(*launch, launch=True)
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
