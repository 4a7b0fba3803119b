import pytest
import torch

from ddpm.config.train import ModelConfig
from ddpm.diffusion.class_labels import drop_labels, fold_label, has_classes, null_label
from ddpm.diffusion.unet import build_unet
from tests.tiny import make_unet


@pytest.fixture(scope="module")
def conditional():
    torch.manual_seed(0)
    return make_unet(num_classes=3)


@pytest.mark.parametrize("label", [0, 2, 3])
def test_folding_a_label_gives_a_unet_without_classes_of_the_same_predictions(conditional, label):
    folded = fold_label(conditional, label)
    images, timesteps = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        expected = conditional(images, timesteps, class_labels=torch.full((4,), label)).sample
        prediction = folded(images, timesteps).sample
    assert not has_classes(folded)
    assert (prediction - expected).abs().max() < 1e-5
    others = conditional(images, timesteps, class_labels=torch.full((4,), (label + 1) % 4)).sample
    assert (prediction - others).abs().max() > 1e-3


def test_folding_leaves_the_unet_with_classes_as_it_is(conditional):
    before = {name: weight.clone() for name, weight in conditional.state_dict().items()}
    fold_label(conditional, 1)
    after = conditional.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_a_new_unet_predicts_the_same_for_all_classes():
    torch.manual_seed(0)
    unet = build_unet(ModelConfig(), 8, 1, num_classes=10).eval()
    assert null_label(unet) == 10
    images, timestep = torch.randn(1, 1, 8, 8).expand(11, -1, -1, -1), torch.tensor(500)
    with torch.no_grad():
        predictions = unet(images, timestep, class_labels=torch.arange(11)).sample
    assert torch.equal(predictions, predictions[:1].expand_as(predictions))


def test_labels_are_dropped_with_their_probability():
    labels = torch.arange(10_000) % 5
    dropped = drop_labels(labels, 5, 0.1, torch.Generator().manual_seed(0))
    assert 0.09 < (dropped == 5).float().mean() < 0.11
    assert ((dropped == labels) | (dropped == 5)).all()
    again = drop_labels(labels, 5, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(dropped, again)
    assert torch.equal(drop_labels(labels, 5, 0.0, torch.Generator()), labels)
