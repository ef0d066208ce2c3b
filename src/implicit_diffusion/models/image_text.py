"""Image–text models of transformers, CLIP and those like it: how well an image matches a text.

    images x in [−1, 1]  →  resized, cropped and normalised by the processor's own numbers  →  image tower  ┐
    texts                →  tokens, padded to the model's length                            →  text tower   ┴→  logits

The score of an image is its entry in the model's `logits_per_image`: for CLIP e^τ cos(image, text), with the τ of the
model. Images are prepared in torch, so that the score is differentiable in their pixels. The processor of
transformers, which works on 8-bit pictures, is asked about one picture when a model is loaded: one that does something
else than `Preparation` is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.files.foreign import inside
from implicit_diffusion.files.reading import one_line, read_json
from implicit_diffusion.models.checkpoints import HUB_ID, Checkpoint, names_on_hub
from implicit_diffusion.models.parts import load_model, quiet, refused
from implicit_diffusion.models.pipeline_files import TABLES, listing, located, names_in, no_weights, weights
from implicit_diffusion.showing import ShownModule, of_network

MODEL, TOKENIZER, PROCESSOR = "model", "tokenizer", "feature_extractor"  # the parts
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # one of these describes the processor
MODES = {2: "bilinear", 3: "bicubic"}  # by the numbers of PIL
PROBED = 40, 52  # height and width of the picture that the processor is asked about
LEVELS = 3  # of 255, by which it may differ: the processor rounds to 8 bits after each of two passes
LONGEST = 512  # tokens


@dataclass(frozen=True)
class Preparation:
    """From images in [−1, 1] to the pixels that a model takes.

    Args:
        size: height and width to resize to; one number for the shorter edge; None to leave the size.
        mode: of the interpolation.
        crop: height and width of the centre that is kept; None for all.
        scale: of pixels in [0, 1], before they are normalised.
        mean: of each channel, that is subtracted.
        std: of each channel, that is divided by.
    """

    size: tuple[int, int] | int | None
    mode: str
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(processor: Any) -> Preparation:
        """The numbers of an image processor of transformers.

        Raises:
            ValueError: an interpolation, or a size, that is of another kind.
        """
        size = dict(processor.size or {})
        target: tuple[int, int] | int | None = None
        if processor.do_resize:
            whole = {"height", "width"} <= size.keys()
            target = (int(size["height"]), int(size["width"])) if whole else int(size["shortest_edge"])
        cropped = getattr(processor, "do_center_crop", None)
        crop = (int(processor.crop_size["height"]), int(processor.crop_size["width"])) if cropped else None
        normalised = processor.do_normalize
        return Preparation(
            target,
            MODES[int(processor.resample)],
            crop,
            255 * processor.rescale_factor if processor.do_rescale else 255.0,
            tuple(processor.image_mean) if normalised else (0.0,) * 3,
            tuple(processor.image_std) if normalised else (1.0,) * 3,
        )

    def __call__(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n 3 h w"]:
        """Pixels of images that count as black below −1 and as white above 1; grey ones become RGB."""
        pixels = (x * 0.5 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        if self.size is not None:
            size = self.size
            if isinstance(size, int):
                height, width = x.shape[2:]
                size = int(size * height / min(height, width)), int(size * width / min(height, width))
            for each in ((pixels.shape[2], size[1]), size):  # a bicubic kernel overshoots, and PIL cuts after each pass
                resized = torch.nn.functional.interpolate(pixels, each, mode=self.mode, antialias=True)
                pixels = resized.clamp(0, 1)
        if self.crop is not None:
            top, left = ((have - keep) // 2 for have, keep in zip(pixels.shape[2:], self.crop))
            pixels = pixels[..., max(top, 0) :, max(left, 0) :][..., : self.crop[0], : self.crop[1]]
        mean, std = (x.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        return (self.scale * pixels - mean) / std


class ImageText(ShownModule):
    """R(images, prompts): the logit of each image for its own prompt, differentiable in the image.

    Args:
        network: of transformers, whose result has `logits_per_image`; frozen here.
        preparation: of the images.
        tokenizer: of transformers.
        length: number of tokens that a text is padded, or cut, to.
    """

    def __init__(self, network: Any, preparation: Preparation, tokenizer: Any, length: int) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.preparation, self.tokenizer, self.length = preparation, tokenizer, length

    def _words(self) -> Iterable[str]:
        return (of_network(self.network),)

    def forward(self, images: Float[Tensor, "n C H W"], prompts: Any) -> Float[Tensor, " n"]:
        """The scores, in the dtype of the images.

        Args:
            images: grey or RGB, nominally in [−1, 1].
            prompts: a list of texts, one for each image, or one text for all.

        Raises:
            InvalidInputError: other samples, or something other than texts.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InvalidInputError(
                "an image–text model compares images (n, 1, H, W) or (n, 3, H, W) with texts, got "
                f"{tuple(images.shape)}"
            )
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(texts) != len(images) or not all(isinstance(text, str) for text in texts):
            raise InvalidInputError(
                f"an image–text model compares each of {len(images)} images with a text, got "
                f"{one_line(repr(prompts))[:80]}; give prompts, or one text for all images"
            )
        distinct = list(dict.fromkeys(texts))
        tokens = self.tokenizer(
            distinct, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        weight = next(self.network.parameters())
        pixels = self.preparation(images.to(weight.dtype))
        logits = self.network(pixel_values=pixels, **tokens.to(weight.device)).logits_per_image
        own = torch.tensor([distinct.index(text) for text in texts], device=logits.device)
        scores: Tensor = logits.gather(1, own[:, None])[:, 0]
        return scores.to(images.dtype)


def find_image_text(model: str) -> Checkpoint:
    """The image–text model called `model`, a folder or a hub id; nothing is loaded.

    Raises:
        InvalidInputError: nothing of that name exists or can be reached, or it lacks a part.
        MissingExtraError: a hub id, and huggingface_hub is not installed.
    """
    place = Path(model).expanduser()
    if place.is_dir():
        return _inspect(place)
    if HUB_ID.fullmatch(model) and not place.exists():
        return _from_hub(model)
    raise InvalidInputError(f"model: {model!r} is not a folder; give the folder of an image–text model, or its hub id")


def load_image_text(model: str) -> ImageText:
    """The scores of an image–text model of transformers, a folder or a hub id; of a folder nothing is executed.

    Raises:
        InvalidInputError: from `find_image_text`; damaged files, or parts that do not belong together; a model of
            another kind; a processor that does something else than `Preparation`.
        MissingExtraError: transformers is not installed.
    """
    require("transformers")
    from transformers import AutoImageProcessor, AutoTokenizer

    checkpoint = find_image_text(model)
    options = {"local_files_only": True, "trust_remote_code": False}
    with checkpoint.laid_out() as folder, quiet():
        try:
            processor = AutoImageProcessor.from_pretrained(str(folder / PROCESSOR), **options)
            preparation = _verified(processor)
        except Exception as error:  # transformers raises many
            raise refused("image processor", "used", error, checkpoint, folder, model) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder / TOKENIZER), **options)
            length = _length(tokenizer, read_json(folder / MODEL / "config.json"))
        except Exception as error:
            raise refused("tokenizer", "loaded", error, checkpoint, folder, model) from error

        def trial(network: Any) -> None:
            if not hasattr(network, "get_image_features"):
                raise InvalidInputError(
                    f"model: {model!r} is a {type(network).__name__}, which does not compare images with texts; use "
                    "a CLIPModel, a SiglipModel or the like"
                )
            with torch.device("meta"):
                pixels, tokens = torch.zeros(1, 3, *PROBED), torch.zeros(1, length, dtype=torch.long)
                network(pixel_values=preparation(pixels), input_ids=tokens)

        network = load_model(checkpoint, folder, MODEL, "image–text model", model, trial)
    return ImageText(network, preparation, tokenizer, length)


def _inspect(folder: Path) -> Checkpoint:
    names = names_in(folder)
    try:
        if "config.json" not in names or not any(name in names for name in PROCESSORS):
            lacking = "config.json" if "config.json" not in names else PROCESSORS[0]
            raise InvalidInputError(
                f"{folder} is not an image–text model of transformers with its processor: it has no {lacking}; it "
                f"holds {listing(names)}. Save both there, model.save_pretrained(folder) and "
                "processor.save_pretrained(folder)"
            )
        classes = read_json(inside(folder, folder / "config.json")).get("architectures")
        if not (isinstance(classes, list) and classes and isinstance(classes[0], str)):
            raise InvalidInputError(f"{folder / 'config.json'} names no class under architectures")
        parts = (MODEL, TOKENIZER, PROCESSOR)
        files = {name: file for part in parts for name, file in located(folder, folder, part, "transformers").items()}
    except InvalidInputError as error:
        raise InvalidInputError(f"model: {error}") from error
    index = {MODEL: ["transformers", classes[0]]}
    return Checkpoint(folder, folder, "", folder=folder, index=index, files=files)


def _from_hub(hub_id: str) -> Checkpoint:
    """As for pipelines: from the local cache if it is complete there, otherwise from the hub."""
    require("huggingface_hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _inspect(Path(snapshot_download(hub_id, local_files_only=True)))
    except (LocalEntryNotFoundError, InvalidInputError):
        pass
    names = {name for name in names_on_hub(hub_id, "give the folder") if "/" not in name}
    if not weights("transformers", names):
        raise InvalidInputError(f"model: {no_weights(hub_id, names)}")
    wanted = [*weights("transformers", names), *(name for name in names if name.endswith(TABLES))]
    return _inspect(Path(snapshot_download(hub_id, allow_patterns=wanted)))


def _verified(processor: Any) -> Preparation:
    """The preparation of a processor, compared with what the processor makes of a picture.

    Raises:
        ValueError: they differ.
    """
    require("PIL")
    from PIL import Image

    name = type(processor).__name__
    try:
        preparation = Preparation.of(processor)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a {name} of other options than can be done in torch ({one_line(error)})") from error
    height, width = (torch.linspace(0, 6, size) for size in PROBED)
    waves = torch.stack([torch.sin(height[:, None] * (1 + c) + width**1.5) for c in range(3)])
    levels = (127.5 + 120 * waves).round()
    picture = Image.fromarray(levels.permute(1, 2, 0).to(torch.uint8).numpy())
    theirs = torch.as_tensor(processor(images=picture, return_tensors="pt")["pixel_values"])
    ours = preparation(levels[None] / 127.5 - 1)
    allowed = LEVELS * preparation.scale / 255 / min(preparation.std)
    if theirs.shape != ours.shape or not (theirs - ours).abs().max() <= allowed:
        raise ValueError(f"what a {name} makes of a picture is not what its numbers say: they cannot be done in torch")
    return preparation


def _length(tokenizer: Any, config: Any) -> int:
    """Number of tokens of every text: as many as model and tokenizer can have."""
    text = config.get("text_config")
    positions = text.get("max_position_embeddings") if isinstance(text, dict) else None
    known = [each for each in (tokenizer.model_max_length, positions) if isinstance(each, int)]
    return min(*known, LONGEST)
