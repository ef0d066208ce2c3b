"""`read_pipeline`: the chain read off a pipeline is the pipeline's own sampler, for every family in the list."""

import copy
import functools
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from implicit_diffusion.denoisers.lora import add_lora, merged
from implicit_diffusion.errors import InvalidInputError, NonAffineError
from implicit_diffusion.evaluation.chains import evaluate
from implicit_diffusion.evaluation.plans import make_plan
from implicit_diffusion.loops import Queue
from implicit_diffusion.models.pipelines.reading import read_pipeline
from implicit_diffusion.models.pipelines.recording import Recorder
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.tables.named import default_sampler
from implicit_diffusion.tables.scheduler import read_table
from tests.helpers import tiny, tiny_pipelines

FAST = ("Stable Diffusion XL", "FLUX.1", "Wan")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in tiny_pipelines.FAMILIES]
STEPS, COUNT = 3, 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tiny pipeline of a family, made once."""
    return functools.cache(lambda name: tiny_pipelines.FAMILIES[name](tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="module")
def read(made):
    """A tiny pipeline and what is read off it."""

    @functools.cache
    def reading(name, sampler="own"):
        family = made(name)
        return family, read_pipeline(family.pipeline, STEPS, prompts=family.prompts, sampler=sampler, **family.call)

    return reading


def chain_of(probed):
    """Its chain, with the prompts in their order."""
    if probed.condition is None:
        return probed.chain()
    return probed.chain(condition=lambda noise, batch, index: {"prompt": torch.arange(batch)})


def sample(probed, family, x, **options):
    """What the pipeline of diffusers makes of the initial states x."""
    z = x / probed.table.initial_std
    if family.unpacked:
        z = z.transpose(1, 2).reshape(len(z), -1, *family.unpacked)
    count = {"prompt": family.prompts} if family.prompts else {"num_images_per_prompt": COUNT}
    probed.pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": STEPS, "latents": z, "return_dict": False, "output_type": "pt"}
    return probed.pipeline(**given | count | family.call | options)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_is_the_pipeline(read, monkeypatch, name):
    """From the same x_0 and noise, decoded by the pipeline's own end: images as diffusers shows them."""
    family, probed = read(name)
    chain, noise = chain_of(probed), Noise(1)
    with torch.no_grad():
        steps = list(chain.walk(chain.initial(noise, COUNT), noise))
        ours = probed.decoder(steps[-1][2][0])
    drawn = iter([torch.zeros_like(x[0]) if xi is None else xi[0] for _, xi, x in steps])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(drawn))
    theirs = sample(probed, family, chain.initial(noise, COUNT))
    if ours.ndim == 5:  # diffusers puts the frames before the colours
        ours = ours.transpose(1, 2)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=2e-5)
    assert theirs.std() > 0.01 and not theirs[0].allclose(theirs[1], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name != pytest.param("Sana", marks=pytest.mark.slow)])
def test_the_decoder_is_differentiable(read, name):
    """Its gradient is that of central differences along a random direction, where float64 is rounded inside some."""
    _, probed = read(name)
    dtype = torch.float32 if name == "Z-Image" else torch.float64  # its pipeline asserts float32
    x, v = (Noise(2).normal((COUNT, *probed.event_shape), key, dtype=dtype) for key in range(2))
    x.requires_grad_()
    vae = probed.decoder.vae.to(dtype)
    try:
        images = probed.decoder(x)
        weights = Noise(2).normal(tuple(images.shape), 2)
        (gradient,) = torch.autograd.grad((weights * images).sum(), x)
        with torch.no_grad():
            h = 3e-4
            ahead, behind = (probed.decoder(x + sign * h * v) for sign in (1, -1))
    finally:
        vae.float()
    expected = (weights * (ahead - behind)).sum() / (2 * h)
    assert (gradient * v).sum().item() == pytest.approx(expected.item(), rel=1e-2)


def test_nothing_waits_for_the_collector(made, monkeypatch):
    """What a run has recorded, and what was decoded, is freed at once: a cycle would keep all arguments."""
    family, recorders, own = made("Stable Diffusion XL"), [], Recorder.run

    def run(self, *arguments):
        recorders.append(weakref.ref(self))
        return own(self, *arguments)

    monkeypatch.setattr(Recorder, "run", run)
    gc.collect()
    gc.disable()
    try:
        probed = read_pipeline(family.pipeline, 1, prompts=family.prompts, **family.call)
        x = torch.zeros(1, *probed.event_shape, requires_grad=True)
        decoded = weakref.ref(x)
        probed.decoder(x).sum().backward()
        del x
        assert len(recorders) > 3 and not any(recorder() for recorder in recorders) and decoded() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_the_gradient_of_a_rough_decoder(read):
    """Sana's, with random weights, is too rough for differences: its gradient is that of the autoencoder itself."""
    _, probed = read("Sana")
    x = Noise(2).normal((COUNT, *probed.event_shape), 0).requires_grad_()
    vae = probed.decoder.vae
    (ours,) = torch.autograd.grad(probed.decoder(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(vae.decode(x / vae.config.scaling_factor, return_dict=False)[0].square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["Stable Diffusion 1 and 2", "Stable Diffusion 3"])
def test_the_table_is_that_of_the_scheduler(read, name):
    family, probed = read(name)
    own = read_table(family.pipeline.scheduler, STEPS)
    for column in "absmth":
        torch.testing.assert_close(getattr(probed.table, column), getattr(own, column), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("Stable Diffusion 1 and 2", "ddpm"), pytest.param("FLUX.1", "flow-memoryless", marks=pytest.mark.slow)],
)
def test_another_sampler_is_exchanged(read, name, sampler):
    """Memoryless chains have noise, on the times of the pipeline; the pipeline itself keeps its scheduler."""
    family, probed = read(name, sampler)
    assert (probed.table.s[:-1] > 0.01).all()
    assert type(family.pipeline.scheduler).__name__ in ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler")
    if sampler == "flow-memoryless":
        torch.testing.assert_close(probed.table.t, read(name)[1].table.t)


def test_pipelines_of_pixels_and_of_classes(tmp_path):
    """DDPMPipeline has neither prompts nor latents as arguments, DiTPipeline has classes and a learned variance."""
    from diffusers import DDPMPipeline, DiTPipeline

    pixels = DDPMPipeline(tiny.unet(**tiny.PLAIN), tiny.scheduler())
    probed = read_pipeline(pixels, STEPS)
    assert probed.decoder is None and probed.condition is None and probed.event_shape == (1, 8, 8)
    x, t = Noise(0).normal((2, 1, 8, 8), 0), torch.tensor([3.0, 700.0])
    torch.testing.assert_close(probed.denoiser(x, t), pixels.unet(x, t).sample)

    classes = DiTPipeline.from_pretrained(tiny.dit(tmp_path, classes=1000))  # the pipeline's own number of no class
    probed = read_pipeline(classes, STEPS, class_labels=[2, 0], guidance_scale=1.0)
    x, t = Noise(0).normal((2, 4, 8, 8), 0), torch.tensor([3, 700])
    expected = classes.transformer(x, t, class_labels=torch.tensor([0, 2])).sample[:, :4]
    torch.testing.assert_close(probed.denoiser(x, t, prompt=torch.tensor([1, 0])), expected)
    torch.testing.assert_close(probed.decoder(x), classes.vae.decode(x / classes.vae.config.scaling_factor).sample)
    with pytest.raises(NonAffineError, match="2 states for 1 samples on row 0"):
        read_pipeline(classes, STEPS, class_labels=[2, 0], guidance_scale=2.0)


def test_guidance_is_read_off(read):
    """u = (1 − w) u(∅) + w u(c), in the order of the pipeline's batch; FLUX has its guidance embedded."""
    assert read("Stable Diffusion XL")[1].denoiser.plan.calls[0].weights == pytest.approx((-4.0, 5.0), abs=1e-5)
    assert read("FLUX.1")[1].denoiser.plan.calls[0].weights == (1.0,)
    calls = read("Wan")[1].denoiser.plan.calls
    assert [call.weights for call in calls] == [pytest.approx((4.0,), abs=1e-5), pytest.approx((-3.0,), abs=1e-5)]


def refused(family, match, kind=NonAffineError, steps=STEPS, **options):
    given = {"prompts": family.prompts} | family.call | options
    with pytest.raises(kind, match=match):
        read_pipeline(family.pipeline, steps, **given)


def test_what_is_not_affine_is_refused_by_row(made):
    """Rescaled guidance divides by the standard deviation of the answers; a solver of second order remembers."""
    from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler

    family = made("Stable Diffusion XL")
    refused(family, "on row 0 its output is not affine", guidance_rescale=0.7)
    for scheduler, match in ((DPMSolverMultistepScheduler(), "solver_order=2"), (HeunDiscreteScheduler(), "timesteps")):
        pipeline = copy.copy(family.pipeline)
        pipeline.register_modules(scheduler=scheduler)
        refused(tiny_pipelines.Tiny(pipeline, family.call, family.prompts), match)


def test_noise_that_the_chain_cannot_see_is_refused_by_row(made):
    """A step that draws from a generator of its own, whatever generator the pipeline is given."""
    from diffusers import EulerDiscreteScheduler

    class Hidden(EulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            (y, *others) = super().step(model_output, timestep, sample, generator=generator, return_dict=False)
            self.calls = getattr(self, "calls", 0) + 1
            return (y + Noise(self.calls).normal(tuple(y.shape), 0), *others)

    family = made("Stable Diffusion XL")
    pipeline = copy.copy(family.pipeline)
    pipeline.register_modules(scheduler=Hidden.from_config(family.pipeline.scheduler.config))
    refused(
        tiny_pipelines.Tiny(pipeline, family.call, family.prompts),
        "row 0 .* random in a way that the generator does not control",
    )


def test_arguments_that_change_with_time_are_named(made):
    family = made("Stable Diffusion XL")

    class Changing(type(family.pipeline)):
        """Gives the network another scale of its adapters on every row."""

        @property
        def cross_attention_kwargs(self):
            self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
            return {"weight": torch.tensor([1.0, float(self.__dict__["calls"])])}

    pipeline = copy.copy(family.pipeline)
    pipeline.__class__ = Changing
    changed = tiny_pipelines.Tiny(pipeline, family.call | {"prompt_embeds": None}, family.prompts)
    refused(changed, r"argument cross_attention_kwargs\['weight'\] on row 1 differs")


def test_wrong_arguments_are_refused_before_the_pipeline_runs(made):
    family = made("FLUX.1")
    refused(family, "prompts must be a list of strings", InvalidInputError, prompts="a cat")
    refused(family, "size must be the height and the width", InvalidInputError, size=(3,))
    refused(family, "guidance is no argument to give to FluxPipeline", InvalidInputError, guidance=3)
    refused(family, "latents is no argument to give", InvalidInputError, latents=torch.zeros(1))
    refused(family, "for diffusion models", InvalidInputError, sampler="ddpm")
    with pytest.raises(InvalidInputError, match="pipeline must be of type DiffusionPipeline"):
        read_pipeline(3, 4)


def test_the_pipeline_itself_is_not_changed(made):
    """Neither its parts nor its scheduler, whatever happens during the run."""
    family = made("FLUX.1")
    before, timesteps = dict(vars(family.pipeline)), family.pipeline.scheduler.timesteps.clone()
    refused(family, "divisible|fails", InvalidInputError, max_sequence_length=10_000)
    read_pipeline(family.pipeline, 2, prompts=family.prompts, **family.call)
    assert vars(family.pipeline) == before
    assert torch.equal(family.pipeline.scheduler.timesteps, timesteps)


def test_size_is_height_and_width(made):
    family = made("Stable Diffusion XL")
    probed = read_pipeline(family.pipeline, 1, prompts=["a cat"], size=(16, 32), guidance_scale=1.0)
    assert probed.event_shape == (4, 8, 16) and len(probed.table) == 1
    assert probed.decoder(torch.zeros(1, 4, 8, 16)).shape == (1, 3, 16, 32)


LOAD = """
import sys
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], **dict.fromkeys(sys.argv[4:]))
weights = getattr(pipeline, sys.argv[2]).state_dict()
save_file({name: weight.contiguous() for name, weight in weights.items()}, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)
def test_two_updates_with_adapters_then_diffusers_alone(tmp_path, name):
    """A plan and a reward on images or frames; saved by diffusers and loaded again, it is the trained chain."""
    from diffusers import DiffusionPipeline

    family = tiny_pipelines.FAMILIES[name](tmp_path / "new")
    kind = default_sampler(family.pipeline.scheduler)
    probed = read_pipeline(family.pipeline, STEPS, prompts=family.prompts, sampler=kind, **family.call)
    reference = probed.chain().reference
    add_lora(probed.denoiser.model, 2, Noise(3))
    chain = probed.chain(reference=reference, pretrained_rows="noiseless")

    def redness(z):
        return probed.decoder(z)[:, 0].flatten(1).mean(1)

    plan = make_plan(evaluate(chain, Reward(redness), Noise(5), starts=4, repeats=2), [1.0])
    assert plan.reward_std > 0 and len(plan.rows()) == 1
    optimizer = torch.optim.Adam([p for p in probed.denoiser.parameters() if p.requires_grad], lr=1e-1)
    queue = Queue(chain, Reward(redness) + 0.1 * PathKL(), optimizer, batch=COUNT, noise=Noise(0), stride=STEPS)
    assert all(metrics["objective"].isfinite() for metrics in queue.run(2))

    trained = merged(probed.denoiser)
    part = "unet" if hasattr(family.pipeline, "unet") else "transformer"
    pipeline = copy.copy(family.pipeline)
    pipeline.register_modules(**{part: trained.model})
    pipeline.save_pretrained(tmp_path / "saved")
    empty = {name: None for name, module in pipeline.components.items() if module is None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", **empty)
    ours = read_pipeline(loaded, STEPS, prompts=family.prompts, **family.call)
    x, t = Noise(4).normal((COUNT, *probed.event_shape), 0), torch.full((COUNT,), float(probed.table.t[1]))
    which = {} if probed.condition is None else {"prompt": torch.arange(COUNT)}
    torch.testing.assert_close(ours.denoiser(x, t, **which), trained(x, t, **which), rtol=1e-4, atol=1e-4)
    assert (trained(x, t, **which) - reference(x, t, **which)).abs().max() > 1e-4
    out = tmp_path / "weights.safetensors"
    words = [str(tmp_path / "saved"), part, str(out), *empty]
    subprocess.run([sys.executable, "-c", LOAD, *words], check=True, timeout=600)
    there = load_file(out)
    assert all(torch.equal(there[key], weight) for key, weight in trained.model.state_dict().items())


@pytest.mark.slow
def test_the_page_lists_what_is_tested(made):
    page = Path(__file__).parents[2] / "docs" / "howto" / "any-pipeline.md"
    assert tiny_pipelines.markdown(made) in page.read_text(encoding="utf-8")
