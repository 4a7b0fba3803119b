"""Command lines as configs: default < --config FILE < flag."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.config.base import dump, flatten, needs_flag, setting_fields
from ddpm.config.data import DataConfig
from ddpm.config.parser import (
    given_flags,
    parse_evaluate,
    parse_push,
    parse_sample,
    parse_train,
)
from ddpm.config.push import PushConfig
from ddpm.config.train import TrainConfig
from ddpm.config.values import Scheduler
from ddpm.diffusion.schedulers import SCHEDULERS
from ddpm.errors import UsageError, UserError
from tests.conftest import ROOT
from tests.hostile import CHARACTERS

DATA = ["--dataset_name", "owner/name"]


def write(path, **values) -> str:
    path.write_text(json.dumps(values))
    return str(path)


def test_no_dataset_means_the_digits():
    config = parse_train([])
    assert config.data.dataset_name == "./data/digits"
    assert config.data.resolution == 8
    assert config.diffusion.prediction_type == "v_prediction"
    assert config.output_dir == "ddpm-digits"


def test_flags_change_the_digits_recipe():
    config = parse_train(["--max_train_steps", "5", "--snr_gamma=None"])
    assert config.data.dataset_name == "./data/digits"
    assert config.optimization.max_train_steps == 5
    assert config.diffusion.snr_gamma is None


def test_digits_must_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="the digits in data/, which are not here"):
        parse_train([])


@pytest.mark.parametrize("argv", [DATA, ["--dataset-name=owner/name"]])
def test_naming_a_dataset_means_plain_defaults(argv):
    assert parse_train(argv) == TrainConfig(data=DataConfig(dataset_name="owner/name"))


def test_naming_a_folder_means_plain_defaults():
    expected = TrainConfig(data=DataConfig(train_data_dir="photos"))
    assert parse_train(["--train_data_dir", "photos"]) == expected


def test_file_beats_default_and_flag_beats_file_wherever_it_stands(tmp_path):
    file = write(tmp_path / "run.json", dataset_name="a/b", resolution=32, seed=1)
    for argv in (["--config", file, "--seed", "2"], ["--seed", "2", f"--config={file}"]):
        config = parse_train(argv)
        assert config.data.resolution == 32
        assert config.optimization.seed == 2
        assert config.optimization.learning_rate == 1e-4


def test_flag_may_complete_a_file_that_alone_cannot_work(tmp_path):
    file = write(tmp_path / "run.json", dataset_name="a/b", eval_images=16)
    with pytest.raises(UsageError, match="no effect without --eval_steps"):
        parse_train(["--config", file])
    assert parse_train(["--config", file, "--eval_steps=5"]).evaluation.eval_images == 16


def test_dataset_of_a_flag_replaces_that_of_the_file(tmp_path):
    file = write(tmp_path / "run.json", dataset_name="a/b", resolution=32)
    config = parse_train(["--config", file, "--train_data_dir=photos"])
    assert config.data == DataConfig(train_data_dir="photos", resolution=32)


def test_file_without_data_is_refused(tmp_path):
    file = write(tmp_path / "run.json", resolution=32)
    with pytest.raises(UsageError, match="--dataset_name or --train_data_dir"):
        parse_train(["--config", file])
    assert parse_train(["--config", file, *DATA]).data.resolution == 32


def test_config_file_must_exist():
    with pytest.raises(UsageError, match="--config needs the path"):
        parse_train([*DATA, "--config"])
    with pytest.raises(UsageError, match=r"--config absent\.json: there is no such file"):
        parse_train([*DATA, "--config", "absent.json"])


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("push_to_hub", True, "--push_to_hub"),
        ("hub_private_repo", True, "--hub_private_repo"),
        ("hub_checkpoints", True, "--hub_checkpoints"),
        ("hub_model_id", "you/best; rm -r x", "--hub_model_id='you/best; rm -r x'"),
        ("logger", "wandb", "--logger=wandb"),
        ("logger", ("tensorboard", "trackio"), "--logger=tensorboard,trackio"),
        ("trust_checkpoint", True, "--trust_checkpoint"),
        ("overwrite_output_dir", True, "--overwrite_output_dir"),
        ("features", "their/net.pt", "--features=their/net.pt"),
        ("resume_from_checkpoint", "hub://they/state", "--resume_from_checkpoint=hub://they/state"),
        ("resume_from_checkpoint", "../other/checkpoint-5", "--resume_from_checkpoint=../other"),
        ("dataset_name", "/home/you/photos", "--dataset_name=/home/you/photos"),
        ("dataset_name", "hf://datasets/you/private", "--dataset_name=hf://"),
        ("dataset_name", "zip://a::b.zip", "--dataset_name=zip://"),
        ("train_data_dir", "~/photos", "--train_data_dir='~/photos'"),
        ("train_data_dir", "photos/../../you", "--train_data_dir=photos/../../you"),
        ("cache_dir", "C:\\cache", "--cache_dir="),
        ("cache_dir", "\\\\server\\share", "--cache_dir="),
        ("logging_dir", "../../elsewhere", "--logging_dir=../../elsewhere"),
        ("project_name", "..\\..\\elsewhere", "--project_name="),
        ("output_dir", "/home/you/run", "--output_dir=/home/you/run"),
        ("model_config_name_or_path", "file:///etc", "--model_config_name_or_path=file:///etc"),
    ],
)
def test_a_file_does_not_set_what_needs_a_flag(tmp_path, name, value, flag):
    """A config may be somebody else's: it publishes, deletes, trusts and runs nothing, and names
    no place outside the working directory. The flag in the message makes the same file work."""
    file = write(tmp_path / "run.json", **{"train_data_dir": "photos", name: value})
    with pytest.raises(UsageError, match="type what you want of it: ") as caught:
        parse_train(["--config", file, "--eval_steps=5", "--eval_images=16"])
    typed = shlex.split(str(caught.value).partition("of it: ")[2])
    assert flag in str(caught.value) and len(typed) == 1
    if name == "dataset_name":
        assert parse_train(["--config", file, *typed]).data.dataset_name == value
    else:
        flags = [*typed, "--eval_steps=5", "--eval_images=16"]
        expected = str(Path.home() / "photos") if value == "~/photos" else value
        assert flatten(parse_train(["--config", file, *flags]))[name] == expected


def test_relative_places_and_defaults_of_a_file_are_used(tmp_path):
    values = {**flatten(TrainConfig()), "dataset_name": "./data/digits", "output_dir": "runs/a..b"}
    values |= {"cache_dir": "cache", "logging_dir": "logs/tb", "logger": "tensorboard"}
    values |= {"resume_from_checkpoint": "checkpoint-5", "model_config_name_or_path": "unet/8"}
    file = write(tmp_path / "run.json", **values)
    assert flatten(parse_train(["--config", file])) == values


FRAGMENTS = [
    "..",
    "~",
    "/",
    "\\",
    ":",
    "hub://",
    "a",
    "=",
    "None",
    "--seed",
    "1:1,",
    "9" * 300,
    "\0",
]
VALUES = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(CHARACTERS, max_size=9),
    st.lists(st.sampled_from(FRAGMENTS), max_size=4).map("".join),
    st.sampled_from([10**400, [[]], {"a": 1}, "wandb", "on", "cosine", "1h", "red", "0,1", 1, 2.0]),
)


ANY_SETTINGS = given(
    st.dictionaries(st.sampled_from(sorted(setting_fields(TrainConfig))), VALUES, max_size=3)
)
FEW = settings(derandomize=True, deadline=None, database=None, max_examples=15)


def require_config_or_sentence(values: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder) / "run.json", **{"dataset_name": "a/b", **values})
        try:
            config = flatten(parse_train(["--config", file]))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 5000
        else:
            assert not [n for n, value in config.items() if needs_flag(TrainConfig, n, value)]


@FEW
@ANY_SETTINGS
def test_any_file_is_a_config_without_powers_or_one_sentence(values):
    require_config_or_sentence(values)


@pytest.mark.slow
@settings(FEW, max_examples=500)
@ANY_SETTINGS
def test_many_files_are_configs_without_powers_or_one_sentence(values):
    require_config_or_sentence(values)


@pytest.mark.parametrize("parse", [parse_train, parse_evaluate, parse_sample, parse_push])
@pytest.mark.parametrize(
    "argv",
    [
        ["--hub_token", "secret"],
        ["--hub-token=secret"],
        ["--token=secret"],
        ["--config", "hf_" + "a1B2" * 8],
        ["--num_images", "hf_" + "a1B2" * 8],
        ["you/model", f"--commit_message=my hf_{'a1B2' * 8}"],
    ],
    ids=str,
)
def test_a_token_on_a_command_line_is_refused_and_not_repeated(parse, argv, capsys):
    with pytest.raises(UsageError, match="hf auth login. or set HF_TOKEN") as caught:
        parse(["model", *argv] if parse is not parse_train else argv)
    output = capsys.readouterr()
    for secret in ("secret", "a1B2"):
        assert secret not in f"{caught.value}{output.out}{output.err}"


def test_the_launcher_of_a_command_line_with_a_token_ends_without_printing_it(tmp_path):
    """`accelerate launch` prints the command line of a script that fails, in its own traceback."""
    token = "hf_" + "a1B2" * 8
    script = "import sys; from ddpm.config.parser import parse_train; parse_train(sys.argv[1:])"
    (tmp_path / "train.py").write_text(script)
    launcher = (
        "import os, subprocess, sys\n"
        "os.environ['ACCELERATE_MIXED_PRECISION'] = 'no'\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], check=True)\n"
    )
    command = [sys.executable, "-c", launcher, tmp_path / "train.py", "--hub_token", token]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGTERM
    assert "set HF_TOKEN" in done.stderr and token not in done.stdout + done.stderr


def test_underscore_and_dash_are_the_same():
    underscores = ["--train_batch_size", "3", "--no_use_ema", "--random_flip"]
    dashes = [word.replace("_", "-") for word in underscores]
    assert parse_train([*DATA, *underscores]) == parse_train([*DATA, *dashes])


@pytest.mark.parametrize("name", ["use_ema", "random_flip"])
def test_booleans_go_both_ways(name, tmp_path):
    for value, prefix, opposite in ((True, "--", "--no_"), (False, "--no_", "--")):
        assert flatten(parse_train([*DATA, prefix + name]))[name] is value
        file = write(tmp_path / "run.json", **{name: value})
        assert flatten(parse_train([*DATA, "--config", file]))[name] is value
        assert flatten(parse_train([*DATA, "--config", file, opposite + name]))[name] is not value


@pytest.mark.parametrize("argv", [[], ["--train_data_dir", "x"]])
def test_dump_of_a_parsed_config_parses_to_the_same(argv, tmp_path):
    config = parse_train(argv)
    (tmp_path / "train_config.json").write_text(dump(config))
    assert parse_train(["--config", str(tmp_path / "train_config.json")]) == config


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--resolutoin", "64"], "--resolution"),
        (["--ddpm_beta_schedule", "sigmoid"], "squaredcos_cap_v2"),
        (["--channels", "2"], "channels"),
        (["stray"], "stray"),
    ],
)
def test_flags_that_cannot_be_parsed_are_refused_with_those_that_can(flags, named, capsys):
    with pytest.raises(SystemExit) as end:
        parse_train([*DATA, *flags])
    assert end.value.code == 2
    output = capsys.readouterr()
    assert named in " ".join((output.err + output.out).replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "resolution"), [("48", 48), ("48,80", (48, 80)), ("80,48", (80, 48)), ("48,48", 48)]
)
def test_resolution_is_the_side_of_a_square_or_height_and_width(text, resolution, tmp_path):
    for argv in (["--resolution", text], [f"--resolution={text}"]):
        config = parse_train([*DATA, *argv])
        assert config.data.resolution == resolution
    path = tmp_path / "train_config.json"
    path.write_text(dump(config))
    assert json.loads(path.read_text())["resolution"] == json.loads(json.dumps(resolution))
    assert TrainConfig.from_json(path) == config == parse_train(["--config", str(path)])
    assert parse_evaluate(["run", f"--resolution={text}"]).data.resolution == resolution


@pytest.mark.parametrize(
    "text",
    ["48x80", "48,", ",80", "48,80,3", "48.0", "48,80.5", "48, 80", "sixty", "", "-8,8", "８"],
)
def test_resolution_has_one_spelling(text):
    with pytest.raises(UsageError, match=f"^--resolution {text!r} is no size. Give pixels: 64 for"):
        parse_train([*DATA, f"--resolution={text}"])


def test_checks_of_the_settings_are_errors_of_the_command_line():
    with pytest.raises(UsageError, match="--resolution is 0; it must be at least 1"):
        parse_train([*DATA, "--resolution=0"])
    with pytest.raises(UsageError, match="--tag 'v 1' is no name"):
        parse_push(["run", "--tag=v 1"])
    with pytest.raises(UsageError, match="Name a MODEL"):
        parse_sample([])
    with pytest.raises(UsageError, match="--export_best has no effect"):
        parse_evaluate(["run", "--export_best"])


def test_words_may_stand_before_and_after_flags():
    expected = PushConfig(output_dir="run", repo_id="you/name", private=True)
    assert parse_push(["run", "you/name", "--private"]) == expected
    assert parse_push(["--private", "run", "you/name"]) == expected


def test_a_word_too_many_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        parse_sample(["model", "another"])
    assert end.value.code == 2
    assert "another" in capsys.readouterr().err


def test_schedulers_of_the_command_line_are_those_of_the_table():
    assert get_args(Scheduler) == tuple(SCHEDULERS)
    assert parse_sample(["m", "--scheduler", "unipc"]).scheduler == "unipc"
    with pytest.raises(SystemExit):
        parse_sample(["m", "--scheduler", "lms"])


def test_samplers_are_a_list_that_may_be_empty():
    assert parse_evaluate(["run", "--samplers"]).samplers == ()
    assert parse_evaluate(["run", "--samplers", "ddim:10", "ddpm"]).samplers == ("ddim:10", "ddpm")
    assert parse_evaluate(["run"]).samplers is None


def test_given_flags_are_named_as_their_fields():
    argv = ["model", "--num-images=3", "--seed", "-1", "--no_use_ema", "--dtype", "split"]
    assert given_flags(argv) == {"num_images", "seed", "use_ema", "dtype"}


@pytest.mark.parametrize(
    ("parse", "flags"),
    [
        (parse_train, ["--dataset_name="]),
        (parse_train, ["--output_dir", ""]),
        (parse_train, ["--pretrained_model_name_or_path="]),
        (parse_sample, ["model", "--mask=", "--image=a.png"]),
        (parse_evaluate, ["run", "--features="]),
        (parse_push, ["", "you/name"]),
    ],
)
def test_an_empty_value_is_refused(parse, flags):
    """What an unset variable of a shell gives; pathlib takes it for the working directory."""
    with pytest.raises(UsageError, match="is empty: give a value, or leave it out"):
        parse(flags)
    assert parse_sample(["model", "--prompt="]).prompt == ""


def test_home_is_expanded_in_paths_and_in_nothing_else(tmp_path, monkeypatch):
    """Shells expand ~ in `--output_dir ~/run` but not in `--output_dir=~/run`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "run.json", resolution=32)
    places = ("train_data_dir", "output_dir", "cache_dir", "model_config_name_or_path")
    flags = [f"--{name}=~/{name}" for name in places]
    config = parse_train(["--config=~/run.json", "--resume_from_checkpoint", "~/a", *flags])
    settings = flatten(config)
    assert {name: settings[name] for name in places} == {n: f"{tmp_path}/{n}" for n in places}
    assert config.data.resolution == 32
    assert config.checkpoint.resume_from_checkpoint == f"{tmp_path}/a"
    evaluation = parse_evaluate(["~/run", "--features=~/net.pt", "--dataset_name=~/data"])
    assert evaluation.model == f"{tmp_path}/run" and evaluation.features == f"{tmp_path}/net.pt"
    assert evaluation.data.dataset_name == f"{tmp_path}/data"
    sampling = parse_sample(["~/run", "--prompt=~/ is home", "--image=~/a.png", "--output_dir=~"])
    assert sampling.model == f"{tmp_path}/run" and sampling.prompt == "~/ is home"
    assert (sampling.image, sampling.output_dir) == (f"{tmp_path}/a.png", str(tmp_path))
    push = parse_push(["~/run", "--commit_message=~/ is home"])
    assert push.output_dir == f"{tmp_path}/run" and push.commit_message == "~/ is home"
