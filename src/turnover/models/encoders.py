"""Pretrained Hugging Face encoders and tokenizers: loaded without code or pickles, in float32, and checked.

Only the encoder of an encoder-decoder is used.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from turnover.errors import InputError, needing
from turnover.io.parsing import read_object

_INDEX = ".safetensors.index.json"
_MOST_LABELS = 2**20
_ATTENTIONS = (None, "eager", "sdpa", "flex_attention")
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types of real numbers in safetensors that are converted to float32."""
_DTYPE_SINCE = (4, 56)
"""Release of transformers that renamed ``torch_dtype`` to ``dtype``."""
_FEW, _MORE = 4, 8
"""Lengths of two texts, in tokens, that show which indices grow with the position."""
_SPACES = " \u2581\u0120"
"""Spaces, as tokenizers write them."""
_SEEN = 1000
"""Texts on which a tokenizer is tried."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits of an encoder.

    Attributes:
        positions: most tokens of a text; ``None``: no limit is known.
        vocabulary: number of token ids; ``None``: not known.
    """

    positions: int | None = None
    vocabulary: int | None = None

    def check(
        self, tokens: Sequence[Sequence[int]], keys: Sequence[str], max_tokens: int, tokenizer: Any
    ) -> None:
        """Refuse texts without tokens, with more tokens than positions, or with tokens without embedding."""
        for key, text in zip(keys, tokens, strict=True):
            if not text:
                raise InputError(
                    f"the text {key!r} has no token: the tokenizer leaves nothing of it"
                )
            if self.positions is not None and len(text) > self.positions:
                raise InputError(
                    f"--max-tokens is {max_tokens}, the model has {self.positions} positions, and the text "
                    f"{key!r} has {len(text)} tokens or more: fit with --max-tokens {self.positions}"
                )
            if self.vocabulary is not None and max(text) >= self.vocabulary:
                one = max(text)
                raise InputError(
                    f"the text {key!r} has the token {tokenizer.convert_ids_to_tokens(one)!r}, number {one} "
                    f"of the tokenizer, and the model has {self.vocabulary} embeddings: use the tokenizer "
                    f"of the model, or save the model with resize_token_embeddings"
                )


def load_pretrained(source: str) -> tuple[nn.Module, Any, str]:
    """Load an encoder in float32 and eval mode, its tokenizer, and the type of its stored numbers."""
    transformers = _transformers()
    _check_folder(source)
    try:
        _check_no_adapter(source)
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_attention(config, source)
        _check_weights(config, source)
        stored = _stored_dtype(source)
        return _load_encoder(transformers, source, config), _load_tokenizer(source), stored
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds for files that are not its own
        raise InputError(f"model {source!r} cannot be loaded: {first_line(error)}") from error


def load_saved(folder: Path, *, tensors: int) -> tuple[Any, Any]:
    """Load a run's encoder config and tokenizer; ``tensors`` bounds the layers of the config."""
    transformers = _transformers()
    _check_lengths(folder / "config.json", tensors)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_attention(config, folder)
    return config, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def new_encoder(config: Any) -> nn.Module:
    """Build an encoder with new weights, in float32."""
    kind = _auto_class(_transformers(), config)
    encoder: nn.Module = _encoder_of(kind.from_config(config, trust_remote_code=False), kind)
    return encoder.float()


def first_line(error: BaseException) -> str:
    """First line of an exception's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


def _load_encoder(transformers: Any, source: str, config: Any) -> nn.Module:
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    in_float32 = {"dtype" if release >= _DTYPE_SINCE else "torch_dtype": torch.float32}
    kind = _auto_class(transformers, config)
    # A missing safetensors file is an error; a pickle never replaces it.
    model, found = kind.from_pretrained(
        source,
        trust_remote_code=False,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        **in_float32,
    )
    encoder: nn.Module = _encoder_of(model, kind).float().eval()
    _check_complete(encoder, model, found["missing_keys"], source)
    return encoder


def _check_complete(encoder: Any, model: nn.Module, missing: Collection[str], source: str) -> None:
    """Refuse a checkpoint without weights that tokens' outputs depend on; a pooler may be missing."""
    wanted = {name: p for name, p in model.named_parameters() if name in missing}
    if not wanted:
        return
    inputs = torch.full((1, _FEW), _token(encoder))
    used: Sequence[Any] = [None] * len(wanted)
    try:
        with torch.enable_grad():
            output = encoder(input_ids=inputs, attention_mask=torch.ones_like(inputs))
            total = output.last_hidden_state.sum()
            used = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    except Exception:  # noqa: BLE001 - it fails again in training, where the message is shown
        _log.debug("cannot check for missing weights of %s", source, exc_info=True)
    random = [name for name, gradient in zip(wanted, used, strict=True) if gradient is not None]
    if random:
        raise InputError(
            f"model {source!r} lacks {len(random)} weights of its encoder, such as {random[0]}, which would "
            f"be random: its config.json and its weights are not of the same model"
        )


def _token(encoder: Any) -> int:
    """Last token that is not the padding."""
    last = (getattr(encoder.config, "vocab_size", None) or _MORE) - 1
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


def _stored_dtype(source: str) -> str:
    """Type of real numbers in a checkpoint, ``"float32"`` by default."""
    from safetensors import safe_open

    path = _file(source, next(iter(_listed_weights(source)), "model.safetensors"))
    if path is None:
        return "float32"
    with safe_open(path, framework="pt") as tensors:
        kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    return next((_DTYPES[kind] for kind in sorted(kinds & set(_DTYPES))), "float32")


def _listed_weights(source: str, index: str = f"model{_INDEX}") -> list[str]:
    """Files of weights that a model's index lists, if it has one."""
    path = _file(source, index)
    return [] if path is None else list(json.loads(Path(path).read_text())["weight_map"].values())


def _file(source: str, name: str) -> str | None:
    from transformers.utils import cached_file

    path: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return path


def _load_tokenizer(source: str) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(source, trust_remote_code=False)
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


def limits_of(encoder: Any, max_tokens: int) -> Limits:
    """Limits of an encoder, as far as they matter for texts of up to ``max_tokens``."""
    vocabulary = vocabulary_of(encoder)
    token = _token(encoder)
    positions = None
    for candidate in _tables_of_positions(encoder, token):
        # A table may hold bounded distances instead, or more rows than the encoder accepts tokens.
        if candidate < max_tokens and not _takes(encoder, token, candidate + 1):
            positions = candidate
            break
    return Limits(positions, vocabulary)


def vocabulary_of(encoder: Any) -> int | None:
    """Number of tokens with an embedding; ``None`` if it is not known."""
    try:
        table = encoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    asked = getattr(encoder.config, "vocab_size", None)
    rows = len(table.weight) if isinstance(table, nn.Embedding) else None
    return rows if rows == asked else None


def _tables_of_positions(encoder: Any, token: int) -> list[int]:
    """Possible numbers of positions: rows of tables whose last row in use moves with the last token."""
    few, more = _Lookups(), _Lookups()
    for lookups, tokens in ((few, _FEW), (more, _MORE)):
        with lookups:
            if not _takes(encoder, token, tokens):
                return []
    return sorted(
        rows - (last - (_FEW - 1))
        for (rows, last), (_, later) in zip(few.seen, more.seen, strict=False)
        if later - last == _MORE - _FEW
    )


def _takes(encoder: Any, token: int, tokens: int) -> bool:
    """Whether the encoder runs on a text of so many tokens."""
    inputs = torch.full((1, tokens), token)
    try:
        with torch.no_grad():
            encoder(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    except Exception:  # noqa: BLE001 - of any model
        _log.debug("the encoder fails on %d tokens", tokens, exc_info=True)
        return False
    return True


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the rows of every embedding table in use, and the largest index looked up."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default and args[1].numel():
            self.seen.append((len(args[0]), int(args[1].max())))
        return func(*args, **(kwargs or {}))


def _check_folder(source: str) -> None:
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


def _check_attention(config: Any, source: str | Path) -> None:
    """Refuse attentions other than torch's: transformers runs code of a repository named as one."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        asked = getattr(part, "_attn_implementation", None)
        if asked not in _ATTENTIONS:
            raise InputError(
                f"{source}: config.json asks for the attention {asked!r}, which may be code from elsewhere: "
                f"remove attn_implementation from it"
            )


def _check_weights(config: Any, source: str) -> None:
    """Refuse weights that are not safetensors: the model's files may name pickles."""
    own = getattr(config, "transformers_weights", None)
    index = str(own) if str(own).endswith(_INDEX) else f"model{_INDEX}"
    for name in {own, *_listed_weights(source, index)} - {None}:
        if not str(name).endswith((".safetensors", _INDEX)):
            raise InputError(
                f"model {source!r} names {name!r} as its weights, which is not safetensors"
            )


def _check_lengths(path: Path, tensors: int) -> None:
    """Refuse a config with more layers than the file has tensors, or labels by the million."""
    values = [read_object(path)]
    while values:
        for name, value in values.pop().items():
            if isinstance(value, dict):
                values.append(value)
            elif isinstance(value, int) and "layer" in name and value > tensors:
                raise InputError(f"{path}: {name} is {value}, of {tensors} tensors of weights")
            elif isinstance(value, int) and name == "num_labels" and value > _MOST_LABELS:
                raise InputError(f"{path}: {name} is {value}; remove it: this head is not used")


def _transformers() -> Any:
    with needing("a text model", "turnover[text]"):
        import peft  # noqa: F401
        import transformers
    transformers.utils.logging.disable_progress_bar()
    return transformers
