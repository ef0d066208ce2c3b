"""What in a model folder would make diffusers or transformers run code, or read files, from elsewhere.

Their loaders follow what JSON says. So it is looked at before they are called: a class must be of the kind that its
part of a pipeline has, and a config may name neither kernels on the hub nor a library that quantises.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from implicit_diffusion.extras import require
from implicit_diffusion.files.reading import read_json

ATTENTIONS = (None, "eager", "sdpa")  # of transformers; another name may be that of code on the hub


def part_class(part: str, library: str, name: str) -> Any:
    """The class of a part of a pipeline, which is one of the kind that the part has.

    Args:
        part: its name in model_index.json.
        library: that its class is from, "diffusers", "transformers" or "stable_diffusion".
        name: of the class.

    Raises:
        ValueError: the library has no such class.
        MissingExtraError: diffusers or transformers is not installed.
    """
    require("diffusers", "transformers")
    import diffusers
    import transformers

    if library == "stable_diffusion":
        from diffusers.pipelines import stable_diffusion as home
    else:
        home = {"diffusers": diffusers, "transformers": transformers}[library]
    kinds: Any
    what, kinds = "model", diffusers.ModelMixin | transformers.PreTrainedModel
    if part.startswith("tokenizer"):
        what, kinds = "tokenizer", transformers.PreTrainedTokenizerBase | transformers.ProcessorMixin
    elif part == "feature_extractor" or part.endswith("processor"):
        what = "processor"
        kinds = transformers.FeatureExtractionMixin | transformers.ImageProcessingMixin | transformers.ProcessorMixin
    named = getattr(home, name, None)
    if isinstance(named, type) and issubclass(named, kinds):
        return named
    raise ValueError(f"{library} has no {what} class {name!r}")


def refuse_code(described: Any) -> None:
    """Raise `ValueError` where a config names code that a library would fetch and run, or a library that quantises."""
    if isinstance(described, list):
        for item in described:
            refuse_code(item)
    if not isinstance(described, dict):
        return
    for key, value in described.items():
        if key.endswith("attn_implementation") and value not in ATTENTIONS:
            raise ValueError(f"its config asks for {key} = {value!r}; code from elsewhere is never run")
        if key == "quantization_config" and value is not None:
            raise ValueError("its weights are quantised; only weights in floating point are supported")
        refuse_code(value)


def without_places(path: Path) -> Path | bytes:
    """A tokenizer's config without paths of files and without code; the file itself where it names neither.

    Older tokenizers note where their vocabulary was when they were saved, and transformers would read it there.

    Raises:
        InvalidInputError: it is not JSON.
    """
    config = read_json(path)
    kept = {key: value for key, value in config.items() if key != "auto_map" and not key.endswith(("_file", "_files"))}
    return path if len(kept) == len(config) else json.dumps(kept, indent=2).encode()
