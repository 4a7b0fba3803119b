from dataclasses import replace

import pytest
import torch

from ddpm.diffusion.class_labels import fold_label
from ddpm.diffusion.schedulers import build_sampling_scheduler
from ddpm.errors import UsageError
from ddpm.sampling import generate
from ddpm.sampling.guidance import ClassGuidance, parse_class_label, predictor
from ddpm.sampling.unet_files import require_same_unet
from tests.tiny import CLASS_NAMES, make_unet

SEEDS = [3, 4, 5]
DIGITS = ("10", "2", "3", "all")
TIMESTEP = torch.tensor(400)


@pytest.fixture(scope="module")
def unet():
    return make_unet(num_classes=2)


@pytest.fixture(scope="module")
def scheduler(unet):
    from diffusers import DDPMScheduler

    return build_sampling_scheduler("ddim", DDPMScheduler().config, 4)


@pytest.fixture(scope="module")
def noisy():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def label_of(seed):
    return seed % 2


@torch.no_grad()
def for_label(unet, noisy, label):
    return fold_label(unet, label)(noisy, TIMESTEP).sample


@torch.no_grad()
def predict(unet, scheduler, noisy, guidance):
    return predictor(unet, scheduler, SEEDS, guidance)(noisy, TIMESTEP)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_moves_the_prediction_away_from_that_without_a_class(
    unet, scheduler, noisy, scale
):
    labels = [label_of(seed) for seed in SEEDS]
    for_class = torch.stack([for_label(unet, noisy, label)[n] for n, label in enumerate(labels)])
    for_none = for_label(unet, noisy, 2)
    expected = for_none + scale * (for_class - for_none)
    if scale not in (0.0, 1.0):
        expected = scheduler.clip_prediction(expected, noisy, TIMESTEP)
    guided = predict(unet, scheduler, noisy, ClassGuidance(label_of, scale))
    assert (guided - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("scale", "images"), [(0.0, 3), (1.0, 3), (2.0, 6)])
def test_only_guidance_other_than_0_and_1_takes_twice_the_batch(
    unet, scheduler, noisy, monkeypatch, scale, images
):
    sizes, forward = [], unet.forward

    def counting(sample, *arguments, **options):
        sizes.append(len(sample))
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(unet, "forward", counting)
    predict(unet, scheduler, noisy, ClassGuidance(label_of, scale))
    assert sizes == [images]


@pytest.mark.parametrize(("interval", "guided"), [((0.3, 0.5), True), ((0.5, 1.0), False)])
def test_outside_its_interval_the_prediction_is_that_for_the_class(
    unet, scheduler, noisy, interval, guided
):
    limited = predict(unet, scheduler, noisy, ClassGuidance(label_of, 3.0, interval))
    scale = 3.0 if guided else 1.0
    assert torch.equal(limited, predict(unet, scheduler, noisy, ClassGuidance(label_of, scale)))


def test_without_guidance_a_unet_with_classes_draws_the_null_class(unet, scheduler):
    images = dict(generate.generate_images(unet, scheduler, SEEDS, 2))
    expected = dict(generate.generate_images(fold_label(unet, 2), scheduler, SEEDS, 2))
    assert images.keys() == expected.keys()
    assert max(int((images[s].int() - expected[s].int()).abs().max()) for s in SEEDS) <= 1


def test_an_image_is_a_function_of_its_seed_and_label(unet, scheduler):
    guidance = ClassGuidance(label_of, 2.0)
    together = dict(generate.generate_images(unet, scheduler, SEEDS, 3, guidance=guidance))
    for seed in SEEDS:
        ((_, alone),) = generate.generate_images(unet, scheduler, [seed], 1, guidance=guidance)
        assert (alone.int() - together[seed].int()).abs().max() <= 1
    other = ClassGuidance(lambda seed: 1 - label_of(seed), 2.0)
    ((_, changed),) = generate.generate_images(unet, scheduler, [3], 1, guidance=other)
    assert (changed.int() - together[3].int()).abs().max() > 1


def test_a_unet_with_classes_belongs_to_the_one_that_its_null_class_folds_to(unet):
    require_same_unet(fold_label(unet, 2), unet, "x")
    for other in (fold_label(unet, 0), make_unet(seed=1), make_unet(resolution=16, channels=3)):
        with pytest.raises(Exception, match="conditional/ is not that of the pipeline"):
            require_same_unet(other, unet, "x")


@pytest.mark.parametrize(
    ("label", "labels"),
    [("3", [2]), ("2", [1]), ("0", [0]), ("1", [1]), (3, [3]), ("all", [0, 1, 2, 3])],
)
def test_a_label_is_a_name_or_else_an_id(label, labels):
    """`all` is never the name of a class, and a number out of a PNG never a name."""
    assert parse_class_label(label, DIGITS, "m") == labels


@pytest.mark.parametrize("label", ["4", "-1", "", "1.0", "\u0663", "9" * 5000, "Dog's", "\x1b[2J"])
def test_unknown_class_is_refused(label):
    with pytest.raises(UsageError, match=r"m has no such class\. It has 4, with the ids 0 to 3"):
        parse_class_label(label, DIGITS, "m")


@pytest.mark.parametrize(("label", "name"), [("dgo", "dog"), ("CAT", "cat"), ("a/b", "a/../b")])
def test_nearest_name_is_suggested(label, name):
    with pytest.raises(UsageError, match=f"from cat to a/../b. Did you mean {name}.$"):
        parse_class_label(label, CLASS_NAMES, "m")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_clipped_prediction_is_that_for_the_clipped_image(scheduler, noisy, prediction_type):
    scheduler = replace(scheduler, prediction_type=prediction_type)
    prediction = 5 * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(1))
    clipped = scheduler.clip_prediction(prediction, noisy, TIMESTEP)
    original = scheduler.predict_original_sample(prediction, noisy, TIMESTEP)
    unlimited = replace(scheduler, clip_range=None)
    again = unlimited.predict_original_sample(clipped, noisy, TIMESTEP)
    assert original.abs().max() == 1 and (again - original).abs().max() < 1e-5
    inside = unlimited.clip_prediction(prediction, noisy, TIMESTEP)
    assert torch.equal(inside, prediction)
