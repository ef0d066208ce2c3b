"""`DiffusionModel` is checked when it is made, by two samples; opened, it computes what it is made of."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import implicit_diffusion as idf
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.own_models.files import load_own_weights, save_own_model
from implicit_diffusion.models.own_models.opened import ModuleDecoder, check_adapted, opened, weights_digest

TABLE = idf.tables.ou_reverse_sde(3, 1.0)


class Net(nn.Module):
    """u(x, t), linear in x."""

    def __init__(self, width=2, returns=lambda u: u):
        super().__init__()
        self.layer, self.returns, self.modes = nn.Linear(width, width), returns, []
        nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, x, t):
        self.modes.append(self.training)
        return self.returns(self.layer(x) * (1 + t[:, None].to(x.dtype)))


def model(**changes):
    return idf.DiffusionModel(**{"denoiser": Net(), "schedule": TABLE, "event_shape": (2,)} | changes)


class WithWords(Net):
    def get_extra_state(self):
        return "words"


def spoilt(value):
    net = Net()
    net.layer.weight.data[0, 0] = value
    return net


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": lambda x, t: x}, "denoiser must be of type Module, got function"),
        ({"denoiser": nn.Linear(2, 2)}, "denoiser must be a function that is called with x and t"),
        ({"denoiser": nn.Identity()}, "denoiser must be a function that is called with x and t"),
        ({"denoiser": nn.LazyLinear(2)}, "denoiser must be a function"),
        ({"denoiser": spoilt(torch.nan)}, "its weights 'layer.weight' hold NaN or infinity"),
        ({"denoiser": spoilt(torch.inf)}, "its weights 'layer.weight' hold NaN or infinity"),
        ({"denoiser": WithWords()}, "its state_dict holds '_extra_state' of type str"),
        ({"denoiser": Net(returns=lambda u: (u,))}, "what the denoiser returns must be of type Tensor, got tuple"),
        ({"denoiser": Net(returns=lambda u: u[:, :1])}, r"denoiser must return the shape of its input, \(2, 2\), got"),
        ({"denoiser": Net(returns=lambda u: u[:1])}, r"denoiser must return the shape of its input"),
        ({"denoiser": Net(returns=lambda u: u / 0)}, "denoiser must return finite floating-point numbers, got NaN"),
        ({"denoiser": Net(returns=lambda u: u.missing)}, "denoiser fails on states of shape .*: AttributeError"),
        ({"event_shape": (3,)}, r"denoiser fails on states of shape \(2, 3\)"),
        ({"event_shape": ()}, "event_shape must hold positive sizes"),
        ({"event_shape": (0,)}, "event_shape must hold positive sizes"),
        ({"event_shape": 2}, "event_shape must be"),
        ({"schedule": None}, "schedule must be a ChainTable or a scheduler of diffusers"),
        ({"schedule": DDPMScheduler}, "schedule must be a ChainTable or a scheduler of diffusers"),
        ({"num_classes": 3}, "denoiser fails on .*class_labels"),
        ({"num_classes": 0}, "num_classes must be an integer ≥ 1"),
        ({"decoder": 3}, "decoder must be a function"),
        ({"decoder": lambda z: z[:1]}, r"decoder must return one image for each of 2 states, shape \(2, ...\), got"),
        ({"decoder": lambda z: z.sum(1)}, "decoder must return one image for each of 2 states"),
        ({"decoder": lambda z: z > 0}, "decoder must return finite floating-point numbers, got torch.bool"),
        ({"decoder": lambda z: z / 0}, "decoder must return finite floating-point numbers, got NaN"),
        ({"decoder": lambda z: z @ torch.ones(3, 1)}, "decoder fails on states of shape"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_made(changes, message, as_users_run):
    with pytest.raises(InvalidInputError, match=message):
        model(**changes)


def test_a_network_without_parameters_cannot_be_trained():
    class Still(nn.Module):
        def forward(self, x, t):
            return x

    with pytest.raises(InvalidInputError, match="Still has no parameters that could be trained"):
        model(denoiser=Still())


def test_it_is_tried_in_evaluation_mode_in_its_own_precision_and_left_as_it_was():
    net = Net().double().train()
    made = model(denoiser=net, decoder=lambda z: z[:, :, None, None].expand(-1, -1, 4, 4))
    assert net.modes == [False] and net.training
    assert made.image_shape == (2, 4, 4) and model().image_shape == (2,)


def test_an_opened_model_has_what_a_checkpoint_has():
    net, scheduler = Net(), DDPMScheduler()
    ours = opened(model(denoiser=net, schedule=scheduler), "f.py:f")
    assert (ours.scheduler, ours.table, ours.condition, ours.family.latent, ours.decoder) == (
        scheduler,
        None,
        None,
        False,
        None,
    )
    assert opened(model(), "f.py:f").table is TABLE and opened(model(), "f.py:f").scheduler is None
    x, t = torch.randn(5, 2), torch.rand(5)
    assert torch.equal(ours.denoiser(x, t), net(x, t)) and not net.training
    ours.denoiser.precision = torch.bfloat16
    assert ours.denoiser(x, t).dtype == torch.float32 and not torch.equal(ours.denoiser(x, t), net(x, t))


def test_a_decoder_works_in_pieces_with_the_gradient_of_the_whole(monkeypatch):
    network = nn.Linear(2, 9).double()
    calls = []

    def decode(z):
        calls.append(len(z))
        return network(z).view(-1, 1, 3, 3)

    decoder = ModuleDecoder(decode, (1, 3, 3))
    decoder.at_once = 2
    z = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    (ours,) = torch.autograd.grad((decoder(z).square() * weight).sum(), z)
    assert calls == [2, 2, 1, 1, 2, 2]  # each part again in the backward pass
    (whole,) = torch.autograd.grad((network(z).view(-1, 1, 3, 3).square() * weight).sum(), z)
    assert torch.allclose(ours, whole, atol=1e-12)
    held = ModuleDecoder(nn.Sequential(network, nn.Unflatten(1, (1, 3, 3))), (1, 3, 3))
    assert not any(p.requires_grad for p in held.parameters()) and len(list(held.parameters())) == 2
    wrong = ModuleDecoder(lambda z: z[:1, None, None], (1, 1, 2))
    with pytest.raises(InvalidInputError, match=r"decoder must return shape \(5, 1, 1, 2\) for 5 states"):
        wrong(z)


class Attending(nn.Module):
    """u(x, t) by attention over the coordinates."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(1, 4), nn.Linear(4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x, t):
        h = self.up(x[..., None])
        return self.down(h + self.attention(h, h, h, need_weights=False)[0])[..., 0]


def test_adapters_that_the_network_does_not_call_are_refused():
    ours = opened(model(denoiser=Attending()), "x")
    idf.denoisers.add_lora(ours.denoiser.model, 2, idf.Noise(0), ["up", "down"])
    check_adapted(ours)
    ours = opened(model(denoiser=Attending()), "x")
    idf.denoisers.add_lora(ours.denoiser.model, 2, idf.Noise(0), ["up", "out_proj"])
    with pytest.raises(InvalidInputError, match=r"targets: an adapter of attention.out_proj has no effect"):
        check_adapted(ours)


def test_weights_go_to_disk_and_back_where_they_are_tied(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.again = self.layer
            self.register_buffer("count", torch.tensor(3))

    net = Tied().to(torch.bfloat16)
    save_own_model(tmp_path, opened(model(denoiser=net), "x").denoiser, "/f.py:f", "A card")
    digest, other = weights_digest(net), copy.deepcopy(net)
    with torch.no_grad():
        other.layer.weight.zero_()
    assert weights_digest(other) != digest
    load_own_weights(tmp_path, other)
    assert weights_digest(other) == digest
    with pytest.raises(InvalidInputError, match=r"again.bias is torch.bfloat16 \(2,\), and that of the network"):
        load_own_weights(tmp_path, Tied())
