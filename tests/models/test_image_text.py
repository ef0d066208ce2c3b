"""Image–text models: prepared images and scores are those of transformers, and nothing else in a folder is used."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.image_text import Preparation, find_image_text, load_image_text
from implicit_diffusion.objectives import Reward
from implicit_diffusion.particles import Particles
from tests.helpers import image_text
from tests.objectives.contract import check

# Versions before 5 cannot load the tokenizer of these SigLIP folders, and know other keys of old weights.
of_five = pytest.mark.skipif(not hasattr(transformers, "CLIPImageProcessorPil"), reason="transformers before 5")

PROMPTS = ["a red cat", "dog, 3", "a red cat", "the sea at night. the sea at night"]  # the last is cut
KINDS = {"clip": image_text.clip, "siglip": image_text.siglip}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {kind: make(place / kind) for kind, make in KINDS.items()}


def pictures(height, width, channels=3, n=4):
    """Smooth images of whole levels, for which 8 bits lose nothing, in [−1, 1] and as pictures."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, channels, 7, 7, generator=g)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    levels = (127.5 + 80 * fine).clamp(0, 255).round()
    pixels = levels.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return levels / 127.5 - 1, [Image.fromarray(p[..., 0] if channels == 1 else p) for p in pixels]


@pytest.mark.parametrize("size", [(60, 75), (91, 64), (30, 30), (12, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_prepared_as_the_processor_does(kind, size, folders):
    """To the rounding of 8 bits after each pass; a crop or an interpolation that is off shows."""
    x, pils = pictures(*size)
    processor = AutoImageProcessor.from_pretrained(folders[kind])
    right = torch.as_tensor(np.stack(processor(images=pils, return_tensors="pt")["pixel_values"]))
    difference = (Preparation.of(processor)(x) - right).abs() * min(processor.image_std) * 255
    assert difference.max() < 2.5 and difference.mean() < 0.5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[of_five] * (kind == "siglip")) for kind in KINDS])
def test_scores_are_those_of_transformers(kind, channels, folders):
    """At the model's own size nothing is resized, and everything agrees to rounding."""
    x, pils = pictures(image_text.SIDE, image_text.SIDE, channels)
    model = AutoModel.from_pretrained(folders[kind]).eval()
    processor = AutoImageProcessor.from_pretrained(folders[kind])
    words = AutoTokenizer.from_pretrained(folders[kind])
    padding = {"clip": True, "siglip": "max_length"}[kind]
    tokens = words(PROMPTS, padding=padding, truncation=True, max_length=12, return_tensors="pt")
    pixels = processor(images=[p.convert("RGB") for p in pils], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        right = model(pixel_values=pixels, **tokens).logits_per_image
    ours = load_image_text(str(folders[kind]))
    assert torch.allclose(ours(x, PROMPTS), right.diagonal(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours(x, PROMPTS[1]), right[:, 1], rtol=1e-5, atol=1e-5)
    assert right.std() > 0.01  # they are not all the same


def test_the_gradient_is_that_of_finite_differences(folders):
    ours = load_image_text(str(folders["clip"])).double()
    x = (pictures(34, 40)[0][:2].double() * 0.9).requires_grad_()
    (gradient,) = torch.autograd.grad(ours(x, PROMPTS[:2]).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-6
    with torch.no_grad():
        slope = (ours(x + h * direction, PROMPTS[:2]) - ours(x - h * direction, PROMPTS[:2])).sum() / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4)
    assert all(not p.requires_grad for p in ours.parameters())
    check(Reward(lambda x: ours(x, "a cat")), Particles(x.detach()))


def test_what_is_not_shown_does_not_count(folders):
    ours = load_image_text(str(folders["clip"]))
    x = 2 * pictures(34, 40)[0]
    assert torch.equal(ours(x, PROMPTS), ours(x.clamp(-1, 1), PROMPTS))


def test_what_cannot_be_compared_is_refused(folders):
    ours = load_image_text(str(folders["clip"]))
    x = pictures(34, 40)[0]
    for images, prompts, message in (
        (x[:, :2], PROMPTS, r"got \(4, 2, 34, 40\)"),
        (x, PROMPTS[:3], "each of 4 images with a text, got"),
        (x, torch.arange(4), "give prompts, or one text for all images"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            ours(images, prompts)


# ------------------------------------------------------------------------------------------------ folders from anywhere


def changed(folder, tmp_path, file, **entries):
    """A copy of a folder with other entries in one of its files."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    described = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    (copy / file).write_text(json.dumps(described | entries))
    return str(copy)


def test_a_processor_that_does_something_else_is_refused(folders, tmp_path):
    for options in ({"resample": 1}, {"size": {"longest_edge": 30}}, {"crop_size": {"height": 40, "width": 40}}):
        folder = image_text.clip(tmp_path / str(len(list(tmp_path.iterdir()))))
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))
        with pytest.raises(InvalidInputError, match=r"image processor of .* cannot be used"):
            load_image_text(str(folder))


@of_five
def test_a_processor_is_compared_with_its_numbers(folders, monkeypatch):
    """Such as one that subtracts the mean after it has divided: its numbers would be read as those of another."""
    from transformers import CLIPImageProcessorPil

    right = CLIPImageProcessorPil.normalize
    monkeypatch.setattr(CLIPImageProcessorPil, "normalize", lambda self, *a, **k: right(self, *a, **k) + 0.1)
    with pytest.raises(InvalidInputError, match="makes of a picture is not what its numbers say"):
        load_image_text(str(folders["clip"]))


def test_other_models_and_damaged_ones_are_refused(folders, tmp_path):
    with pytest.raises(InvalidInputError, match="is not a folder; give the folder of an image–text model, or its hub"):
        find_image_text(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match=r"it has no config\.json; it holds"):
        find_image_text(str(tmp_path / "empty"))
    for file, entries, message in (
        ("config.json", {"architectures": ["NoSuchModel"]}, "no model class 'NoSuchModel'"),
        ("config.json", {"architectures": ["CLIPTextModel"]}, "cannot be loaded|does not compare images with texts"),
        ("config.json", {"architectures": None}, "names no class under architectures"),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            load_image_text(changed(folders["clip"], tmp_path, file, **entries))
        shutil.rmtree(tmp_path / "copy")
    copy = shutil.copytree(folders["clip"], tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"logit_scale": torch.tensor(float("nan"))}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInputError, match="'logit_scale' holds NaN"):
        load_image_text(str(copy))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InvalidInputError, match="only pickled weights"):
        load_image_text(str(copy))


@of_five
def test_weights_of_older_releases_hold_positions_as_well(folders, tmp_path):
    """Those of CLIP and of PickScore on the hub do."""
    copy = shutil.copytree(folders["clip"], tmp_path / "copy")
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(12)[None] for tower in ("text", "vision")}
    save_file(load_file(copy / "model.safetensors") | positions, copy / "model.safetensors", {"format": "pt"})
    x = pictures(34, 40)[0]
    assert torch.equal(load_image_text(str(copy))(x, PROMPTS), load_image_text(str(folders["clip"]))(x, PROMPTS))


def test_code_of_a_folder_is_never_run(folders, tmp_path):
    """Neither by its config, nor by those of its tokenizer and its processor."""
    for file, entries in (
        ("config.json", {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Words", None]}}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.Images"}}),
    ):
        copy = changed(folders["clip"], tmp_path, file, **entries)
        (tmp_path / "copy" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with contextlib.suppress(InvalidInputError):
            load_image_text(copy)
        assert not (tmp_path / "ran").exists()
        shutil.rmtree(tmp_path / "copy")


def test_files_from_elsewhere_are_not_read(folders, tmp_path):
    copy = shutil.copytree(folders["clip"], tmp_path / "copy")
    (tmp_path / "secret.json").write_text("{}")
    (copy / "vocab.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InvalidInputError, match="outside of the model's folder"):
        load_image_text(str(copy))
