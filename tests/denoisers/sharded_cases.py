"""Fine-tuning with weights that are shared out, in each of several processes; run by test_sharded.py."""

import os

import torch
from diffusers import UNet2DModel

from implicit_diffusion import Chain, Nested, Noise, PathKL, Queue, Reward, processes, read_table
from implicit_diffusion.denoisers import (
    DiffusersDenoiser,
    WithoutAdapter,
    add_lora,
    checkpoint_activations,
    frozen_copy,
)
from implicit_diffusion.denoisers.sharded import shard, whole_copy
from implicit_diffusion.errors import ProcessError
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.frozen import trained_state
from implicit_diffusion.loops import Update, predict_memory

N, B = 4, 4


def network():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return DiffusersDenoiser(unet.double()).eval()


def loop(kind, *, sharded, lora=False, accumulate=1, estimator=None):
    from diffusers import DDPMScheduler

    denoiser = network()
    if lora:
        add_lora(denoiser.model, 2, Noise(1))
        denoiser.double()
        checkpoint_activations(denoiser.model)
        reference = WithoutAdapter(denoiser)
    else:
        reference = frozen_copy(denoiser)
    if sharded:
        shard(denoiser)
        if not lora:
            shard(reference)
    table = read_table(DDPMScheduler(clip_sample=False), N)
    chain = Chain(denoiser, table, (1, 8, 8), reference=reference, pretrained_rows="noiseless")
    adam = torch.optim.Adam([p for p in denoiser.parameters() if p.requires_grad], lr=1e-3)
    update = Update(adam, max_grad_norm=0.5, accumulate=accumulate)
    objective = Reward(lambda x: x.flatten(1).mean(1)) + 0.3 * PathKL()
    if kind == "nested":
        return Nested(chain, objective, update, batch=B, noise=Noise(0), estimator=estimator)
    return Queue(chain, objective, update, batch=B, noise=Noise(0), stride=2, estimator=estimator)


def numbers(rows):
    return [{k: float(v) for k, v in row.items() if k != "phase"} for row in rows]


def trained(kind, sharded, updates=3, **options):
    """Metrics of the updates, and θ: the state of the whole run."""
    made = loop(kind, sharded=sharded, **options)
    metrics = numbers(made.run(updates))
    with processes.sharing():
        return metrics, trained_state(made.model)


def sizes():
    """Bytes that this process holds of weights, gradients and moments, and those that are predicted."""
    made = loop("nested", sharded=processes.world_size() > 1)
    next(made.run(1))
    held = [made.model, made.chain.reference]
    tensors = [p for module in held for p in module.parameters()]
    tensors += [p.grad for p in made.update.parameters]
    tensors += [t for s in made.update.optimizer.state.values() for t in s.values() if t.ndim]
    return sum(processes.own(t).nbytes for t in tensors), predict_memory(made).parameters


def interrupted(folder, sharded, kind="queue"):
    """Two updates, and the state of the whole run as a file."""
    made = loop(kind, sharded=sharded, accumulate=2)
    for metrics in made.steps(3):
        if metrics["updates"] == 2:
            break
    made.step()
    save_state(folder, made.state_dict())


def continued(folder, sharded, kind="queue"):
    made = loop(kind, sharded=sharded, accumulate=2)
    made.load_state_dict(load_state(folder))
    metrics = numbers(made.run(5))
    with processes.sharing():
        return metrics, trained_state(made.model)


def exported(folder):
    from diffusers import DDPMScheduler

    from implicit_diffusion.denoisers import merged
    from implicit_diffusion.models.pretrained import save_pipeline

    made = loop("nested", sharded=True)
    next(made.run(1))
    whole = whole_copy(made.model)
    processes.from_main(lambda: save_pipeline(folder, merged(whole), DDPMScheduler(), "A card.") and None)
    with processes.sharing():
        return trained_state(made.model)


def trained_with(kind, sharded, options):
    return trained(kind, sharded, **options)


def left_alone():
    """What a process sees whose peer ends before it calls its network."""
    made = loop("nested", sharded=True)
    next(made.run(1))
    if processes.rank() == 1:
        os._exit(7)
    try:
        next(made.run(2))
    except ProcessError as error:
        return str(error)
