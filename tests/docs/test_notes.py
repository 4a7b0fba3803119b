"""docs/diffusion.md and its translation: numbers, formulas, names and pictures are right.

A comment after each number in the notes says where it comes from:
`0.95<!-- = 0.2 + 7.5 * (0.3 - 0.2) -->` is evaluated here, `<!-- given -->` is an example value,
and `<!-- cited -->` is a number from a paper.
"""

import functools
import math
import os
import pydoc
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from ddpm.config.train import DataConfig, DiffusionConfig, EMAConfig, ModelConfig
from ddpm.data import dataset, transforms
from ddpm.diffusion import ema, objective, power_ema, unet
from tests.conftest import ROOT

DOCS = ROOT / "docs"
LANGUAGES = ("diffusion.md", "diffusion.zh-TW.md")
TEXT = {name: (DOCS / name).read_text(encoding="utf-8") for name in LANGUAGES}
MARK = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)<!--\s*(.*?)\s*-->")
DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.S)
INLINE = re.compile(r"(?<!\$)\$([^$]+)\$(?!\$)")
NAME = re.compile(r"`((?:ddpm|diffusers)(?:\.\w+)+)`")
MAINLAND = (
    "噪声",
    "噪聲",
    "采样",
    "採樣",
    "信息",
    "質量",
    "默認",
    "代碼",
    "函數",
    "數據",
    "模塊",
    "視頻",
    "網絡",
    "圖像",
    "概率",
    "方差",
    "内存",
    "內存",
    "調用",
)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def marks(text: str) -> list[tuple[str, str]]:
    return [(number.replace(",", ""), how) for number, how in MARK.findall(without_code(text))]


# Functions that the comments may call


def abar(schedule: str, t: int) -> float:
    return float(_chain(schedule).alphas_cumprod[t])


def beta(schedule: str, t: int) -> float:
    return float(_chain(schedule).betas[t])


def posterior(schedule: str, t: int) -> tuple[float, float, float]:
    """Return the weights of x_t and x_0 in the posterior mean, and its variance: DDPM eq. 6, 7."""
    now, before, noise = abar(schedule, t), abar(schedule, t - 1), beta(schedule, t)
    return (
        math.sqrt(1 - noise) * (1 - before) / (1 - now),
        math.sqrt(before) * noise / (1 - now),
        (1 - before) / (1 - now) * noise,
    )


def below_one(schedule: str) -> int:
    """Return the first step with an SNR below 1."""
    ratio = objective.compute_snr(_chain(schedule).alphas_cumprod, torch.arange(1000))
    return int((ratio >= 1).sum())


def weight(prediction_type: str, alpha: float) -> float:
    alphas, timesteps = torch.tensor([alpha]), torch.tensor([0])
    return float(objective.min_snr_weights(prediction_type, alphas, timesteps, 5.0))


def decay(step: int) -> float:
    return ema.EMA(torch.nn.Linear(1, 1), EMAConfig()).decay(step)


def pixel(what: str) -> float:
    """Return a value of the worked example: alpha-bar 0.64, a pixel of 0.5, noise of -1."""
    alphas, t = torch.tensor([0.64]), torch.tensor([0])
    image, noise = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -1.0)
    if what == "noisy":
        return float(objective.add_noise(alphas, image, noise, t))
    return float(objective.prediction_target("v_prediction", alphas, image, noise, t))


@functools.cache
def digits() -> torch.Tensor:
    """Return the training digits, [N, 1, 8, 8] in [-1, 1]."""
    config = DataConfig(dataset_name=str(ROOT / "data" / "digits"), resolution=8)
    images = dataset.load_images(config, show_progress=False)
    return transforms.to_model(torch.stack([images.pixels(row) for row in range(len(images))]))


def digit_moments() -> tuple[float, float]:
    """Return mean and variance of all values of the training digits."""
    return float(digits().mean()), float(digits().var())


def bound_factor(schedule: str, t: int) -> float:
    """Return the factor of the noise error in the bound, with sigma^2 = beta: DDPM eq. 12."""
    return beta(schedule, t) / (2 * (1 - beta(schedule, t)) * (1 - abar(schedule, t)))


def rounds_to_one(schedule: str) -> int:
    """Return the number of timesteps whose alpha-bar is 1 in bfloat16."""
    return int((_chain(schedule).alphas_cumprod.bfloat16() == 1).sum())


def mean_weight(schedule: str) -> float:
    """Return the mean Min-SNR weight of velocity over all timesteps, with gamma = 5."""
    alphas, timesteps = _chain(schedule).alphas_cumprod, torch.arange(1000)
    return float(objective.min_snr_weights("v_prediction", alphas, timesteps, 5.0).mean())


def cell(row: str, column: int) -> float:
    """Return the number at the start of a cell of docs/evaluation.md, in the row that `row` begins.

    Columns count from 0, which has the name of the row.
    """
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    [line] = re.findall(rf"^\| {re.escape(row)} \|.*$", text, re.M)
    return float(re.match(r"-?[\d.]+", line.split("|")[column + 1].strip())[0])


def training_loop() -> str:
    """Return the code of section 12."""
    return re.search(
        r"```python\n([^`]+for step in range\(steps\).+?)```", TEXT["diffusion.md"], re.S
    )[1]


def training_loop_lines() -> int:
    return len(training_loop().splitlines())


def digit_parameters() -> int:
    return unet.build_unet(ModelConfig(), resolution=8, channels=1).num_parameters()


def _chain(schedule: str) -> DDPMScheduler:
    return unet.build_scheduler(DiffusionConfig(ddpm_beta_schedule=schedule))


CALLABLE = {
    "DiffusionConfig": DiffusionConfig,
    "abar": abar,
    "beta": beta,
    "posterior": posterior,
    "below_one": below_one,
    "weight": weight,
    "decay": decay,
    "pixel": pixel,
    "math": math,
    "torch": torch,
    "digit_parameters": digit_parameters,
    "digit_moments": digit_moments,
    "bound_factor": bound_factor,
    "rounds_to_one": rounds_to_one,
    "mean_weight": mean_weight,
    "cell": cell,
    "training_loop_lines": training_loop_lines,
    "sigma_rel_of": power_ema.gamma_to_sigma_rel,
}
EVALUATED = sorted({mark for text in TEXT.values() for mark in marks(text) if mark[1][0] == "="})


@pytest.mark.parametrize(("written", "how"), EVALUATED)
def test_number_is_the_value_of_its_expression(written, how):
    value = eval(how.removeprefix("="), dict(CALLABLE))  # text of this repository
    decimals = len(written.partition(".")[2])
    assert f"{value:.{decimals}f}" == written, f"{written} is {value} by {how}"


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_decimal_number_has_a_source(name):
    """Except in code, formulas, links, arXiv ids and section numbers."""
    kinds = {how if how[0] != "=" else "=" for _, how in marks(TEXT[name])}
    assert kinds == {"=", "given", "cited"}
    text = MARK.sub("", without_code(TEXT[name]))
    text = INLINE.sub("", DISPLAY.sub("", text))
    text = re.sub(r"`[^`]*`|arXiv \d{4}\.\d{5}|section \d\.\d|第 \d\.\d 節", "", text)
    assert re.findall(r"\d+\.\d+", text) == []


def ddpm_step(clip: bool, noise_error: float) -> tuple[float, float, float]:
    """Return x_t, the guess of x_0 and the mean of x_{t-1} of DDPMScheduler.step at t = 500.

    x_0 is 0.5 and the noise -1; the prediction is the noise plus `noise_error`.
    """
    chain, t = DDPMScheduler.from_config(_chain("linear").config, clip_sample=clip), 500
    clean, noise = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -1.0)
    noisy = objective.add_noise(chain.alphas_cumprod, clean, noise, torch.tensor([t]))
    chain.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    step = chain.step(noise + noise_error, t, noisy, generator=generator)
    fresh = torch.randn(1, 1, 1, 1, generator=generator.manual_seed(0))
    mean = step.prev_sample - math.sqrt(posterior("linear", t)[2]) * fresh
    return float(noisy), float(step.pred_original_sample), float(mean)


@pytest.mark.parametrize(("clip", "noise_error"), [(False, -0.5), (True, -0.5), (True, 0.0)])
def test_ddpm_scheduler_step_has_the_mean_of_the_guess(clip, noise_error):
    """Its mean is eq. 7 with the clipped guess; where nothing is clipped it is eq. 11."""
    noisy, guess, mean = ddpm_step(clip, noise_error)
    of_noisy, of_clean, _ = posterior("linear", 500)
    now, noise = abar("linear", 500), -1 + noise_error
    unclipped = (noisy - math.sqrt(1 - now) * noise) / math.sqrt(now)
    was_clipped = clip and noise_error != 0
    assert (unclipped > 1) == (noise_error != 0)
    assert guess == pytest.approx(1.0 if was_clipped else unclipped, abs=1e-5)
    assert mean == pytest.approx(of_noisy * noisy + of_clean * guess, abs=1e-5)
    step = beta("linear", 500)
    of_noise = (noisy - step / math.sqrt(1 - now) * noise) / math.sqrt(1 - step)  # eq. 11
    assert (abs(mean - of_noise) < 1e-5) == (not was_clipped)


def test_divergence_of_two_normal_distributions():
    """Step 4: distance^2 / (2 sigma^2) with equal variances, and a number C more with others."""

    def divergence(mean: float, variance: float, other_variance: float) -> float:
        first = torch.distributions.Normal(mean, math.sqrt(variance))
        other = torch.distributions.Normal(0.3, math.sqrt(other_variance))
        return float(torch.distributions.kl_divergence(first, other))

    _, _, variance = posterior("linear", 500)
    step = beta("linear", 500)
    for mean in (0.3, 0.5, -1.0):
        distance = (mean - 0.3) ** 2
        assert divergence(mean, variance, variance) == pytest.approx(distance / (2 * variance))
        constant = divergence(0.3, variance, step)
        assert divergence(mean, variance, step) - constant == pytest.approx(distance / (2 * step))
    assert constant > 0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_mixture(eta):
    """Section 7: with the true noise, x_{t-1} has the distribution q(x_{t-1} | x_0) for any eta."""
    chain = DDIMScheduler.from_config(_chain("linear").config, clip_sample=False)
    chain.set_timesteps(50)
    now, following = int(chain.timesteps[20]), int(chain.timesteps[21])
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.full((1, 100_000), 0.5), torch.randn(1, 100_000, generator=generator)
    noisy = abar("linear", now) ** 0.5 * clean + (1 - abar("linear", now)) ** 0.5 * noise
    stepped = chain.step(noise, now, noisy, eta=eta, generator=generator).prev_sample
    mixture = abar("linear", following)
    assert float(stepped.mean()) == pytest.approx(0.5 * math.sqrt(mixture), abs=0.01)
    assert float(stepped.var()) == pytest.approx(1 - mixture, rel=0.01)


@pytest.mark.parametrize(("t", "is_random"), [(500, True), (1, True), (0, False)])
def test_no_noise_is_added_at_the_last_step(t, is_random):
    """Section 7: DDPMScheduler.step draws no z at t = 0."""
    chain = _chain("linear")
    chain.set_timesteps(1000)
    noisy, noise = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    first, second = (
        chain.step(noise, t, noisy, generator=torch.Generator().manual_seed(seed)).prev_sample
        for seed in (1, 2)
    )
    assert torch.equal(first, second) != is_random


def test_a_ddim_step_is_an_euler_step():
    """Section 7: with eta 0, x / sqrt(alpha-bar) changes by (sigma' - sigma) times the noise."""
    chain = DDIMScheduler.from_config(_chain("linear").config, clip_sample=False)
    chain.set_timesteps(50)
    now, following = int(chain.timesteps[20]), int(chain.timesteps[21])
    noisy, noise = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    stepped = chain.step(noise, now, noisy).prev_sample

    def level(t: int) -> tuple[float, float]:
        return abar("linear", t) ** 0.5, (1 / abar("linear", t) - 1) ** 0.5

    (signal, sigma), (next_signal, next_sigma) = level(now), level(following)
    expected = noisy / signal + (next_sigma - sigma) * noise
    torch.testing.assert_close(stepped / next_signal, expected, rtol=1e-4, atol=1e-5)


def test_both_languages_have_the_same_sections():
    numbers = [re.findall(r"^#+ (\d+)\.", text, re.M) for text in TEXT.values()]
    assert numbers[0] == numbers[1] == [str(n) for n in range(1, 16)]


@pytest.mark.parametrize(
    "extract",
    [
        lambda text: DISPLAY.findall(text),
        lambda text: sorted({" ".join(f.split()) for f in INLINE.findall(DISPLAY.sub("", text))}),
        lambda text: Counter(marks(text)),
        lambda text: Counter(NAME.findall(text)),
        lambda text: re.findall(r"\]\((images/[^)]+)\)", text),
        lambda text: re.findall(r"```.*?```", text, re.S),
    ],
    ids=["formulas", "inline formulas", "numbers", "names", "pictures", "code"],
)
def test_both_languages_have_the_same(extract):
    english, chinese = (extract(without_code(text)) or extract(text) for text in TEXT.values())
    assert english
    assert english == chinese


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_formula_names_its_function_and_its_paper(name):
    """In a line with an arrow after the formula, before the next heading."""
    for formula in DISPLAY.finditer(TEXT[name]):
        rest = TEXT[name][formula.end() :].partition("\n#")[0]
        arrow = re.search(r"^→ (?:.+\n)+", rest, re.M)
        assert arrow, f"no arrow after {formula[0]}"
        between = DISPLAY.findall(rest[: arrow.start()])
        assert len(between) <= 2, f"the arrow is too far from {formula[0]}"
        assert NAME.search(arrow[0]), f"{formula[0]} names no function"
        assert re.search(r"\b(20\d\d|eq\.)|式 \d", arrow[0]), f"{formula[0]} names no paper"


@pytest.mark.parametrize("name", sorted({n for t in TEXT.values() for n in NAME.findall(t)}))
def test_every_function_named_exists(name):
    assert pydoc.locate(name) is not None


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_link_has_a_target(name):
    for target in re.findall(r"\]\(([^)#]+)\)", without_code(INLINE.sub("", TEXT[name]))):
        assert (DOCS / target).is_file(), target


@pytest.mark.parametrize("name", LANGUAGES)
def test_formulas_render_on_github(name):
    """Markdown removes a backslash before punctuation; $ needs a space or ASCII next to it."""
    text = without_code(TEXT[name])
    for formula in DISPLAY.findall(text) + INLINE.findall(DISPLAY.sub("", text)):
        assert not re.search(r"\\[^A-Za-z]|\\operatorname|[<>*|]", formula), formula
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count(r"\left") == formula.count(r"\right"), formula
    for match in INLINE.finditer(DISPLAY.sub("", text)):
        around = DISPLAY.sub("", text)
        neighbors = around[match.start() - 1] + around[match.end()]
        assert re.fullmatch(r"[\s(\-][\s.,:;)?]", neighbors), match[0]


def test_chinese_uses_the_terms_of_taiwan():
    chinese = TEXT["diffusion.zh-TW.md"]
    assert [word for word in MAINLAND if word in chinese] == []
    for word in ("擴散模型", "雜訊", "取樣", "排程器", "潛在空間"):
        assert word in chinese


def test_the_snippet_restores_a_digit(run_folder, tmp_path, monkeypatch):
    """The code marked `run` works unchanged, next to a run folder and the data."""
    run_folder.rename(tmp_path / "ddpm-digits")
    os.symlink(ROOT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    [snippet] = re.findall(r"<!-- run -->\n```python\n(.*?)```", TEXT["diffusion.md"], re.S)
    names: dict = {}
    exec(snippet, names)
    assert names["restored"].size == (8, 8)
    assert names["noisy"].isfinite().all()


def test_the_training_loop_learns(tmp_path, monkeypatch):
    """Section 12: the loss falls, and the folder is a pipeline; here in fewer steps."""
    os.symlink(ROOT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    [short] = re.findall(r"steps, batch_size, losses = \d+, \d+, \[\]", training_loop())
    names: dict = {}
    exec(training_loop().replace(short, "steps, batch_size, losses = 24, 16, []"), names)
    assert sum(names["losses"][-6:]) < 0.8 * sum(names["losses"][:6])
    pipe = DDPMPipeline.from_pretrained("plain-digits")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=1, num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.slow
def test_pictures_are_plotted_from_a_run(run_folder, class_folder, tmp_path, monkeypatch):
    """docs/make_note_pictures.py makes every picture of the notes."""
    from docs import make_note_pictures

    monkeypatch.setattr(make_note_pictures, "FOLDER", tmp_path / "images")
    monkeypatch.setattr("sys.argv", ["make_note_pictures.py", str(run_folder), str(class_folder)])
    make_note_pictures.main()
    shown = re.findall(r"\]\(images/([^)]+)\)", TEXT["diffusion.md"])
    assert sorted(shown) == sorted(path.name for path in Path(tmp_path / "images").iterdir())
