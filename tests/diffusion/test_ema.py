"""The EMA against diffusers' EMAModel, and the module with averaged weights."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from ddpm.config.train import EMAConfig
from ddpm.diffusion.ema import EMA, eval_weights


def walk(module: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(), torch.nn.Linear(4, 2))


@pytest.mark.parametrize(
    "config",
    [
        EMAConfig(),
        EMAConfig(ema_inv_gamma=5.0, ema_power=2 / 3, ema_max_decay=0.8),
        EMAConfig(ema_max_decay=0.0),
    ],
)
def test_average_is_that_of_diffusers(config, module):
    ours = EMA(module, config)
    theirs = EMAModel(
        module.parameters(),
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 30):
        walk(module, generator)
        ours.update(step)
        theirs.step(module.parameters())
        assert ours.decay(step) == pytest.approx(theirs.cur_decay_value)
    for average, reference in zip(ours.average.values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(average, reference)


def test_decay_by_hand():
    ema = EMA(torch.nn.Linear(1, 1), EMAConfig(ema_inv_gamma=1.0, ema_power=0.5, ema_max_decay=0.6))
    assert ema.decay(1) == 0.0
    assert ema.decay(4) == 0.5  # 1 - 4 ** -0.5
    assert ema.decay(10_000) == 0.6


def test_first_update_forgets_the_initialization(module):
    ema = EMA(module, EMAConfig())
    walk(module, torch.Generator().manual_seed(0))
    ema.update(1)
    for name, weight in module.named_parameters():
        assert torch.equal(ema.average[name], weight)


def test_average_is_a_float32_copy_without_gradient(module):
    module = module.to(torch.bfloat16)
    ema = EMA(module, EMAConfig())
    before = {name: value.clone() for name, value in ema.average.items()}
    walk(module, torch.Generator().manual_seed(0))
    for name, value in ema.average.items():
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert torch.equal(value, before[name])


def test_frozen_parameters_are_left_out(module):
    module[0].bias.requires_grad_(False)
    assert list(EMA(module, EMAConfig()).average) == ["0.weight", "2.weight", "2.bias"]


def test_swapped_in_weights_are_the_average_and_are_restored(module):
    ema = EMA(module, EMAConfig())
    averaged = {name: value.clone() for name, value in ema.average.items()}
    walk(module, torch.Generator().manual_seed(0))
    raw = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    with ema.swapped_in():
        for name, weight in module.named_parameters():
            assert torch.equal(weight, averaged[name])
    for name, weight in module.named_parameters():
        assert torch.equal(weight, raw[name])
        assert torch.equal(ema.average[name], averaged[name])


def test_parameters_are_the_same_objects_after_a_swap(module):
    """The optimizer steps the parameters that it was given."""
    ema = EMA(module, EMAConfig())
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    with ema.swapped_in():
        pass
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    before = module[0].weight.detach().clone()
    module.eval()(torch.ones(1, 3)).sum().backward()  # dropout may leave no gradient
    optimizer.step()
    assert not torch.equal(module[0].weight, before)
    assert torch.equal(ema.average["0.weight"], before)


def test_raw_weights_and_mode_are_restored_after_an_error(module):
    ema = EMA(module, EMAConfig())
    walk(module, torch.Generator().manual_seed(0))
    raw = module[0].weight.detach().clone()
    module.train()
    with pytest.raises(RuntimeError, match="out of memory"), eval_weights(module, ema):
        raise RuntimeError("out of memory")
    assert torch.equal(module[0].weight, raw)
    assert module.training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("averaged", [True, False])
def test_eval_weights_switches_to_eval_mode_and_back(module, averaged, training):
    module.train(training)
    with eval_weights(module, EMA(module, EMAConfig()) if averaged else None):
        assert not any(child.training for child in module.modules())
    assert all(child.training == training for child in module.modules())


def test_saved_average_is_loaded(module):
    first, second = EMA(module, EMAConfig()), EMA(module, EMAConfig())
    walk(module, torch.Generator().manual_seed(0))
    first.update(1)
    storage = second.average["0.weight"].data_ptr()
    second.load({name: value.clone() for name, value in first.average.items()})
    for name, value in first.average.items():
        assert torch.equal(second.average[name], value)
    assert second.average["0.weight"].data_ptr() == storage


def test_average_of_another_model_is_refused(module):
    other = EMA(torch.nn.Linear(1, 1), EMAConfig())
    with pytest.raises(KeyError, match="another model"):
        other.load(EMA(module, EMAConfig()).average)
