"""Tiny image–text models with random weights, in folders as complete as those on the hub."""

from tests.helpers import tiny

SIDE = 30  # of the images that they take
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": SIDE,
    "patch_size": 6,
}


def clip(folder, **options):
    """A CLIPModel with its processor, whose options may be changed."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=tiny.TEXT, vision_config=VISION | {"projection_dim": 16}, projection_dim=16)
    processor = _images("CLIPImageProcessor", folder, size={"shortest_edge": SIDE}, crop_size=SIDE, **options)
    return _saved(folder, tiny.seeded(CLIPModel, config), processor)


def siglip(folder):
    """A SiglipModel, which has no attention mask, a bias, and another processor."""
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(text_config=tiny.TEXT | {"projection_size": 16}, vision_config=VISION)
    size = {"height": SIDE, "width": SIDE}
    processor = _images("SiglipImageProcessor", folder, size=size, resample=2)
    return _saved(folder, tiny.seeded(SiglipModel, config), processor, model_input_names=["input_ids"])


def _images(name, folder, **options):
    """The image processor of that name, in the kind of it that is installed."""
    import json

    from transformers import AutoImageProcessor

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": name} | options))
    return AutoImageProcessor.from_pretrained(folder)


def _saved(folder, model, images, **options):
    words = tiny.tokenizer(folder.parent / f"{folder.name}-words")
    for name, value in options.items():
        setattr(words, name, value)
    for part in (model, images, words):
        part.save_pretrained(folder)
    return folder
