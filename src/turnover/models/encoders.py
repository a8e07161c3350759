"""Pretrained Hugging Face encoders and tokenizers: loaded without code or pickles, in float32, and checked.

Only the encoder of an encoder-decoder is used.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turnover.errors import InputError, needing
from turnover.io.parsing import read_object

_INDEX = ".safetensors.index.json"
_MOST_LABELS = 2**20
_ATTENTIONS = (None, "eager", "sdpa", "flex_attention")
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types of real numbers in safetensors that are converted to float32."""
_DTYPE_SINCE = (4, 56)
"""Release of transformers that renamed ``torch_dtype`` to ``dtype``."""
_TOKENS = 4
_SPACES = " \u2581\u0120"
"""Spaces, as tokenizers write them."""
_STATISTICS = ("running_mean", "running_var")
"""Buffers of batch norms, without which their outputs would be those of no model."""
_SEEN = 1000
"""Texts on which a tokenizer is tried."""
_log = logging.getLogger(__name__)


def load_pretrained(source: str) -> tuple[nn.Module, Any, str]:
    """Load an encoder of texts as :func:`load_encoder`, its tokenizer, and the type of its stored numbers."""
    encoder, stored = load_encoder(source, _some_tokens)
    return encoder, load_tokenizer(source), stored


def load_encoder(source: str, inputs: Callable[[Any], dict[str, Tensor]]) -> tuple[nn.Module, str]:
    """Load an encoder in float32 and eval mode, and the type of its stored numbers.

    Args:
        source: folder or Hugging Face name.
        inputs: makes inputs of one row for the encoder, on which all its weights must be known.
    """
    with loading(source):
        config = config_of(source)
        check_weights(config, source)
        stored = stored_dtype(source)
        return _load_encoder(transformers_library(), source, config, inputs), stored


def config_of(source: str) -> Any:
    """Load the config of a model, without its weights, and refuse one that could run code."""
    transformers = transformers_library()
    check_folder(source)
    with loading(source):
        _check_no_adapter(source)
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_attention(config, source)
        return config


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Convert whatever transformers raises to an error of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds for files that are not its own
        raise InputError(f"model {source!r} cannot be loaded: {first_line(error)}") from error


def load_saved(folder: Path, *, tensors: int) -> tuple[Any, Any]:
    """Load the config of a run's encoder of texts as :func:`load_config`, and its tokenizer."""
    config = load_config(folder, tensors=tensors)
    return config, transformers_library().AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False
    )


def load_config(folder: Path, *, tensors: int) -> Any:
    """Load the config of a run's encoder; ``tensors`` bounds its layers."""
    transformers = transformers_library()
    check_lengths(folder / "config.json", tensors)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_attention(config, folder)
    return config


def new_encoder(config: Any) -> nn.Module:
    """Build an encoder with new weights, in float32."""
    kind = _auto_class(transformers_library(), config)
    encoder: nn.Module = _encoder_of(kind.from_config(config, trust_remote_code=False), kind)
    return encoder.float()


def first_line(error: BaseException) -> str:
    """First line of an exception's message, and the second if the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return repr(error)
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _load_encoder(
    transformers: Any, source: str, config: Any, inputs: Callable[[Any], dict[str, Tensor]]
) -> nn.Module:
    kind = _auto_class(transformers, config)
    # A missing safetensors file is an error; a pickle never replaces it.
    model, found = kind.from_pretrained(
        source,
        trust_remote_code=False,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        **float32_argument(),
    )
    encoder: nn.Module = _encoder_of(model, kind).float().eval()
    if found["missing_keys"]:
        _check_complete(encoder, model, found["missing_keys"], source, inputs(encoder))
    return encoder


def float32_argument() -> dict[str, torch.dtype]:
    """Keyword of ``from_pretrained`` for weights in float32."""
    release = tuple(int(part) for part in transformers_library().__version__.split(".")[:2])
    return {"dtype" if release >= _DTYPE_SINCE else "torch_dtype": torch.float32}


def _check_complete(
    encoder: Any,
    model: nn.Module,
    missing: Collection[str],
    source: str,
    inputs: Mapping[str, Tensor],
) -> None:
    """Refuse a checkpoint without weights that hidden states depend on; a pooler may be missing."""
    wanted = {name: p for name, p in model.named_parameters() if name in missing}
    used: Sequence[Any] = [None] * len(wanted)
    try:
        with torch.enable_grad():
            total = encoder(**inputs).last_hidden_state.sum()
            used = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    except Exception:  # noqa: BLE001 - it fails again in training, where the message is shown
        _log.debug("cannot check for missing weights of %s", source, exc_info=True)
    random = [name for name, gradient in zip(wanted, used, strict=True) if gradient is not None]
    random += [name for name in missing if name.endswith(_STATISTICS)]
    if random:
        raise InputError(
            f"model {source!r} lacks {len(random)} weights of its encoder, such as {random[0]}, which would "
            f"be random: its config.json and its weights are not of the same model"
        )


def _some_tokens(encoder: Any) -> dict[str, Tensor]:
    tokens = torch.full((1, _TOKENS), token_of(encoder))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def token_of(encoder: Any) -> int:
    """Last token that is not the padding."""
    last = (getattr(encoder.config, "vocab_size", None) or 2 * _TOKENS) - 1
    return last - 1 if last == getattr(encoder.config, "pad_token_id", None) else last


def _auto_class(transformers: Any, config: Any) -> Any:
    # T5's encoders are saved under a class of their own, which AutoModel does not know.
    names = transformers.models.auto.modeling_auto
    kind = config.model_type
    own = names.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(kind, "")
    if own.endswith("EncoderModel") and kind in names.MODEL_MAPPING_NAMES:
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def _encoder_of(model: Any, kind: Any) -> Any:
    """Encoder of an encoder-decoder, or the model itself."""
    if kind.__name__ != "AutoModel" or not getattr(model.config, "is_encoder_decoder", False):
        return model
    encoder = model.get_encoder()
    if encoder.config.model_type == model.config.model_type:
        encoder.config.is_encoder_decoder = True  # so that its config builds it again
    return encoder


def stored_dtype(source: str) -> str:
    """Type of real numbers in a checkpoint, ``"float32"`` by default."""
    from safetensors import safe_open

    path = hub_file(source, next(iter(_listed_weights(source)), "model.safetensors"))
    if path is None:
        return "float32"
    with safe_open(path, framework="pt") as tensors:
        kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    return next((_DTYPES[kind] for kind in sorted(kinds & set(_DTYPES))), "float32")


def _listed_weights(source: str, index: str = f"model{_INDEX}") -> list[str]:
    """Files of weights that a model's index lists, if it has one."""
    path = hub_file(source, index)
    return [] if path is None else list(json.loads(Path(path).read_text())["weight_map"].values())


def hub_file(source: str, name: str) -> str | None:
    """Path of a model's file; ``None`` if the model has no such file."""
    from transformers.utils import cached_file

    path: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return path


def load_tokenizer(source: str) -> Any:
    """Load a tokenizer without code."""
    try:
        return transformers_library().AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for files that are not its own
        hint = ""
        if importlib.util.find_spec("sentencepiece") is None:
            hint = "; one without tokenizer.json may need: pip install sentencepiece protobuf"
        raise InputError(
            f"the tokenizer of {source!r} cannot be loaded: {first_line(error)}{hint}"
        ) from error


def check_tokenizer(tokenizer: Any, texts: Sequence[str], source: str) -> None:
    """Refuse a tokenizer that fails or knows no words: transformers builds some without their files.

    Warns:
        UserWarning: it knows words, but none of the texts.
    """
    try:
        found = {token for text in tokenizer(list(texts[:_SEEN]))["input_ids"] for token in text}
    except Exception as error:  # tokenizers raise many kinds
        raise InputError(
            f"the tokenizer of {source!r} fails on your texts: {first_line(error)}"
        ) from error
    special = set(tokenizer.all_special_ids)
    if _are_words(tokenizer.convert_ids_to_tokens(sorted(found - special))):
        return
    known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not _are_words(known):
        raise InputError(
            f"the tokenizer of {source!r} knows no word of the texts: are its files (tokenizer.json, or "
            f"its vocabulary) there? Save it beside the model with tokenizer.save_pretrained"
        )
    warnings.warn(
        f"the tokenizer of {source!r} knows no word of the texts, so their length alone tells them apart: "
        f"is it the tokenizer of this model, and are the texts in its language?",
        stacklevel=2,
    )


def _are_words(tokens: Iterable[object]) -> bool:
    return any(str(token).strip(_SPACES) for token in tokens)


def check_folder(source: str) -> None:
    """Refuse a folder that does not exist, or whose weights are pickles alone."""
    path = Path(source)
    if not path.is_dir():
        if path.exists() or source.startswith(("/", ".", "~")):
            raise InputError(
                f"model {source!r}: no such folder; give the folder that save_pretrained wrote, or "
                f"a Hugging Face name"
            )
        return
    if any(path.glob("pytorch_model*.bin")) and not any(path.glob("*.safetensors")):
        raise InputError(
            f"model {source!r}: no file named model.safetensors, and a pickle (pytorch_model.bin) can run "
            f"code and is not read: load the model where you trust it, and save it with save_pretrained"
        )


def _check_no_adapter(source: str) -> None:
    """Refuse an adapter: transformers would load its weights too, which may be a pickle."""
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(source) is not None:
        raise InputError(
            f"model {source!r} is or holds a PEFT adapter (adapter_config.json): merge it into its model "
            f"(merge_and_unload), save that and give its folder"
        )


def check_attention(config: Any, source: str | Path) -> None:
    """Refuse attentions other than torch's: transformers runs code of a repository named as one."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        asked = getattr(part, "_attn_implementation", None)
        if asked not in _ATTENTIONS:
            raise InputError(
                f"{source}: config.json asks for the attention {asked!r}, which may be code from elsewhere: "
                f"remove attn_implementation from it"
            )


def check_weights(config: Any, source: str) -> None:
    """Refuse weights that are not safetensors: the model's files may name pickles."""
    own = getattr(config, "transformers_weights", None)
    index = str(own) if str(own).endswith(_INDEX) else f"model{_INDEX}"
    for name in {own, *_listed_weights(source, index)} - {None}:
        if not str(name).endswith((".safetensors", _INDEX)):
            raise InputError(
                f"model {source!r} names {name!r} as its weights, which is not safetensors"
            )


def check_lengths(path: Path, tensors: int) -> None:
    """Refuse a config with more layers than the file has tensors, or labels by the million."""
    values = [read_object(path)]
    while values:
        for name, value in values.pop().items():
            if isinstance(value, dict):
                values.append(value)
            elif name == "depths" and isinstance(
                value, list
            ):  # layers of the stages of image encoders
                values.append({f"{name}[{i}], a number of layers": n for i, n in enumerate(value)})
            elif isinstance(value, int) and "layer" in name and value > tensors:
                raise InputError(f"{path}: {name} is {value}, of {tensors} tensors of weights")
            elif isinstance(value, int) and name == "num_labels" and value > _MOST_LABELS:
                raise InputError(f"{path}: {name} is {value}; remove it: this head is not used")


def transformers_library() -> Any:
    """Import transformers, and PEFT, which adapters need."""
    with needing("a pretrained encoder", "turnover[text]"):
        import peft  # noqa: F401
        import transformers
    transformers.utils.logging.disable_progress_bar()
    return transformers
