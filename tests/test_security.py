"""What is opened is data: no module can run code out of a file, and files made for that are refused."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("PIL")

import turnover as package
from code_of_data import RUNNING, found_in, opens_files
from test_cli import data, encoder, fit_arguments, turnover  # noqa: F401 - fixtures
from test_cli import run as text_run  # noqa: F401 - a fixture
from test_images import arrays, folders  # noqa: F401 - a fixture
from test_images import run as image_run  # noqa: F401 - a fixture
from turnover import InputError
from turnover.data.images import read_images
from turnover.data.text import load_table
from turnover.models.text import ClassifierConfig, build_classifier
from turnover.runs.run import Run, write_digests

SOURCE = Path(package.__file__).parent
BETWEEN_PROCESSES = ("parallel/ray_objects.py",)
"""Ray's transport pickles, from one of the user's own processes to another."""
OF_OUR_OWN_NAMES = ("report/render.py", "influence/gram/rules/__init__.py")
"""Import libraries by names written in the file, and the modules of their own folder."""


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_module_can_run_code_that_came_as_data(path: Path) -> None:
    name, text = path.relative_to(SOURCE).as_posix(), path.read_text()
    found = [one.partition(": ")[2] for one in found_in(text)]
    if name in BETWEEN_PROCESSES:
        found = [one for one in found if "pickle" not in one]
        assert not opens_files(text)
    if name in OF_OUR_OWN_NAMES:
        found.remove("a module whose name is computed")
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        *(f"import {module}" for module in sorted(RUNNING)),
        "from pickle import loads as read",
        "from ray import cloudpickle",
        "def f():\n    import pickle as p",
        "eval('1')",
        "f = exec",
        "from builtins import eval as f\nf('1')",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=True)",
        "from torch import load\nload(path)",
        "import numpy as np\nnp.load(path)",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "from numpy import load as read\nread(path, allow_pickle=flag)",
        "import os\nos.system('ls')",
        "import os as o\no.execv(path, [])",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_config(shape)",
        "frame.eval('a + b')",
        "archive.extractall(folder)",
        "environment.from_string(text)",
        "import importlib\nimportlib.import_module(name)",
        "run(command, shell=True)",
    ],
)
def test_such_code_would_be_found(source: str) -> None:
    assert list(found_in(source))


def test_words_alone_are_not_taken_for_code() -> None:
    assert not list(found_in('"""import pickle; eval(x)"""\nmodel.eval()  # torch.load(path)\n'))


class Bomb:
    """What makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    marker = tmp_path / "code was run"
    yield marker
    assert not marker.exists()


def as_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(marker)))


def as_torch(path: Path, marker: Path) -> None:
    torch.save({"head.weight": Bomb(marker)}, path)


def as_old_torch(path: Path, marker: Path) -> None:
    torch.save({"head.weight": Bomb(marker)}, path, _use_new_zipfile_serialization=False)


PICKLES = [as_pickle, as_torch, as_old_torch]


def test_a_pickle_that_is_read_would_be_noticed(tmp_path: Path) -> None:
    for number, write in enumerate(PICKLES):
        marker, path = tmp_path / f"marker {number}", tmp_path / f"{number}"
        write(path, marker)
        if write is as_pickle:
            pickle.loads(path.read_bytes()).close()
        else:
            torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.fixture
def copy(text_run: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(text_run, tmp_path / "run"))


@pytest.fixture
def copy_of_images(image_run: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(image_run, tmp_path / "images"))


@pytest.mark.parametrize("write", PICKLES)
def test_weights_that_are_a_pickle_are_refused(
    write: Callable[[Path, Path], None], copy: Path, copy_of_images: Path, marker: Path
) -> None:
    for folder in (copy, copy_of_images):
        write(folder / "model.safetensors", marker)
        write_digests(folder)
        with pytest.raises(InputError, match="the saved model is missing or damaged"):
            Run.load(folder)


@pytest.mark.parametrize("write", PICKLES)
def test_a_pickle_beside_the_weights_is_not_read(
    write: Callable[[Path, Path], None], copy: Path, marker: Path
) -> None:
    for name in ("pytorch_model.bin", "encoder/pytorch_model.bin", "encoder/vocab.pkl"):
        write(copy / name, marker)
    write_digests(copy)
    Run.load(copy)
    (copy / "model.safetensors").unlink()
    write_digests(copy)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        Run.load(copy)


def test_pixels_and_labels_that_are_objects_are_refused(
    copy_of_images: Path, tmp_path: Path, marker: Path
) -> None:
    bombs = np.array([Bomb(marker)] * 6, dtype=object)
    for name in ("image", "label"):
        path = arrays(tmp_path / f"{name}.npz", **{name: bombs})
        with pytest.raises(InputError, match="cannot be read as arrays"):
            read_images(str(path), 32)
    np.save(copy_of_images / "train.npy", bombs)
    write_digests(copy_of_images)
    with pytest.raises(InputError, match=r"train\.npy"):
        Run.load(copy_of_images)


def test_a_checkpoint_that_is_a_pickle_is_refused(
    encoder: Path,  # noqa: F811
    data: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    marker: Path,
) -> None:
    draft = tmp_path / ".run.partial"
    draft.mkdir()
    as_torch(draft / "turnover.checkpoint", marker)
    arguments = fit_arguments(data[0], encoder, tmp_path / "run", "--test", data[1])
    assert "damaged checkpoint" in turnover(*arguments, expect=2).stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pretrained(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", refuse)
    return Path(shutil.copytree(encoder, tmp_path / "pretrained"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        build_classifier(ClassifierConfig(str(folder), 8, 2), 2)
    return str(refused.value)


@pytest.mark.parametrize("write", PICKLES)
def test_pretrained_weights_that_are_a_pickle_are_refused(
    write: Callable[[Path, Path], None], pretrained: Path, marker: Path
) -> None:
    write(pretrained / "pytorch_model.bin", marker)
    build_classifier(ClassifierConfig(str(pretrained), 8, 2), 2)
    (pretrained / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(pretrained)
    torch.save({}, pretrained / "pytorch_model.bin")
    assert "no file named model.safetensors" in refusal(pretrained), "whatever is in it"
    write(pretrained / "model.safetensors", marker)
    assert "cannot be loaded" in refusal(pretrained)


@pytest.mark.parametrize(
    "where", ["config.json", "model.safetensors.index.json", "its.safetensors.index.json"]
)
def test_weights_that_the_model_names_are_safetensors_too(
    where: str, pretrained: Path, marker: Path
) -> None:
    as_torch(pretrained / "adapter_model.bin", marker)
    if where == "config.json":
        change(pretrained / where, transformers_weights="adapter_model.bin")
    else:
        index = {"metadata": {}, "weight_map": {"embeddings.weight": "adapter_model.bin"}}
        (pretrained / where).write_text(json.dumps(index))
        (pretrained / "model.safetensors").unlink()
        if where.startswith("its"):
            change(pretrained / "config.json", transformers_weights=where)
    assert "'adapter_model.bin' as its weights" in refusal(pretrained)


def test_weights_in_shards_are_read(pretrained: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(pretrained, trust_remote_code=False)
    (pretrained / "model.safetensors").unlink()
    model.save_pretrained(pretrained, max_shard_size="20KB")
    assert len(list(pretrained.glob("model-*.safetensors"))) > 1
    build_classifier(ClassifierConfig(str(pretrained), 8, 2), 2)


def test_a_list_of_weights_that_is_damaged_is_refused_in_a_line(pretrained: Path) -> None:
    for damaged in ("{", "{}", '{"weight_map": []}', "[]"):
        (pretrained / "model.safetensors.index.json").write_text(damaged)
        assert "cannot be loaded: " in refusal(pretrained)


def test_a_model_that_needs_another_package_is_refused_in_a_line(pretrained: Path) -> None:
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    change(pretrained / "config.json", quantization_config=quantised)
    assert "cannot be loaded: " in refusal(pretrained)


def test_an_adapter_is_refused_before_its_weights_are_looked_at(
    pretrained: Path, marker: Path
) -> None:
    as_torch(pretrained / "adapter_model.bin", marker)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "another/model"}
    (pretrained / "adapter_config.json").write_text(json.dumps(adapter))
    assert "merge it into its model" in refusal(pretrained)


CODE = "open({!r}, 'w').close()\nclass Its: pass\n"


@pytest.mark.parametrize("model_type", ["bert", "its-own"])
@pytest.mark.parametrize("kind", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(
    kind: str,
    model_type: str,
    pretrained: Path,
    copy: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")  # what would be asked is not
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    names = {
        "AutoConfig": "its.Its",
        "AutoModel": "its.Its",
        "AutoTokenizer": ["its.Its", "its.Its"],
    }
    for folder in (pretrained, copy / "encoder"):
        (folder / "its.py").write_text(CODE.format(str(marker)))
        if kind == "config.json":
            change(folder / kind, auto_map=names, model_type=model_type)
        else:
            own = {"tokenizer_class": "Its"} if model_type == "its-own" else {}
            change(folder / kind, auto_map=names, **own)
    write_digests(copy)
    for opening in (
        lambda: build_classifier(ClassifierConfig(str(pretrained), 8, 2), 2),
        lambda: Run.load(copy),
    ):
        try:
            opening()  # what transformers knows itself is loaded by its own code
        except InputError:
            assert model_type == "its-own"


@pytest.mark.parametrize(
    "asked", ["somebody/kernel", "kernels-community/flash-attn2", "flash_attention_2"]
)
def test_an_attention_from_elsewhere_is_refused(asked: str, pretrained: Path, copy: Path) -> None:
    for folder in (pretrained, copy / "encoder"):
        change(folder / "config.json", attn_implementation=asked)
    write_digests(copy)
    assert f"asks for the attention {asked!r}" in refusal(pretrained)
    with pytest.raises(InputError, match=f"asks for the attention {asked!r}"):
        Run.load(copy)


def test_a_data_set_that_is_a_script_is_refused(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "texts.py").write_text(CODE.format(str(marker)))
    (folder / "train.csv").write_text("text,label\na,b\n")
    with pytest.raises(InputError, match="texts"):
        load_table(str(folder), "train")
    as_pickle(tmp_path / "train.pkl", marker)
    with pytest.raises(InputError, match=r"cannot read \.pkl"):
        load_table(str(tmp_path / "train.pkl"), "train")
