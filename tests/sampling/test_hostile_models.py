"""Model folders of strangers: whatever their JSON says ends in one sentence or in an image."""

import inspect
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.utils import DummyObject
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from ddpm import run_folder
from ddpm.diffusion import schedulers
from ddpm.diffusion.unet import LIMITS, SETTINGS, empty_unet, parse_unet_config
from ddpm.errors import UserError
from ddpm.file_io import read_json
from ddpm.sampling import generate, image_io, pipeline, pipeline_folder, proof, unet_files
from tests.hostile import CHARACTERS, CONTENTS, FAST, JSON, NUMBERS, SCALARS, SLOW, watched

FILES = {
    name: name
    for name in (run_folder.MODEL_INDEX, run_folder.UNET_CONFIG, run_folder.SCHEDULER_CONFIG)
}
INDEX, UNET, SCHEDULER = FILES
SCHEDULER_SETTINGS = sorted(schedulers._setting_hints(schedulers.DDPMScheduler))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A pipeline of 8x8 gray images: not to be changed."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("hostile") / "model"
    scheduler = schedulers.DDPMScheduler(num_train_timesteps=20)
    pipeline.export_pipeline(tiny.make_unet(), scheduler, folder)
    proof.write_proof(folder, tiny.make_unet(), scheduler)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def draw(folder: Path, names: Iterable[str] = ("ddim", "dpmsolver-sde")) -> None:
    """Load the model and draw an image with each scheduler in two steps."""
    model = pipeline.load_model(str(folder))
    for name in names:
        draw_image(model, name)


def draw_with_each(folder: Path) -> None:
    """Draw with one scheduler after the other: an error of one hides none of the next."""
    model = pipeline.load_model(str(folder))
    for name in schedulers.SCHEDULERS:
        with suppress(UserError):
            draw_image(model, name)


def draw_image(model: pipeline.DiffusionModel, name: str) -> None:
    scheduler = schedulers.build_sampling_scheduler(name, model.scheduler_config, 2)
    list(generate.generate_images(model.unet, scheduler, [0], 1))


def edit(path: Path, changes: dict) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# A table of hostile inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": []}, r"sample_size is \[\]; it must be a whole number or a list of 2 or"),
        ({"sample_size": [8, 8, 8]}, "sample_size is"),
        ({"sample_size": -8}, "sample_size is -8; it must be from 1 to"),
        ({"sample_size": 0}, "sample_size is 0; it must be from 1"),
        ({"sample_size": "8"}, "sample_size is '8'"),
        ({"sample_size": 1e18}, "sample_size is 1e\\+18"),
        ({"sample_size": 10**18}, "sample_size is 1000000000000000000; it must be from"),
        ({"sample_size": 9}, "sample_size is not a multiple of 2"),
        ({"sample_size": 2**14, "block_out_channels": [2**12, 2**12]}, "GiB, and this machine has"),
        ({"block_out_channels": [2**14, 2**14]}, "parameters and an image of 8x8 take about"),
        ({"norm_num_groups": 0}, "norm_num_groups is 0"),
        ({"norm_num_groups": 7}, "config makes no model"),
        ({"norm_num_groups": None}, "config makes no model"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0"),
        ({"attention_head_dim": 64}, "attention_head_dim is larger than a level has channels"),
        ({"act_fn": None}, "act_fn is None; it must be a text"),
        ({"act_fn": "no"}, "config makes no model"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000; it must be from 1 to 16"),
        ({"time_embedding_type": "other"}, "time_embedding_type is 'other'; it must be one of"),
        ({"time_embedding_type": "learned"}, "config makes no model"),
        ({"block_out_channels": [8, 16, 32]}, "config makes no model"),
        ({"block_out_channels": [8] * 13}, "more than 12 levels"),
        ({"block_out_channels": 8}, "block_out_channels is 8; it must be a list"),
        (
            {"down_block_types": ["KDownBlock2D", "DownBlock2D"]},
            "is 'KDownBlock2D'; it must be one",
        ),
        ({"mid_block_type": "Other"}, "mid_block_type is 'Other'"),
        ({"downsample_type": "other"}, "downsample_type is 'other'"),
        ({"in_channels": 3}, "turns 3 channels into 1"),
        ({"dropout": math.nan}, "dropout is nan"),
        ({"layers_per_block": 2}, "cannot be loaded"),
    ],
)
def test_unet_config_is_refused(folder, changes, message):
    edit(folder / UNET, changes)
    with watched(folder), pytest.raises(UserError, match=message):
        draw(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_timesteps": None}, "num_train_timesteps is None; it must be a whole number"),
        ({"num_train_timesteps": "20"}, "num_train_timesteps is '20'"),
        ({"num_train_timesteps": math.inf}, "num_train_timesteps is inf"),
        ({"num_train_timesteps": 10**10}, "num_train_timesteps is 10000000000; it must be from 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"trained_betas": [math.nan] * 20}, "trained_betas is \\[nan, .* must be a list or null"),
        ({"trained_betas": [0.1] * 3}, "trained_betas must have one number for each timestep"),
        ({"trained_betas": [2.0] * 20}, "trained_betas is 2.0; it must be from 0 to 1"),
        ({"beta_start": "0"}, "beta_start is '0'"),
        ({"beta_schedule": "other"}, "does not support the noise schedule of this model .other is"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"prediction_type": []}, "prediction_type is \\[\\]"),
        ({"clip_sample_range": "1"}, "clip_sample_range is '1'"),
        ({"_class_name": "UNet2DModel"}, "'UNet2DModel' is no scheduler of diffusers"),
        ({"_class_name": "os.system"}, "'os.system' is no scheduler of diffusers"),
        ({"_class_name": ["x"]}, "is no scheduler of diffusers"),
        ({"use_karras_sigmas": "yes"}, "use_karras_sigmas is 'yes'; it must be true or false"),
        ({"use_beta_sigmas": None}, "dpmsolver-sde does not support the noise schedule"),
        ({"solver_order": 10**6}, "solver_order is 1000000; it must be from 1 to 3"),
    ],
)
def test_scheduler_config_is_refused(folder, changes, message):
    edit(folder / SCHEDULER, changes)
    with watched(folder), pytest.raises(UserError, match=message):
        draw(folder)


def test_learned_variance_is_refused_where_the_model_has_none(folder):
    edit(folder / SCHEDULER, {"variance_type": "learned"})
    draw(folder)
    with pytest.raises(UserError, match="--scheduler ddpm cannot take 2 steps with this model"):
        draw(folder, ["ddpm"])


def signature(kind: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class without `self`."""
    return dict(list(inspect.signature(kind.__init__).parameters.items())[1:])


def public_schedulers() -> list[type]:
    """Return the schedulers of diffusers whose settings all have a default."""
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    return [
        kind
        for kind in classes
        if not isinstance(kind, DummyObject)
        and issubclass(kind, diffusers.SchedulerMixin)
        and not [
            parameter
            for parameter in signature(kind).values()
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        ]
    ]


def test_config_of_every_scheduler_of_diffusers_is_read(tmp_path):
    """As diffusers writes it: with null, and with the -Infinity that JSON does not have."""
    classes = public_schedulers()
    assert len(classes) > 20
    for kind in classes:
        few = {"num_train_timesteps": 20} if "num_train_timesteps" in signature(kind) else {}
        scheduler = kind(**few)
        if scheduler.config.get("prediction_type") in ("flow_prediction", "trigflow"):
            continue  # of flow matching
        scheduler.save_pretrained(tmp_path)
        path = tmp_path / Path(SCHEDULER).name
        settings = schedulers.parse_scheduler_config(read_json(path), kind.__name__)
        assert settings["_class_name"] == kind.__name__
        kept = {name: value for name, value in scheduler.config.items() if name in settings}
        assert len(kept) >= len(scheduler._get_init_keys(kind)) - 2, kind


def test_scheduler_that_needs_a_missing_package_is_read(monkeypatch):
    class DPMSolverSDEScheduler(metaclass=DummyObject):
        _backends = ["torch", "torchsde"]

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", DPMSolverSDEScheduler, raising=False)
    config = {"_class_name": "DPMSolverSDEScheduler", "beta_end": 0.01, "noise_sampler_seed": 1}
    settings = schedulers.parse_scheduler_config(config, "x")
    assert settings == {"_class_name": "DPMSolverSDEScheduler", "beta_end": 0.01}


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (SCHEDULER, {"_class_name": "UniPCMultistepScheduler", "solver_p": None}),
        (SCHEDULER, {"beta_schedule": "sigmoid"}),
        (SCHEDULER, {"variance_type": "fixed_large", "tensor_format": "pt", "timesteps": 20}),
        (UNET, {"down_block_types": ["UNetResDownBlock2D"] * 2}),
        (UNET, {"attention_head_dim": None, "mid_block_scale_factor": 2**0.5, "freq_shift": 1}),
        (UNET, {"sample_size": [8, 16], "resnet_eps": 1e-6, "_name_or_path": "/home/you/x"}),
    ],
    ids=str,
)
def test_unusual_settings_of_published_models_are_read(folder, file, changes):
    edit(folder / file, changes)
    if changes == {"beta_schedule": "sigmoid"}:
        draw(folder, ["ddpm"])
    else:
        draw(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, '"someone/other"', "must be a JSON object"),
        (UNET, '"someone/other"', "must be a JSON object"),
        (SCHEDULER, '"someone/other"', "must be a JSON object"),
        (UNET, "[" * 100_000, "cannot be read as JSON"),
        (UNET, '{"a": ' * 40 + "1" + "}" * 40, "more than 32 nested lists and objects"),
        (UNET, '{"a": "\\ud800"}', "cannot be read as JSON"),
        (INDEX, '{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        (SCHEDULER, '{"a": "' + "x" * 2**22 + '"}', "bytes are more than the limit of 4,194,304"),
    ],
)
def test_json_must_be_a_small_object(folder, name, content, message):
    """A text in the place of a UNet's config is another repository's name to diffusers."""
    (folder / name).write_text(content)
    with watched(folder), pytest.raises(UserError, match=message):
        draw(folder)
    with watched(folder), pytest.raises(UserError, match=message):
        proof.verify_model(str(folder))


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo])
def test_files_that_are_no_regular_files_are_not_opened(folder, make):
    (folder / UNET).unlink()
    make(folder / UNET)
    with watched(folder), pytest.raises(UserError, match="it is no file"):
        draw(folder)


@pytest.mark.parametrize("name", ["../other", ".."])
def test_component_that_is_no_name_of_a_folder_is_refused(folder, name):
    edit(folder / INDEX, {name: ["diffusers", "AutoencoderKL"]})
    with watched(folder), pytest.raises(UserError, match="wants code of its own"):
        draw(folder)


@pytest.mark.parametrize("library", ["__path__", "sys", "TYPE_CHECKING"])
def test_library_that_is_no_module_of_diffusers_is_refused(folder, library):
    edit(folder / INDEX, {"vae": [library, "system"]})
    with watched(folder), pytest.raises(UserError, match="wants code of its own"):
        draw(folder)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": "/x.safetensors"}}, "is no name of"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a--b.C", None]}}, "wants code"),
    ],
)
def test_json_of_a_component_that_leads_elsewhere_is_refused(folder, file, value, message):
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / file).write_text(json.dumps(value))
    edit(folder / INDEX, {"tokenizer": ["transformers", "AutoTokenizer"]})
    with watched(folder), pytest.raises(UserError, match=message):
        pipeline_folder.find_pipeline(str(folder))


# Weights


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_no_numbers_are_refused_everywhere(folder, value, make_unet, chain):
    """At load, where push.py and --verify compare, and at the export."""
    weights = load_file(folder / run_folder.UNET_WEIGHTS)
    weights["conv_out.weight"].view(-1)[3] = value
    save_file(weights, folder / run_folder.UNET_WEIGHTS)
    for read in (pipeline.load_model, proof.verify_model):
        with pytest.raises(UserError, match="weights that are not finite numbers"):
            read(str(folder))
    unet = make_unet()
    unet.load_state_dict(weights)
    before = (folder / run_folder.UNET_WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="weights that are not finite numbers"):
        pipeline.export_pipeline(unet, chain, folder)
    assert (folder / run_folder.UNET_WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_weights_of_any_type_become_float32(folder, dtype):
    weights = {k: v.to(dtype) for k, v in load_file(folder / run_folder.UNET_WEIGHTS).items()}
    save_file(weights, folder / run_folder.UNET_WEIGHTS)
    unet = pipeline.load_model(str(folder)).unet
    assert {value.dtype for value in unet.state_dict().values()} == {torch.float32}


def test_large_weights_are_numbers(make_unet):
    """Their sum is not finite."""
    unet = make_unet()
    unet.conv_out.weight.data.fill_(3e38)
    unet_files.require_finite(unet, "x")


def test_weights_in_shards_are_loaded_from_their_folder_only(folder, make_unet):
    unet = make_unet()
    (folder / run_folder.UNET_WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    index = folder / f"{run_folder.UNET_WEIGHTS}.index.json"
    loaded = pipeline.load_model(str(folder)).unet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in unet.state_dict().items())
    names = json.loads(index.read_text())["weight_map"]
    edit(index, {"weight_map": {**names, "conv_in.weight": "../other.safetensors"}})
    with watched(folder), pytest.raises(UserError, match="is no name of a safetensors file next"):
        pipeline.load_model(str(folder))


def test_attention_of_the_first_diffusers_is_loaded(tmp_path, chain):
    """Its layers had other names: query, key, value and proj_attn."""
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(
        {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": [8, 16],
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        }
    )
    pipeline.export_pipeline(unet, chain, tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in load_file(tmp_path / run_folder.UNET_WEIGHTS).items():
        for new, previous in names.items():
            name = name.replace(f".{new}.", f".{previous}.")
        old[name] = value
    assert any("proj_attn" in name for name in old)
    save_file(old, tmp_path / run_folder.UNET_WEIGHTS)
    loaded = pipeline.load_model(str(tmp_path)).unet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in unet.state_dict().items())


# Settings


def test_every_number_of_a_unet_has_limits():
    """A setting that diffusers adds must be thought about."""
    numeric = {
        name for name, hint in SETTINGS.items() if "int" in str(hint) or "float" in str(hint)
    }
    assert numeric <= LIMITS.keys() | {"return"}


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), marks=pytest.mark.slow),
        pytest.param(("SkipDownBlock2D", "SkipUpBlock2D"), marks=pytest.mark.slow),
        ("AttnSkipDownBlock2D", "AttnSkipUpBlock2D"),
    ],
)
def test_unets_with_other_blocks_are_made(blocks):
    down, up = blocks
    config = {"sample_size": 16, "block_out_channels": [32, 64], "norm_num_groups": 4}
    config |= {"down_block_types": [down] * 2, "up_block_types": [up] * 2, "add_attention": False}
    assert empty_unet(parse_unet_config(config, "x"), "x").num_parameters() > 0
    config["up_block_types"] = ["SkipUpBlock2D", "UpBlock2D"]
    config["down_block_types"] = ["DownBlock2D", "DownBlock2D"]
    with pytest.raises(UserError, match="its blocks do not fit each other"):
        empty_unet(parse_unet_config(config, "x"), "x")


# PNG files


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 8, height: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(9) * 8))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


TEXT_BOMB = chunk(b"zTXt", b"model\0\0" + zlib.compress(bytes(2**23)))
LAST_TEXT_BOMB = chunk(b"iTXt", b"model\0\1\0\0\0" + zlib.compress(bytes(2**23)))


@pytest.mark.parametrize(
    "content",
    [
        png(TEXT_BOMB),
        png(LAST_TEXT_BOMB),
        png(width=2**31 - 1, height=2**31 - 1),
        png(width=12_000, height=12_000),
        png(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
        b"",
        png()[:-30],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"P5 8 8 255\n" + bytes(64),
    ],
    ids=["text", "itext", "size", "size-warning", "frames", "empty", "cut", "eps", "pgm"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_png_of_a_stranger_is_refused(tmp_path, content):
    """As --like, in the output folder, and as an image of a proof."""
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with watched(tmp_path):
        assert image_io.read_png_text(path) == {}
    with watched(tmp_path), pytest.raises(UserError, match="cannot be read as a PNG"):
        image_io.read_png(path)


def test_png_of_a_stranger_in_a_proof_is_refused(folder):
    (folder / proof.proof_image_name(0)).write_bytes(png(TEXT_BOMB))
    with watched(folder), pytest.raises(UserError, match="cannot be read as a PNG"):
        proof.verify_model(str(folder))


def test_png_of_another_mode_is_refused(tmp_path):
    Image.new("LA", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="is a PNG of mode LA"):
        image_io.read_png(tmp_path / "a.png")


def test_ordinary_text_is_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("model", "x" * 1000, zip=True)
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert image_io.read_png_text(tmp_path / "a.png") == {"model": "x" * 1000}


def test_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path):
    (tmp_path / ".a.png.partial").symlink_to(tmp_path / "outside")
    image_io.save_png(torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / "a.png", {})
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "a.png").is_symlink()


# Fuzz

UNET_CHANGES = st.dictionaries(
    st.sampled_from(sorted(SETTINGS)),
    st.one_of(
        JSON, NUMBERS, st.lists(NUMBERS, max_size=3), st.lists(SCALARS, min_size=2, max_size=2)
    ),
    min_size=1,
    max_size=3,
)
SCHEDULER_CHANGES = st.dictionaries(
    st.sampled_from(["_class_name", *SCHEDULER_SETTINGS]),
    st.one_of(JSON, NUMBERS, st.sampled_from(sorted(vars(schedulers.diffusers.schedulers)))),
    min_size=1,
    max_size=3,
)
INDEX_CHANGES = st.dictionaries(
    st.sampled_from(["_class_name", "unet", "scheduler", "vae", "_diffusers_version"])
    | st.text(CHARACTERS),
    st.one_of(JSON, st.tuples(SCALARS, SCALARS).map(list)),
    min_size=1,
    max_size=3,
)
CHANGES = st.one_of(
    st.tuples(st.just(UNET), UNET_CHANGES),
    st.tuples(st.just(SCHEDULER), SCHEDULER_CHANGES),
    st.tuples(st.just(INDEX), INDEX_CHANGES),
    st.tuples(st.sampled_from(list(FILES)), CONTENTS),
)


def check(
    read: Callable[[Path], object],
    original: Path,
    folder: Path,
    change: tuple[str, dict | bytes],
) -> None:
    name, content = change
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        (folder / name).write_text(
            json.dumps({**json.loads((original / name).read_text()), **content})
        )
    try:
        with watched(folder):
            read(folder)
    finally:
        shutil.copyfile(original / name, folder / name)


@settings(FAST, max_examples=10)
@given(change=CHANGES)
def test_any_model_is_drawn_or_refused(original, folder, change):
    check(draw, original, folder, change)


@pytest.mark.slow
@pytest.mark.parametrize("read", [draw, lambda folder: proof.verify_model(str(folder))])
@SLOW
@given(change=CHANGES)
def test_many_models_are_drawn_or_refused(read, original, folder, change):
    check(read, original, folder, change)


@pytest.mark.slow
@settings(FAST, max_examples=200)
@given(change=st.tuples(st.just(SCHEDULER), SCHEDULER_CHANGES))
def test_many_schedulers_draw_or_are_refused(original, folder, change):
    check(draw_with_each, original, folder, change)
