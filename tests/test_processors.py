"""Image processors of pretrained models, compared with those of transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from turnover import InputError

transformers = pytest.importorskip("transformers", reason="pip install 'turnover[images,text]'")

from turnover.models.processors import Processor, load_processor  # noqa: E402

CLIP_SIZES = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {"size": {"height": 32, "width": 32}}),
    "deit": (
        "DeiT",
        {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}},
    ),
    "convnext": ("ConvNext", {"size": {"shortest_edge": 32}}),
    "convnext squashed": ("ConvNext", {"size": {"shortest_edge": 384}}),
    "clip": ("CLIP", CLIP_SIZES),
    "a crop larger than the image": (
        "CLIP",
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 33}},
    ),
    "not resized": ("CLIP", {**CLIP_SIZES, "do_resize": False}),
    "not normalized": ("ViT", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    "not rescaled": (
        "ViT",
        {"size": 32, "do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    ),
    "nearest": ("ViT", {"size": 32, "resample": 0, "image_mean": [0.1, 0.2, 0.3]}),
}


def saved(kind: str, where: Path, **settings: Any) -> Any:
    processor = getattr(transformers, f"{kind}ImageProcessor")(**settings)
    processor.save_pretrained(where)
    return processor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height"), [(40, 40), (61, 45), (19, 70), (401, 390)])
def test_pixels_are_those_of_the_models_own_processor(
    kind: str, width: int, height: int, tmp_path: Path
) -> None:
    name, settings = KINDS[kind]
    theirs = saved(name, tmp_path, **settings)
    ours = load_processor(str(tmp_path))
    values = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    pixels = ours.pixels(image, "image")
    assert pixels.dtype == np.uint8 and pixels.shape == (ours.size, ours.size, 3)
    found = ours.encode([pixels])
    wanted = theirs(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("ViT", {"size": {"height": 32, "width": 40}}, "images of one size are needed"),
        ("ViT", {"size": {"shortest_edge": 32}}, "takes no middle"),
        ("ViT", {"size": 9000}, "at most 4096"),
        ("ViT", {"size": 32, "image_std": [0.0, 1.0, 1.0]}, "deviation must be positive"),
        ("CLIP", {**CLIP_SIZES, "crop_size": {"height": 8, "width": 9}}, "square images"),
        ("Levit", CLIP_SIZES, "does more than resize"),
    ],
)
def test_other_processors_are_refused(
    name: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    saved(name, tmp_path, **settings)
    with pytest.raises(InputError, match=said) as refused:
        load_processor(str(tmp_path))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no image processor.*save_pretrained"):
        load_processor(str(tmp_path))


def test_code_beside_a_processor_is_not_run(tmp_path: Path) -> None:
    own = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_processor(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_line_of_pixels_is_refused() -> None:
    processor = Processor(32, 4000, False, 2, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(InputError, match=r"wide\.png: 9000 x 1 pixels, too long and narrow"):
        processor.pixels(Image.new("RGB", (9000, 1)), "wide.png")
