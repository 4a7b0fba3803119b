"""EMA lengths built from what a run kept, and put into its pipeline without harm."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm import run_folder as run_folder_module
from ddpm.config.commands import PushConfig
from ddpm.config.parser import parse_evaluate
from ddpm.diffusion import power_ema
from ddpm.diffusion.power_ema import PowerEMA
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import ema_lengths
from ddpm.publishing import model_card, stage
from ddpm.sampling import pipeline, proof
from tests.diffusion.test_ema import walk

STEPS, WANTED = 200, (0.03, 0.07, 0.15)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder with the snapshots of a small model on a walk, and averages that were kept of it
    directly, in float64: (folder, {sigma_rel: {name: tensor}})."""
    folder = tmp_path_factory.mktemp("walked")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    kept, generator = PowerEMA(module), torch.Generator().manual_seed(0)
    direct = {
        s: {n: torch.zeros_like(p).double() for n, p in module.named_parameters()} for s in WANTED
    }
    for step in range(1, STEPS + 1):
        walk(module, generator)
        kept.update(step)
        for sigma_rel, average in direct.items():
            beta = power_ema.power_ema_decay(step, power_ema.sigma_rel_to_gamma(sigma_rel))
            for name, weight in module.named_parameters():
                average[name].mul_(beta).add_((1 - beta) * weight.detach().double())
        if power_ema.snapshot_due(step) or step == STEPS:
            kept.snapshot(folder, step, main=True)
    return folder, direct, kept


@pytest.fixture
def run(run_folder, tmp_path):
    """The finished run folder, with a checkpoint whose average was exported."""
    checkpoint = run_folder / "checkpoint-6"
    checkpoint.mkdir()
    (checkpoint / run_folder_module.CHECKPOINT_STATE).write_text("{}")
    save_file(
        load_file(run_folder / run_folder_module.UNET_WEIGHTS), checkpoint / "ema.safetensors"
    )
    return run_folder


ENTRY = {"sigma_rel": 0.07, "step": 6}


def put(folder, by=0.1):
    """Export other weights, as of a rebuilt average."""
    weights = {n: v + by for n, v in load_file(folder / run_folder_module.UNET_WEIGHTS).items()}
    ema_lengths.export_weights(folder, weights, ENTRY)
    return weights


@pytest.mark.parametrize("sigma_rel", WANTED)
def test_what_is_built_is_what_training_would_have_kept(walked, sigma_rel):
    folder, direct, kept = walked
    basis = ema_lengths.open_posthoc_ema(folder)
    assert basis.step == STEPS
    built = basis.build(sigma_rel)
    for name, average in direct[sigma_rel].items():
        off = (built[name] - average).norm() / average.norm()
        nearest = min((value[name] - average).norm() for value in kept.averages.values())
        assert off < 0.02 and (built[name] - average).norm() < 0.2 * nearest
        assert built[name].dtype == torch.float32


def test_a_length_that_was_kept_is_that_one_to_the_bit(walked):
    folder, _, kept = walked
    for sigma_rel, average in kept.averages.items():
        built = ema_lengths.open_posthoc_ema(folder).build(sigma_rel)
        assert built.keys() == average.keys()
        assert all(torch.equal(built[name], average[name]) for name in average)


def test_checkpoints_count_too_and_may_all_be_pruned(walked, tmp_path):
    """Without snapshots the two averages of a checkpoint are all that there is."""
    folder, _, kept = walked
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    checkpoint.mkdir()
    kept.save(checkpoint / run_folder_module.POWER_EMA, STEPS, main=True)
    basis = ema_lengths.open_posthoc_ema(tmp_path)
    assert {profile.sigma_rel for profile in basis.files} == set(power_ema.SIGMA_RELS)
    basis.require([0.05, 0.07, 0.10])
    with pytest.raises(UserError, match=r"0\.02.*2 averages.*Give lengths from 0\.0\d* to 0\.1"):
        basis.require([0.02, 0.05])
    assert len(ema_lengths.open_posthoc_ema(folder).files) == 2 * len(
        power_ema.list_snapshots(folder)
    )


def test_averages_that_began_lately_are_left_out(walked, tmp_path):
    """One that began at step 150 holds, at 200, more of its start than of its profile."""
    _, _, kept = walked
    (tmp_path / "ema").mkdir()
    late = PowerEMA(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
    late.begin(150)
    late.save(tmp_path / "ema" / "step-000200.safetensors", 200, main=True)
    with pytest.raises(UserError, match="that began long enough ago"):
        ema_lengths.open_posthoc_ema(tmp_path)
    late.save(tmp_path / "ema" / "step-000240.safetensors", 240, main=True)
    late.save(tmp_path / "ema" / "step-001000.safetensors", 1000, main=True)
    found = ema_lengths.open_posthoc_ema(tmp_path).files
    assert [(p.step, p.sigma_rel) for p in found] == [(240, 0.05), (1000, 0.05), (1000, 0.10)]


def test_what_holds_no_averages_is_refused(run, tmp_path):
    def refused(model):
        with pytest.raises(UserError) as told:
            ema_lengths.require_posthoc_run(parse_evaluate([str(model), "--ema_lengths=0.05"]))
        return told.value

    assert "train with --post_hoc_ema" in str(refused(run))
    assert isinstance(refused(run / "checkpoint-6"), UsageError)
    assert "needs a run folder" in str(refused("owner/name"))
    (run / "ema").mkdir()
    (run / "ema" / "step-000006.safetensors").write_bytes(b"cut short")
    assert "step-000006.safetensors cannot be read" in str(refused(run))


def test_exported_weights_are_the_pipeline_and_prove_it(run, tmp_path):
    was = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    weights = put(run)
    loaded = pipeline.load_model(str(run))
    state = loaded.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert proof.verify_model(str(run)).difference == 0
    recorded = run_folder_module.read_record(run).exported_ema
    assert recorded == run_folder_module.ExportedEMA(**ENTRY, sha256=loaded.version)
    unchanged = set(run_folder_module.PIPELINE_FILES) - {run_folder_module.UNET_WEIGHTS}
    assert all((run / name).read_bytes() == was[run / name] for name in unchanged)
    assert "length of sigma_rel 0.07" in model_card.render_card(run, "you/run", None, None)
    grid = next((run / "samples").glob("*.png"))
    assert grid.read_bytes() != was[grid]
    files = stage.stage_files(run, tmp_path / "staged", "you/run", PushConfig(output_dir=str(run)))
    assert run_folder_module.PROOF in files and not any(name.startswith("ema") for name in files)
    # Back again, by what docs/evaluation.md says
    before = run / run_folder_module.REPLACED_PIPELINE
    for path in (p for p in before.rglob("*") if p.is_file()):
        (run / path.relative_to(before)).write_bytes(path.read_bytes())
    assert proof.verify_model(str(run)).difference == 0
    changed = [p.name for p, content in was.items() if p.read_bytes() != content]
    assert changed == []


def test_only_what_training_exported_is_kept(run):
    """A second export replaces a rebuilt average, which can be built again."""
    was = (run / run_folder_module.UNET_WEIGHTS).read_bytes()
    kept = run / run_folder_module.REPLACED_PIPELINE / run_folder_module.UNET_WEIGHTS
    put(run)
    put(run, by=0.2)
    assert kept.read_bytes() == was
    ema_lengths.export_weights(run, load_file(kept), None)
    assert run_folder_module.read_record(run).exported_ema is None
    assert "sigma_rel" not in model_card.render_card(run, "you/run", None, None)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ema_lengths.shutil, "copyfile"),
        (ema_lengths.os, "replace"),
        (pipeline, "export_pipeline"),
        (pipeline.os, "replace"),
        (run_folder_module, "write_record"),
        (proof, "write_proof"),
        (proof, "write_json"),
        (ema_lengths, "_draw_grid"),
    ],
)
def test_an_export_that_is_cut_off_lies_to_nobody(run, monkeypatch, owner, name):
    """Wherever it ends: a pipeline that loads, no proof but its own, and the same command again."""
    was = (run / run_folder_module.UNET_WEIGHTS).read_bytes()

    class Killed(BaseException):
        pass

    def deadly(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, deadly)
        put(run)
    now = pipeline.load_model(str(run)).version
    if (run / run_folder_module.PROOF).exists():
        assert proof.verify_model(str(run)).difference == 0
    recorded = run_folder_module.read_exported_ema(run, now)
    assert recorded is None or recorded.sigma_rel == 0.07
    put(run)
    assert proof.verify_model(str(run)).difference == 0
    kept = run / run_folder_module.REPLACED_PIPELINE / run_folder_module.UNET_WEIGHTS
    assert kept.read_bytes() == was
    assert not [*run.glob(".*.partial"), *(run / "ema").glob(".*.partial")]


def test_a_folder_that_trains_is_left_alone(run):
    was = (run / run_folder_module.UNET_WEIGHTS).read_bytes()
    with run_folder_module.run_lock(run), pytest.raises(UserError, match="Another run is writing"):
        put(run)
    assert (run / run_folder_module.UNET_WEIGHTS).read_bytes() == was


def test_a_full_disk_leaves_the_pipeline(run, monkeypatch):
    was = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".run.lock"}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ema_lengths.shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"ema/before could not.*No space.*left as it is"):
        put(run)
    assert {p: p.read_bytes() for p in was} == was
    assert not [*(run / "ema").glob(".*")]
