"""Trained Hugging Face classifiers and PEFT adapters of them: loaded without code or pickles, in float32."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from turnover.data.base import Reader
from turnover.data.text import read
from turnover.errors import InputError
from turnover.io.parsing import read_object
from turnover.io.tensors import shapes
from turnover.models.encoders import (
    check_weights,
    config_of,
    first_line,
    float32_argument,
    hub_file,
    loading,
    stored_dtype,
    transformers_library,
)
from turnover.models.processors import image_reader

Takes = Literal["text", "image"]
ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HEADS = ("classifier", "score", "pre_classifier", "pooler", "classification_head")
"""Names of layers above an encoder that are saved with an adapter of a classifier."""
_LAST_HEADS = ("out_proj", "classifier", "score")
"""Those that may make the outputs, by preference."""
_SHOWN = 5


@dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
        model: in float32 and eval mode; parameters that a PEFT adapter leaves alone need no gradient.
        takes: what it classifies.
        names: its classes by index, as its config names them; empty if it does not.
        stored: type of the numbers in its checkpoint.
        base: folder or name of the model whose tokenizer or image processor it uses.
        adapter: PEFT's configuration of an adapter; ``None``: it is a whole model.
    """

    model: nn.Module
    takes: Takes
    names: tuple[str, ...]
    stored: str
    base: str
    adapter: Any = None

    def reader(self) -> Reader:
        """Function that reads labeled data as its tokenizer or image processor takes them."""
        return read if self.takes == "text" else image_reader(self.base)


def load_classifier(source: str) -> Classifier:
    """Load a classifier of texts or images, or a PEFT adapter of one on its base.

    Args:
        source: folder or Hugging Face name.

    Raises:
        InputError: no such model, custom code, weights that are pickles or that are missing, a model that is
            no classifier, or one of a regression or of several labels for each row.
    """
    with loading(source), _quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # new weights that an adapter replaces are part of the digest
        adapter_file = _adapter_file(source)
        if adapter_file is None:
            config = config_of(source)
            return Classifier(
                _whole(source, config).float().eval(),
                takes_of(config, source),
                _names(config),
                stored_dtype(source),
                source,
            )
        return _adapted(source, adapter_file)


def new_classifier(config: Any, adapter: Any = None) -> nn.Module:
    """Build a classifier with new weights, in float32, with an adapter if it has one."""
    with _quietly():
        model: nn.Module = _auto(config).from_config(config, trust_remote_code=False).float()
        if adapter is None:
            return model
        from peft import get_peft_model

        adapted: nn.Module = get_peft_model(model, adapter)
        return adapted


def takes_of(config: Any, source: str) -> Takes:
    """What a model classifies; refuse one that is not a classifier of one class for each row."""
    transformers = transformers_library()
    texts = type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    images = type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if not texts and not images:
        raise InputError(
            f"model {source!r} ({config.model_type}) is not a classifier of texts or images "
            f"(AutoModelForSequenceClassification, AutoModelForImageClassification)"
        )
    if config.problem_type in ("regression", "multi_label_classification"):
        raise InputError(
            f"model {source!r} predicts a {config.problem_type.replace('_', ' ')} target: one class for each "
            f"row is needed"
        )
    if config.num_labels < 2:
        raise InputError(
            f"model {source!r} has {config.num_labels} output (num_labels), which is a regression: a "
            f"classifier has two or more"
        )
    as_image = any(
        str(name).endswith("ForImageClassification") for name in config.architectures or ()
    )
    return "image" if images and (as_image or not texts) else "text"


def choose_layers(classifier: Classifier, layers: str) -> list[str]:
    """Names of the parameters whose gradients explain a classifier; all others need none from here on.

    Args:
        classifier: is changed.
        layers: ``"all"``: all trained parameters; ``"last"``: those of the encoder's last block and above;
            ``"head"``: those above the encoder; ``"lora"``: those of an adapter; or a glob pattern of names.

    Raises:
        InputError: nothing is chosen.
    """
    model = classifier.model
    trained = {
        name: one
        for name, one in model.named_parameters()
        if one.is_floating_point() and (classifier.adapter is None or one.requires_grad)
    }
    if layers in ("last", "head"):
        chosen = _uppermost(classifier, trained, block=layers == "last")
    elif layers == "lora":
        chosen = [name for name in trained if "lora_" in name]
    else:
        pattern = "*" if layers == "all" else layers
        chosen = fnmatch.filter(trained, pattern)
    if not chosen:
        some = ", ".join([*trained][:: -(-len(trained) // _SHOWN)])
        why = (
            "the model is no LoRA adapter"
            if layers == "lora"
            else "no trained parameter has that name"
        )
        raise InputError(
            f"layers {layers!r}: {why}; choose all, last, head, lora or a pattern such as '*layer.5*': its "
            f"{len(trained)} parameters are {some}, ..."
        )
    set_layers(model, chosen)
    return chosen


def set_layers(model: nn.Module, chosen: list[str]) -> None:
    """Let the chosen parameters, and no others, have gradients."""
    named = dict(model.named_parameters())
    missing = [name for name in chosen if name not in named]
    if missing:
        raise InputError(f"the model has no parameter {missing[0]!r}")
    model.requires_grad_(False)
    for name in chosen:
        named[name].requires_grad_(True)


def _uppermost(
    classifier: Classifier, trained: Mapping[str, nn.Parameter], *, block: bool
) -> list[str]:
    """Names of the parameters above the encoder, and with ``block`` of its last block and behind it."""
    model: Any = classifier.model
    if classifier.adapter is not None:
        model = model.get_base_model()
    encoder = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    below = set(encoder.parameters()) if isinstance(encoder, nn.Module) else set(trained.values())
    if block and isinstance(encoder, nn.Module) and (blocks := _blocks(encoder)) is not None:
        order = list(encoder.parameters())
        last = {*blocks[-1].parameters()}
        first = next((at for at, one in enumerate(order) if one in last), len(order))
        # Parameters are in the order of the forward, but for those that blocks share.
        below -= set(order[first:]) - {one for part in blocks[:-1] for one in part.parameters()}
    return [name for name, one in trained.items() if one not in below]


def _blocks(encoder: nn.Module) -> nn.ModuleList | None:
    """The outermost list of blocks of one kind, the last one registered; ``None`` without any."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in encoder.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if inside or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if len({type(one) for one in module}) == 1:
            found[name] = module
    return list(found.values())[-1] if found else None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what transformers and PEFT print of missing weights and moved files: it is checked here."""
    logging = transformers_library().utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _auto(config: Any) -> Any:
    transformers = transformers_library()
    if takes_of(config, config.model_type) == "image":
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


def _whole(source: str, config: Any, heads: Collection[str] = ()) -> nn.Module:
    """A model; only ``heads`` may be missing in its checkpoint, or of another shape."""
    takes_of(config, source)
    check_weights(config, source)
    model, found = _auto(config).from_pretrained(
        source,
        trust_remote_code=False,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        **float32_argument(),
    )
    for name, held, wanted in sorted(found["mismatched_keys"]):
        if name.partition(".")[0] in heads:
            continue
        raise InputError(
            f"model {source!r}: {name} is {tuple(held)} in its weights, and {tuple(wanted)} by its "
            f"config.json: they are not of the same model"
        )
    missing = [name for name in found["missing_keys"] if name.partition(".")[0] not in heads]
    if missing:
        raise InputError(
            f"model {source!r} lacks {len(missing)} weights of the classifier, such as {min(missing)}, which "
            f"would be random: give the folder of the model as it was trained and saved"
        )
    whole: nn.Module = model
    return whole


def _names(config: Any) -> tuple[str, ...]:
    """Classes by index; empty for names that transformers made up."""
    given = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    names = [given.get(index, f"LABEL_{index}") for index in range(config.num_labels)]
    made_up = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return () if made_up else tuple(names)


def _adapter_file(source: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / ADAPTER
        return path if path.is_file() else None
    if Path(source).exists() or source.startswith(("/", ".", "~")):
        return None  # config_of says that there is no such folder
    found = hub_file(source, ADAPTER)
    return None if found is None else Path(found)


def _adapted(source: str, adapter_file: Path) -> Classifier:
    """A PEFT adapter on its base, as it was trained: not merged."""
    given = read_object(adapter_file)
    base = given.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{adapter_file}: base_model_name_or_path does not name the adapter's model"
        )
    weights = _adapter_weights(source)
    held = shapes(weights)
    config = config_of(base)
    heads = {*_HEADS, *(given.get("modules_to_save") or ())}
    width = _outputs(held, heads)
    if width is None:
        raise InputError(
            f"adapter {source!r} holds no weights of a classifier above {base!r}: train it with "
            f"task_type=SEQ_CLS, or with the classifier in modules_to_save"
        )
    if width != config.num_labels:
        config.num_labels = width
    model = _whole(base, config, heads)
    try:
        settings = adapter_settings(given)
        adapted = _with_adapter(model.float(), settings, weights)
    except Exception as error:  # PEFT raises many kinds
        raise InputError(
            f"adapter {source!r} cannot be loaded on its base {base!r}: {first_line(error)}"
        ) from error
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = True  # what it was initialized by is in its weights
    own = Path(source).is_dir() and any(
        (Path(source) / name).is_file()
        for name in ("tokenizer_config.json", "preprocessor_config.json")
    )
    names = _names(config)
    takes = takes_of(config, base)
    stored = stored_dtype(base)
    return Classifier(
        adapted.float().eval(), takes, names, stored, source if own else base, settings
    )


def adapter_settings(values: Mapping[str, Any]) -> Any:
    """PEFT's configuration of a trained adapter, from its JSON."""
    from peft import PeftConfig

    if values.get("megatron_config"):
        raise InputError(f"{ADAPTER} has megatron_config, which imports code: it is not supported")
    settings = PeftConfig.from_peft_type(**values)
    if settings.is_prompt_learning:
        raise InputError(f"prompts as {settings.peft_type.value} learns them are not supported")
    settings.inference_mode = False  # its parameters are those that were trained
    return settings


def _with_adapter(model: nn.Module, settings: Any, weights: Path) -> nn.Module:
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    adapted: Any = get_peft_model(model, settings)
    found = set_peft_model_state_dict(adapted, load_file(weights))
    trained = {name for name, one in adapted.named_parameters() if one.requires_grad}
    lacking = sorted(trained & set(found.missing_keys))
    if lacking:
        raise InputError(
            f"{len(lacking)} parameters that it trained are not in its weights: {lacking[0]}"
        )
    whole: nn.Module = adapted
    return whole


def _adapter_weights(source: str) -> Path:
    folder = Path(source)
    found = folder / _ADAPTER_WEIGHTS if folder.is_dir() else hub_file(source, _ADAPTER_WEIGHTS)
    if found is None or not Path(found).is_file():
        raise InputError(
            f"adapter {source!r}: no file named {_ADAPTER_WEIGHTS}, and pickles (adapter_model.bin) can run "
            f"code and are not read: load the adapter where you trust it, and save it with save_pretrained"
        )
    return Path(found)


def _outputs(held: Mapping[str, tuple[int, ...]], heads: Collection[str]) -> int | None:
    """Number of outputs of the classifier among an adapter's weights."""
    weights = {
        name: shape[0]
        for name, shape in held.items()
        if set(heads) & set(name.split(".")) and "lora_" not in name and name.endswith("weight")
    }
    for preferred in _LAST_HEADS:
        found = [rows for name, rows in weights.items() if name.split(".")[-2] == preferred]
        if found:
            return found[0]
    return next(reversed(weights.values()), None)
