"""Hugging Face encoders with LoRA and a wide masked head, as a text classifier.

The base stays frozen and everything that is trained sits behind masks (LoRA rank components, the
head's units), so nothing that learns an instance is shared with its hidden sub-network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from turnover.data.base import Reader
from turnover.data.text import read
from turnover.dropout.head import WideHead
from turnover.errors import InputError, needing
from turnover.io.parsing import damage, field, read_object
from turnover.io.tensors import check_shapes, distinct, read_weights, shapes, take
from turnover.models.encoders import (
    Limits,
    first_line,
    limits_of,
    load_encoder,
    load_tokenizer,
    new_encoder,
    stored_dtype,
    vocabulary_of,
)

SITES = ("lora", "head")
_INDEX = ".safetensors.index.json"
_MOST_LABELS = 2**20
_ATTENTIONS = (None, "eager", "sdpa", "flex_attention")


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of a :class:`TextClassifier`.

    Attributes:
        model: Hugging Face name or folder of the encoder.
        head_units: mask units of the wide head.
        lora_rank: rank of the LoRA components; each is one mask unit.
        max_tokens: longer texts are cut.
    """

    kind: ClassVar[str] = "text"
    model: str
    head_units: int = 8192
    lora_rank: int = 16
    max_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("head_units", "lora_rank", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")

    def reader(self) -> Reader:
        """Function that reads labeled texts."""
        return read

    @property
    def sites(self) -> tuple[str, ...]:
        """What is masked by default: everything that is trained."""
        return SITES


class TextClassifier(nn.Module):
    """Frozen encoder with LoRA -> mean of the last layer's tokens -> :class:`~turnover.WideHead`.

    ``forward(input_ids, attention_mask, ...)``: int64 (rows, tokens) each; logits (rows, classes).

    Attributes:
        limits: what the encoder can take.
        stored: the kind of real numbers its checkpoint holds; here they are float32.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: WideHead,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        stored: str = "float32",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.limits = limits
        self.stored = stored

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits (rows, classes)."""
        logits: Tensor = self.head(self.features(input_ids, attention_mask, **inputs))
        return logits

    def features(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Mean of the last layer's tokens, float (rows, width)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None or hidden.shape[:2] != input_ids.shape:
            shape = "none" if hidden is None else f"of shape {tuple(hidden.shape)}"
            raise InputError(
                f"a text encoder gives a last_hidden_state for every token, of "
                f"{tuple(input_ids.shape)}; that of {type(self.encoder).__name__} is {shape}"
            )
        weights = attention_mask[..., None].to(hidden.dtype)
        pooled: Tensor = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return pooled


@contextmanager
def without_lora(model: TextClassifier) -> Iterator[None]:
    """The encoder as it was pretrained, while the body runs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.encoder.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def build(config: ClassifierConfig, classes: int) -> tuple[TextClassifier, Any]:
    """A new classifier on a pretrained encoder, and its tokenizer.

    New weights are drawn from torch's default generator: seed it, or fork it, outside.

    Raises:
        InputError: the model or its tokenizer cannot be loaded.
    """
    transformers = _transformers()
    _check_folder(config.model)
    try:
        _check_no_adapter(config.model)
        shape = _data_alone(transformers.AutoConfig, config.model)
        _check_attention(shape, config.model)
        _check_weights(shape, config.model)
        stored = stored_dtype(config.model)
        encoder = load_encoder(transformers, config.model, shape)
        tokenizer = load_tokenizer(transformers, config.model)
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds for files that are not its own
        raise InputError(f"model {config.model!r} cannot be loaded: {first_line(error)}") from error
    limits = limits_of(encoder, config.max_tokens)
    try:
        return _assemble(encoder, config, classes, limits, stored), tokenizer
    except Exception as error:  # of peft, or of a config without what encoders have
        raise InputError(
            f"model {config.model!r} ({type(encoder).__name__}) cannot be a text encoder with LoRA: "
            f"{first_line(error)}"
        ) from error


def save(
    folder: Path, model: TextClassifier, tokenizer: Any, config: ClassifierConfig, classes: int
) -> None:
    """Write weights (safetensors), shapes (JSON) and tokenizer into a folder."""
    from safetensors.torch import save_file

    encoder: Any = model.encoder
    encoder.config.dtype = torch.float32  # what the weights are now
    encoder.config.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    shape = {
        "classifier": asdict(config),
        "classes": classes,
        "positions": model.limits.positions,
    }
    (folder / "classifier.json").write_text(json.dumps(shape, indent=2) + "\n")
    tensors = {name: value.contiguous() for name, value in distinct(model).items()}
    save_file(tensors, folder / "model.safetensors")


def load(folder: Path) -> tuple[TextClassifier, Any, ClassifierConfig]:
    """Rebuild what :func:`save` wrote, from the folder alone.

    Raises:
        InputError: a missing or damaged file, or weights that do not fit the shapes.
    """
    transformers = _transformers()
    where, path = folder / "classifier.json", folder / "model.safetensors"
    try:
        shape = read_object(where)
        with damage(where):
            config = ClassifierConfig(**field(shape, "classifier", dict, where))
            classes = field(shape, "classes", int, where)
            has_limit = shape.get("positions") is not None
            positions = field(shape, "positions", int, where) if has_limit else None
        _check_lengths(folder / "encoder" / "config.json", len(shapes(path)))
        encoder_config = _data_alone(transformers.AutoConfig, folder / "encoder")
        _check_attention(encoder_config, folder / "encoder")
        tokenizer = _data_alone(transformers.AutoTokenizer, folder / "encoder")
        with torch.device("meta"):  # no memory is taken for what the file does not hold
            check_shapes(path, distinct(_anew(encoder_config, config, classes)))
        model = _anew(encoder_config, config, classes)
        take(model, read_weights(path, distinct(model)))
        model.limits = Limits(positions, model.limits.vocabulary)
    except Exception as error:  # of transformers and its libraries, whose validators have their own
        raise InputError(f"{folder}: the saved model is missing or damaged: {error}") from error
    return model.eval(), tokenizer, config


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, not padded."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)
    return list(encoded["input_ids"])


def _data_alone(kind: Any, source: str | Path, **options: Any) -> Any:
    """What a Hugging Face name or folder holds of a kind, none of its code run and none offered to be."""
    return kind.from_pretrained(source, trust_remote_code=False, **options)


def _check_folder(source: str) -> None:
    """Whether a folder of a model is there, and holds weights that are read.

    Raises:
        InputError: no such folder, or its weights are pickles alone.
    """
    path = Path(source)
    if not path.is_dir():
        if path.exists() or source.startswith(("/", ".", "~")):
            raise InputError(
                f"model {source!r}: there is no such folder; give the folder that save_pretrained wrote, or "
                f"a Hugging Face name"
            )
        return
    if any(path.glob("pytorch_model*.bin")) and not any(path.glob("*.safetensors")):
        raise InputError(
            f"model {source!r}: no file named model.safetensors, and a pickle (pytorch_model.bin) can run "
            f"code and is not read: load the model where you trust it, and save it with save_pretrained"
        )


def _check_no_adapter(source: str) -> None:
    """Transformers would load an adapter's weights too, which may be a pickle.

    Raises:
        InputError: an adapter.
    """
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(source) is not None:
        raise InputError(
            f"model {source!r} is or holds a PEFT adapter (adapter_config.json): merge it into its model "
            f"(merge_and_unload), save that and give its folder"
        )


def _check_attention(config: Any, source: str | Path) -> None:
    """Transformers takes the name of a repository for an attention, and runs the code in it.

    Raises:
        InputError: another attention than those of torch.
    """
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        asked = getattr(part, "_attn_implementation", None)
        if asked not in _ATTENTIONS:
            raise InputError(
                f"{source}: config.json asks for the attention {asked!r}, which may be code from elsewhere: "
                f"take attn_implementation out of it"
            )


def _check_weights(config: Any, source: str) -> None:
    """Transformers takes names of weights from files of the model, and those may be of pickles.

    Raises:
        InputError: a name of something else than safetensors.
    """
    from transformers.utils import cached_file

    own = getattr(config, "transformers_weights", None)
    index = own if str(own).endswith(_INDEX) else f"model{_INDEX}"
    path = cached_file(source, index, _raise_exceptions_for_missing_entries=False)
    names = {own} - {None}
    if path is not None:
        names |= set(json.loads(Path(path).read_text())["weight_map"].values())
    for name in names:
        if not str(name).endswith((".safetensors", _INDEX)):
            raise InputError(
                f"model {source!r} names {name!r} as its weights, which is not safetensors"
            )


def _anew(encoder_config: Any, config: ClassifierConfig, classes: int) -> TextClassifier:
    """A classifier of that shape, of new weights."""
    encoder = new_encoder(_transformers(), encoder_config)
    return _assemble(encoder, config, classes, Limits(vocabulary=vocabulary_of(encoder)))


def _check_lengths(path: Path, tensors: int) -> None:
    """Whether an encoder can have the layers its shape says, each of which has weights.

    Raises:
        InputError: more layers than the file has tensors, or labels by the million.
    """
    values = [read_object(path)]
    while values:
        for name, value in values.pop().items():
            if isinstance(value, dict):
                values.append(value)
            elif isinstance(value, int) and "layer" in name and value > tensors:
                raise InputError(f"{path}: {name} is {value}, of {tensors} tensors of weights")
            elif isinstance(value, int) and name == "num_labels" and value > _MOST_LABELS:
                raise InputError(f"{path}: {name} is {value}; take it out, as the head is another")


def _assemble(
    encoder: Any,
    config: ClassifierConfig,
    classes: int,
    limits: Limits,
    stored: str = "float32",
) -> TextClassifier:
    from peft import LoraConfig, inject_adapter_in_model

    encoder.requires_grad_(False)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        lora_dropout=0.0,
        target_modules=_lora_targets(encoder),
    )
    inject_adapter_in_model(lora, encoder)
    features = int(encoder.config.hidden_size)
    return TextClassifier(encoder, WideHead(features, config.head_units, classes), limits, stored)


def _lora_targets(encoder: Any) -> list[str] | str:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(encoder.config.model_type)
    return list(known) if known else "all-linear"


def _transformers() -> Any:
    with needing("a text model", "turnover[text]"):
        import peft  # noqa: F401
        import transformers
    transformers.utils.logging.disable_progress_bar()
    return transformers
