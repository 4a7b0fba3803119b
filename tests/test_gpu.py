"""What only a GPU shows. Skipped on a machine without one: `pytest -m slow tests/test_gpu.py`."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from ddpm.accelerator import make_accelerator
from ddpm.config.parser import parse_train
from ddpm.data import dataset, order
from ddpm.sampling import image_io, proof
from ddpm.training import step
from ddpm.training.tracking import LossMeter
from tests.tiny import FLAGS, STEPS
from tests.training.bits import final_state, read_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def build(pictures, tiny_unet, tmp_path):
    """build(*flags) -> the TrainState of a tiny run on the GPU that has not started."""

    def build_state(*flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        command = [f"--train_data_dir={pictures}", f"--model_config_name_or_path={tiny_unet}"]
        config = parse_train([*command, f"--output_dir={tmp_path / 'run'}", *FLAGS, *flags])
        accelerator = make_accelerator(config.optimization.mixed_precision)
        assert accelerator.device.type == "cuda"
        return step.build_train_state(accelerator, config)

    yield build_state
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--center_crop", "--mixed_precision=bf16"),
        ("--post_hoc_ema", "--gradient_accumulation_steps=2", "--prediction_type=epsilon"),
    ],
    ids=["crops", "square in bf16", "averages and accumulation"],
)
def test_a_step_never_waits_for_the_gpu(build, flags):
    """PyTorch raises in this mode where the host would wait for the device."""
    state = build(*flags)
    state.unet.train()
    meter = LossMeter(state.accelerator)
    for number in range(2):  # the first steps make the optimizer's state and cached tensors
        meter.end_step(number + 1, step.train_step(state, number, 1e-3, meter))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 5):
            meter.end_step(number + 1, step.train_step(state, number, 1e-3, meter))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.first_bad_step() == 0 and 0 < meter.mean_loss() < 10


@pytest.mark.parametrize("center_crop", [True, False])
def test_batches_are_those_of_the_cpu(pictures, tmp_path, center_crop):
    flags = [f"--train_data_dir={pictures}", "--resolution=8", f"--cache_dir={tmp_path}"]
    flags += ["--random_flip", "--random_vertical_flip", "--random_rotate90", "--random_shift=2"]
    config = parse_train([*flags, *(["--center_crop"] if center_crop else [])]).data
    batches = []
    for device in ("cpu", "cuda"):
        images = dataset.load_images(config, False, torch.device(device))
        assert images.device.type == device
        generator = order.make_generator(0, "pixels", 0, 0)
        batches.append(images.batch(images.rows(0, 6), generator, config).images.cpu())
    assert torch.equal(*batches)


def test_resumed_run_is_the_run_that_was_not_stopped(train_tiny, tmp_path):
    straight = train_tiny(tmp_path / "straight")
    stopped = train_tiny(tmp_path / "stopped", "--max_train_steps=3", "--lr_scheduler=constant")
    constant = train_tiny(tmp_path / "constant", "--lr_scheduler=constant")
    resumed = train_tiny(stopped, "--lr_scheduler=constant")
    one, other = final_state(constant), final_state(resumed)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)
    equal = sum(torch.equal(value, other[name]) for name, value in one.items())
    print(f"resumed on a GPU: {equal} of {len(one)} tensors have the same bits")
    assert read_lines(straight)[-1]["memory_mib"] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_float32(train_tiny, tmp_path, precision):
    losses = []
    for name in ("no", precision):
        folder = train_tiny(tmp_path / name, f"--mixed_precision={name}", "--dropout=0")
        losses.append([line["loss"] for line in read_lines(folder)])
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_compiled_training_gives_the_same_losses(train_tiny, tmp_path):
    losses = []
    for mode in ("off", "on"):
        folder = train_tiny(tmp_path / mode, f"--compile={mode}", "--dropout=0")
        losses.append([line["loss"] for line in read_lines(folder)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_model_trained_on_a_gpu_draws_the_same_on_both_devices(train_tiny, script, tmp_path):
    folder = train_tiny(tmp_path / "run")
    environment = json.loads((folder / "record.json").read_text())["environment"]
    assert environment["device"] == torch.cuda.get_device_name()
    assert proof.compare_with_proof(folder, "run", "").difference <= proof.TOLERANCE
    images = []
    for device in ("cpu", "cuda"):
        flags = [f"--device={device}", "--num_images=3", "--scheduler=ddim", "--batch_size=2"]
        done = script("sample.py", folder, *flags, f"--output_dir={tmp_path / device}")
        assert done.returncode == 0, done.stderr
        paths = sorted((tmp_path / device).glob("*-0000?.png"))
        images.append(torch.stack([image_io.read_png(path) for path in paths]))
    assert len(images[0]) == 3
    assert proof.max_difference(*images) <= proof.TOLERANCE
