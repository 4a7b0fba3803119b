"""Flags and JSON as one object: default < --config FILE < flag."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from ddpm.config import train
from ddpm.config.base import dump, flatten
from ddpm.config.commands import PushConfig
from ddpm.config.parser import parse_evaluate, parse_push, parse_sample, parse_train
from ddpm.config.train import TrainConfig
from ddpm.errors import UsageError, UserError

DATA = ["--dataset_name", "owner/name"]


def write(path: Path, **values) -> str:
    path.write_text(json.dumps(values))
    return str(path)


def refused(capsys, argv) -> str:
    """What tyro says about a command line that it refuses, on one line."""
    with pytest.raises(SystemExit) as end:
        parse_train(argv)
    assert end.value.code == 2
    said = capsys.readouterr()
    return " ".join((said.err + said.out).replace("│", " ").split())


# Where values come from


def test_no_data_named_means_the_digits():
    parsed = parse_train([])
    assert parsed.data.dataset_name == "./data/digits"
    assert parsed.data.resolution == 8
    assert parsed.diffusion.prediction_type == "v_prediction"
    assert parsed.output_dir == "ddpm-digits"


def test_flags_change_the_digits_recipe():
    parsed = parse_train(["--max_train_steps", "5", "--snr_gamma=None"])
    assert parsed.data.dataset_name == "./data/digits"
    assert parsed.optimization.max_train_steps == 5
    assert parsed.diffusion.snr_gamma is None


@pytest.mark.parametrize(
    "argv",
    [
        ["--dataset_name", "owner/name"],
        ["--dataset-name", "owner/name"],
        ["--dataset_name=owner/name"],
        ["--dataset-name=owner/name"],
    ],
)
def test_naming_a_dataset_means_plain_defaults(argv):
    expected = TrainConfig(data=train.DataConfig(dataset_name="owner/name"))
    assert parse_train(argv) == expected


def test_naming_a_folder_means_plain_defaults():
    expected = TrainConfig(data=train.DataConfig(train_data_dir="photos"))
    assert parse_train(["--train_data_dir", "photos"]) == expected


def test_file_beats_default_and_flag_beats_file_wherever_it_stands(tmp_path):
    file = write(tmp_path / "run.json", dataset_name="a/b", resolution=32, seed=1)
    for argv in (["--config", file, "--seed", "2"], ["--seed", "2", f"--config={file}"]):
        parsed = parse_train(argv)
        assert parsed.data.resolution == 32
        assert parsed.optimization.seed == 2
        assert parsed.optimization.learning_rate == 1e-4


def test_file_without_data_is_refused(tmp_path):
    file = write(tmp_path / "run.json", resolution=32)
    with pytest.raises(UsageError, match="--dataset_name or --train_data_dir"):
        parse_train(["--config", file])
    assert parse_train(["--config", file, *DATA]).data.resolution == 32


def test_underscore_and_dash_are_the_same():
    under = ["--train_batch_size", "3", "--no_use_ema", "--random_flip"]
    dash = [word.replace("_", "-") for word in under]
    assert parse_train([*DATA, *under]) == parse_train([*DATA, *dash])


def test_ema_lengths_are_numbers_in_their_range():
    parsed = parse_evaluate(["run", "--ema_lengths=0.10,0.02,0.1"])
    assert parsed.sigma_rels == (0.02, 0.10)
    assert parse_evaluate(["run"]).sigma_rels == ()
    for wrong in ("0", "-0.1", "0.3", "nan", "", "0.05,", "a", "inf"):
        with pytest.raises(UsageError, match="give numbers above 0, to 0.28"):
            parse_evaluate(["run", f"--ema_lengths={wrong}"])
    with pytest.raises(UsageError, match="--export_best has no effect without --ema_lengths"):
        parse_evaluate(["run", "--export_best"])


@pytest.mark.parametrize("name", ["use_ema", "center_crop", "random_flip", "overwrite_output_dir"])
def test_booleans_go_both_ways(name, tmp_path):
    for value in (True, False):
        flag = f"--{name}" if value else f"--no_{name}"
        assert flatten(parse_train([*DATA, flag]))[name] is value
        file = write(tmp_path / "run.json", **{name: value})
        assert flatten(parse_train([*DATA, "--config", file]))[name] is value
        opposite = f"--no_{name}" if value else f"--{name}"
        parsed = parse_train([*DATA, "--config", file, opposite])
        assert flatten(parsed)[name] is not value


def test_flags_of_diffusers_example_are_understood():
    """A command line of its documentation."""
    command = """--dataset_name=huggan/flowers-102-categories --resolution=64 --center_crop
    --random_flip --output_dir=ddpm-ema-flowers-64 --train_batch_size=16 --num_epochs=100
    --gradient_accumulation_steps=1 --use_ema --learning_rate=1e-4 --lr_warmup_steps=500
    --mixed_precision=no"""
    parsed = parse_train(command.split())
    assert parsed.data.center_crop
    assert parsed.optimization.mixed_precision == "no"


# JSON and back


def other_value(field: dataclasses.Field):
    """Some valid value that is not the default."""
    special = {
        "ddpm_beta_schedule": "scaled_linear",
        "prediction_type": "sample",
        "lr_scheduler": "piecewise_constant",
        "mixed_precision": "bf16",
        "compile": "off",
        "logger": "wandb",
        "train_data_dir": None,
        "resize_mode": "stretch",
        "center_crop": False,  # cuts nothing when stretching, and is refused then
        "channels": 3,
        "rows_per_epoch": 7,
        "max_bad_images": 0.25,
        "background": "#102030",
        "value_range": "-1,0.5",
        "held_out": 0.0,  # of a stream, which knows no rows, none can be chosen
        "snr_gamma": 5.0,
        "max_train_steps": 7,
        "budget": "1h30m",
        "lr_step_rules": "1:10,0.5",
        "checkpoints_total_limit": 3,
        "ddpm_num_steps": 77,
        "dropout": 0.1,
        "ema_max_decay": 0.5,
    }
    if field.name in special:
        return special[field.name]
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, (int, float)):
        return field.default * 2 + 1
    return "a value, with = and 'quotes' and ünïcode --seed"


def test_resolved_config_is_read_back_as_the_same_object(tmp_path):
    """Every field away from its default, through dump, file and parse."""
    sections = {}
    for section in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(section.type):
            values = {item.name: other_value(item) for item in dataclasses.fields(section.type)}
            legal = {"adam_beta1": 0.5, "adam_beta2": 0.5, "eval_images": 16}
            values |= {name: value for name, value in legal.items() if name in values}
            sections[section.name] = section.type(**values)
    original = TrainConfig(output_dir="some where", overwrite_output_dir=True, **sections)
    (tmp_path / "train_config.json").write_text(dump(original))
    assert parse_train(["--config", str(tmp_path / "train_config.json")]) == original


@pytest.mark.parametrize("argv", [[], DATA, ["--train_data_dir", "x"]])
def test_dump_of_what_was_parsed_parses_the_same(argv, tmp_path):
    original = parse_train(argv)
    (tmp_path / "train_config.json").write_text(dump(original))
    assert parse_train(["--config", str(tmp_path / "train_config.json")]) == original


def test_flat_names_are_unique():
    names = [item.name for item in dataclasses.fields(TrainConfig)]
    for section in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(section.type):
            names.remove(section.name)
            inner = [item.name for item in dataclasses.fields(section.type)]
            names += inner
    assert len(set(names)) == len(names)
    assert names != []
    assert set(flatten(TrainConfig())) == set(names)


def test_every_knob_has_its_sentence():
    """The docstring under a field is its --help: none is missing."""
    tree = ast.parse(Path(train.__file__).read_text(encoding="utf-8"))
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(kind.body, [*kind.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "Config" not in ast.unparse(field.annotation):
                assert isinstance(after, ast.Expr), field.target.id


def test_config_cannot_be_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().output_dir = "elsewhere"


# What is refused


def test_unknown_key_has_a_suggestion(tmp_path):
    file = write(tmp_path / "run.json", learning_rat=1e-3)
    with pytest.raises(UsageError, match="'learning_rat', which is no setting. Did you mean learn"):
        parse_train([*DATA, "--config", file])


def test_unknown_key_unlike_any_points_to_help(tmp_path):
    file = write(tmp_path / "run.json", zzzz=1)
    with pytest.raises(UsageError, match="'zzzz', which is no setting. train.py --help lists them"):
        parse_train([*DATA, "--config", file])


@pytest.mark.parametrize("value", [[1], {"a": 1}])
def test_nested_values_are_refused(tmp_path, value):
    file = write(tmp_path / "run.json", resolution=value)
    with pytest.raises(UsageError, match="resolution is .*; it must be a whole number"):
        parse_train([*DATA, "--config", file])


def test_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("[1, 2]")
    with pytest.raises(UsageError, match=r"run\.json must hold one JSON object of settings"):
        parse_train([*DATA, "--config", str(tmp_path / "run.json")])
    (tmp_path / "run.json").write_text("resolution: 64")
    with pytest.raises(UserError, match=r"run\.json cannot be read as JSON"):
        parse_train([*DATA, "--config", str(tmp_path / "run.json")])


def test_config_file_must_be_there():
    with pytest.raises(UsageError, match="--config needs the path"):
        parse_train([*DATA, "--config"])
    with pytest.raises(UsageError, match=r"--config absent\.json: there is no such file"):
        parse_train([*DATA, "--config", "absent.json"])


def test_two_kinds_of_data_are_refused():
    with pytest.raises(UsageError, match="--dataset_name or --train_data_dir, not both"):
        parse_train([*DATA, "--train_data_dir", "photos"])


@pytest.mark.parametrize(
    "name",
    [
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "num_epochs",
        "max_train_steps",
        "ddpm_num_steps",
        "ddpm_num_inference_steps",
        "eval_batch_size",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "logging_steps",
        "shuffle_buffer_size",
        "rows_per_epoch",
    ],
)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_counts_are_at_least_one(name, value):
    with pytest.raises(UsageError, match=f"--{name} is {value}; it must be at least 1"):
        parse_train([*DATA, f"--{name}={value}"])


@pytest.mark.parametrize(
    "name",
    [
        "learning_rate",
        "lr_warmup_steps",
        "save_images_epochs",
        "save_model_epochs",
        "seed",
        "eval_steps",
        "eval_images",
    ],
)
def test_what_cannot_be_negative(name):
    with pytest.raises(UsageError, match=f"--{name} is -1.*; it must be 0 or more"):
        parse_train([*DATA, f"--{name}=-1"])
    parse_train([*DATA, f"--{name}=0"])


@pytest.mark.parametrize("name", ["dropout", "max_bad_images", "ema_max_decay"])
@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan"])
def test_shares_lie_between_0_and_1(name, value):
    with pytest.raises(UsageError, match=f"--{name} is {value}; it must lie between 0 and 1"):
        parse_train([*DATA, f"--{name}={value}"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate=nan"], "--learning_rate is nan; it must be 0 or more"),
        (["--max_grad_norm=0"], "--max_grad_norm is 0.0; it must be above 0"),
        (["--max_grad_norm=nan"], "--max_grad_norm is nan; it must be above 0"),
        (["--snr_gamma=0"], "--snr_gamma is 0.0; give a number above 0, or leave it out"),
        (["--rescale_betas_zero_snr"], "use --prediction_type v_prediction or sample"),
        (["--budget=soon"], "--budget soon: give a time such as 45s"),
        (["--budget=0m"], "--budget 0m: give a time"),
        (["--budget=2h "], "--budget 2h : give a time"),
        (["--lr_scheduler=piecewise_constant"], "--lr_step_rules go together"),
        (["--lr_step_rules=1:10,0.1"], "--lr_scheduler piecewise_constant and"),
        (
            ["--lr_scheduler=piecewise_constant", "--lr_step_rules=10:x"],
            "--lr_step_rules 10:x: give factor:step pairs",
        ),
        (["--lr_scheduler=polynomial", "--learning_rate=1e-8"], "polynomial ends at 1e-7"),
        (["--resolution=100000"], "--resolution is 100000; a UNet on pixels goes up to 2048"),
        (
            ["--resize_mode=pad", "--center_crop"],
            "--center_crop has no effect with --resize_mode p",
        ),
        (["--held_out=1"], "--held_out is 1.0; give a fraction from 0 to below 1"),
        (["--held_out=nan"], "--held_out is nan; give a fraction"),
        (["--held_out=0.1", "--streaming"], "--held_out chooses among all rows, which --streaming"),
        (
            ["--eval_steps=9", "--eval_images=15"],
            "--eval_images is 15: a distance of fewer than 16",
        ),
        (["--eval_images=16"], "--eval_images has no effect without --eval_steps"),
        (["--keep_best"], "--keep_best has no effect without --eval_steps"),
        (["--eval_steps=9", "--features=x.pt"], "--features has no effect without --eval_images"),
        (["--rows_per_epoch=9"], "--rows_per_epoch is for --streaming"),
        (["--ddpm_num_steps=20"], r"--ddpm_num_inference_steps is 25, more than the 20 timesteps"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        parse_train([*DATA, *flags])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("0.5d", 43200)],
)
def test_a_budget_is_a_time(text, seconds):
    assert parse_train([*DATA, f"--budget={text}"]).optimization.budget_seconds == seconds


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--resolutoin", "64"], "--resolution"),
        (["--resolution", "sixty"], "resolution"),
        (["--ddpm_beta_schedule", "sigmoid"], "squaredcos_cap_v2"),
        (["--prediction_type", "flow"], "v_prediction"),
        (["--mixed_precision", "fp8"], "bf16"),
        (["--resize_mode", "letterbox"], "stretch"),
        (["--channels", "4"], "channels"),
        (["stray"], "stray"),
    ],
)
def test_command_line_that_means_nothing_is_refused_with_what_is_meant(flags, named, capsys):
    assert named in refused(capsys, [*DATA, *flags])


@pytest.mark.parametrize("value", ["sixty", True, 64.5, None])
def test_wrong_type_in_a_file_is_refused(tmp_path, value):
    file = write(tmp_path / "run.json", resolution=value)
    with pytest.raises(UsageError, match="resolution is .*; it must be a whole number"):
        parse_train([*DATA, "--config", file])


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_what_is_not_true_or_false_in_a_file_is_refused(tmp_path, value):
    file = write(tmp_path / "run.json", use_ema=value)
    with pytest.raises(UsageError, match="use_ema is .*; it must be true or false"):
        parse_train([*DATA, "--config", file])


# push.py and sample.py


def test_words_may_stand_before_and_after_flags():
    wanted = PushConfig(output_dir="run", repo_id="you/name", private=True)
    assert parse_push(["run", "you/name", "--private"]) == wanted
    assert parse_push(["--private", "run", "you/name"]) == wanted
    assert parse_push(["run"]) == PushConfig(output_dir="run")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tag=v 1"], "--tag 'v 1' is no name"),
        (["--tag=../v1"], "--tag '../v1' is no name"),
        (["--tag=v1.lock"], "is no name"),
        (["--tag=-v1"], "is no name"),
        (["--revision=refs/pr/1"], "--revision 'refs/pr/1' is no name"),
        ([f"--revision={'a' * 40}"], "is no name"),
        (["--create_pr", "--tag=v1"], "--create_pr .* so --tag does not go"),
        (["--create_pr", "--revision=trial"], "so --revision does not go"),
        (["--commit_message= "], "--commit_message is empty"),
    ],
)
def test_push_flags_that_cannot_work_are_told(flags, words):
    with pytest.raises(UsageError, match=words):
        parse_push(["run", *flags])
    assert parse_push(["run", "--tag=v1.0-rc/2", "--revision=feature_x"]).tag == "v1.0-rc/2"


def test_a_word_too_few_or_too_many_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        parse_sample(["model", "another"])
    assert end.value.code == 2
    assert "another" in capsys.readouterr().err
    with pytest.raises(UsageError, match="Name a MODEL"):
        parse_sample([])
    assert parse_sample(["--like=a.png"]).model is None


@pytest.mark.parametrize(
    "flags", ["--num_images=0", "--batch_size=0", "--num_inference_steps=0", "--seed=-1"]
)
def test_numbers_that_make_no_images_are_refused(flags):
    with pytest.raises(UsageError, match=flags.split("=")[0]):
        parse_sample(["model", flags])


def test_samplers_on_the_command_line_are_those_of_the_table():
    from ddpm.diffusion.schedulers import SCHEDULERS

    assert [parse_sample(["m", "--scheduler", name]).scheduler for name in SCHEDULERS] == [
        *SCHEDULERS
    ]
    with pytest.raises(SystemExit):
        parse_sample(["m", "--scheduler", "lms"])


@pytest.mark.parametrize(
    ("flags", "choices"),
    [
        ([], []),
        (["ddim:10", "ddpm", "dpmsolver++:7"], [("ddim", 10), ("ddpm", None), ("dpmsolver++", 7)]),
        (["ddim:10", "ddim:010", "ddim"], "names ddim:10 twice"),
        (["dmim:10"], "--samplers dmim:10: 'dmim' is no sampler. Did you mean ddim?"),
        (["/a/run"], "--samplers /a/run: '/a/run' is no sampler. Give one of ddpm, ddim,"),
        (["ddim:"], "--samplers ddim:: give a number of steps after the colon, as in ddim:10"),
        (["ddim:0"], "--samplers ddim:0: give a number"),
        (["ddim:5,10"], "--samplers ddim:5,10: give a number"),
        (["ddim:-5"], "--samplers ddim:-5: give a number"),
        (["ddim:5", "--scheduler=ddpm"], "--scheduler has no effect with --samplers"),
        (["--num_inference_steps=9"], "--num_inference_steps has no effect with --samplers"),
        (["--ema_lengths=0.1"], "--samplers and --ema_lengths are two commands"),
    ],
)
def test_samplers_to_be_measured_are_names_and_steps(flags, choices):
    if isinstance(choices, str):
        with pytest.raises(UsageError) as refused:
            parse_evaluate(["run", "--samplers", *flags])
        assert choices in str(refused.value)
    else:
        parsed = parse_evaluate(["run", "--samplers", *flags])
        assert parsed.samplers == tuple(flags) and parsed.sampler_choices == choices
    assert parse_evaluate(["run"]).samplers is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quality=good", "--scheduler=ddim"], "so --scheduler does not go with it"),
        (
            ["--quality=best", "--num_inference_steps=9"],
            "so --num_inference_steps does not go with it",
        ),
        (["--quality=fast", "--prompt=x"], "so --prompt does not go with it"),
        (["--quality=fast", "--like=a.png"], "so --like does not go with it"),
        (["--quality=fast", "--verify"], "so --verify does not go with it"),
        (["--noise_level=0.5"], "--noise_level has no effect without --image"),
        (["--mask=m.png"], "--mask has no effect without --image"),
        (["--strength=0.5", "--image=i.png"], "--strength has no effect without --prompt"),
        (["--height=64"], "--height has no effect without --prompt"),
        (["--image=i.png", "--noise_level=0"], "--noise_level is 0.0; give a number above 0"),
        (["--image=i.png", "--noise_level=1.5"], "up to 1"),
        (["--prompt=x", "--trajectory"], "--prompt and --trajectory do different things"),
        (["--image=i.png", "--interpolate", "1", "2"], "--image and --interpolate"),
        (["--image=i.png", "--mask=m.png", "--noise_level=0.5"], "--mask and --noise_level"),
        (["--image=i.png", "--npz"], "restoring --image makes none"),
        (["--num_resamples=0"], "--num_resamples is 0"),
        (["--interpolate", "1", "-2"], "-2"),
    ],
)
def test_flags_of_sample_that_contradict_each_other_are_refused(flags, words):
    with pytest.raises(UsageError) as refused:
        parse_sample(["model", *flags])
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "flag", ["--adam_epsilon=-1", "--adam_beta1=1", "--adam_beta2=-0.1", "--ema_inv_gamma=0"]
)
def test_numbers_that_make_no_optimizer_are_refused(flag):
    with pytest.raises(UsageError, match=flag.split("=")[0]):
        parse_train([*DATA, flag])
