"""Pretrained Hugging Face encoders: their weights in float32, and what they can take.

An encoder-decoder is taken for its encoder alone.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from turnover.errors import InputError

_INDEX = ".safetensors.index.json"
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Of real numbers in safetensors: those that become float32."""
_DTYPE_SINCE = (4, 56)
"""The release of transformers from which ``torch_dtype`` is called ``dtype``."""
_FEW, _MORE = 4, 8
"""Tokens of two texts that show which numbers grow with the position."""
_SPACES = " \u2581\u0120"
"""How tokenizers write a space."""
_SEEN = 1000
"""Texts on which a tokenizer is tried."""


@dataclass(frozen=True)
class Limits:
    """What an encoder can take.

    Attributes:
        positions: tokens of the longest text; ``None``: no limit is known.
        vocabulary: token ids lie below; ``None``: not known.
    """

    positions: int | None = None
    vocabulary: int | None = None

    def check(
        self, tokens: Sequence[Sequence[int]], keys: Sequence[str], max_tokens: int, tokenizer: Any
    ) -> None:
        """Whether the encoder can take these texts.

        Raises:
            InputError: a text without tokens, of more tokens than there are positions, or with a token
                that has no embedding; its key is named.
        """
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
                    f"of the tokenizer, and the model has {self.vocabulary} embeddings: take the tokenizer "
                    f"of the model, or save the model with resize_token_embeddings"
                )


def load_encoder(transformers: Any, source: str, config: Any) -> nn.Module:
    """A pretrained encoder in float32, of safetensors alone and in eval mode.

    Raises:
        InputError: the checkpoint lacks weights that the encoder uses, which would be random.
    """
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    in_float32 = {"dtype" if release >= _DTYPE_SINCE else "torch_dtype": torch.float32}
    kind = _kind(transformers, config)
    # A missing safetensors file is an error, and not made good for by a pickle.
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
    """A checkpoint may lack a pooler or a decoder, but nothing that a token's output hangs on."""
    wanted = {name: p for name, p in model.named_parameters() if name in missing}
    if not wanted:
        return
    inputs = torch.full((1, _FEW), _token(encoder))
    used: Sequence[Any] = [None] * len(wanted)
    # A model that fails here fails again where what it says is shown.
    with suppress(Exception), torch.enable_grad():
        output = encoder(input_ids=inputs, attention_mask=torch.ones_like(inputs))
        total = output.last_hidden_state.sum()
        used = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    random = [name for name, gradient in zip(wanted, used, strict=True) if gradient is not None]
    if random:
        raise InputError(
            f"model {source!r} lacks {len(random)} weights of its encoder, such as {random[0]}, which would "
            f"be random: its config.json and its weights are not of the same model"
        )


def _token(encoder: Any) -> int:
    """A token that is not the padding: the last one."""
    last = (getattr(encoder.config, "vocab_size", None) or _MORE) - 1
    return last - 1 if last == getattr(encoder.config, "pad_token_id", None) else last


def new_encoder(transformers: Any, config: Any) -> nn.Module:
    """An encoder of that shape, of new weights in float32."""
    kind = _kind(transformers, config)
    encoder: nn.Module = _encoder_of(kind.from_config(config, trust_remote_code=False), kind)
    return encoder.float()


def _kind(transformers: Any, config: Any) -> Any:
    # T5's encoders are saved under a class of their own, which AutoModel does not know.
    names = transformers.models.auto.modeling_auto
    kind = config.model_type
    own = names.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(kind, "")
    if own.endswith("EncoderModel") and kind in names.MODEL_MAPPING_NAMES:
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def _encoder_of(model: Any, kind: Any) -> Any:
    """The model, or the encoder of one that has a decoder too."""
    if kind.__name__ != "AutoModel" or not getattr(model.config, "is_encoder_decoder", False):
        return model
    encoder = model.get_encoder()
    if encoder.config.model_type == model.config.model_type:
        encoder.config.is_encoder_decoder = True  # so that its own config builds it again
    return encoder


def stored_dtype(source: str) -> str:
    """The kind of real numbers that a checkpoint holds, ``"float32"`` where it says nothing else."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def found(name: str) -> Any:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)

    listed, name = found(f"model{_INDEX}"), "model.safetensors"
    if listed is not None:
        name = next(iter(json.loads(Path(listed).read_text())["weight_map"].values()))
    path = found(name)
    if path is None:
        return "float32"
    with safe_open(path, framework="pt") as tensors:
        kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    return next((_DTYPES[kind] for kind in sorted(kinds & set(_DTYPES))), "float32")


def load_tokenizer(transformers: Any, source: str | Path) -> Any:
    """The tokenizer of a Hugging Face name or folder.

    Raises:
        InputError: it is missing or cannot be loaded.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for files that are not its own
        hint = ""
        if importlib.util.find_spec("sentencepiece") is None:
            hint = "; one without tokenizer.json may need: pip install sentencepiece protobuf"
        raise InputError(
            f"the tokenizer of {str(source)!r} cannot be loaded: {first_line(error)}{hint}"
        ) from error


def check_tokenizer(tokenizer: Any, texts: Sequence[str], source: str) -> None:
    """Whether a tokenizer knows words: without its files some are made all the same, and empty.

    Warns:
        UserWarning: it knows words, but none of the texts'.

    Raises:
        InputError: it fails, or knows no words.
    """
    try:
        found = {token for text in tokenizer(list(texts[:_SEEN]))["input_ids"] for token in text}
    except Exception as error:  # of any tokenizer
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
    """What an encoder can take, in as far as it matters for texts of up to so many tokens."""
    vocabulary = vocabulary_of(encoder)
    token = _token(encoder)
    positions = None
    for candidate in _tables_of_positions(encoder, token):
        # A table may be of distances, which are bounded, or be larger than what is let into it.
        if candidate < max_tokens and not _takes(encoder, token, candidate + 1):
            positions = candidate
            break
    return Limits(positions, vocabulary)


def vocabulary_of(encoder: Any) -> int | None:
    """How many tokens have an embedding; ``None`` where that is not known."""
    try:
        table = encoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    asked = getattr(encoder.config, "vocab_size", None)
    rows = len(table.weight) if isinstance(table, nn.Embedding) else None
    return rows if rows == asked else None


def _tables_of_positions(encoder: Any, token: int) -> list[int]:
    """How many positions there may be: of tables whose last row in use moves with the last token."""
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
    """Whether a text of so many tokens runs."""
    inputs = torch.full((1, tokens), token)
    with suppress(Exception), torch.no_grad():
        encoder(input_ids=inputs, attention_mask=torch.ones_like(inputs))
        return True
    return False


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rows of every table that is looked up, and the last of them that is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default and args[1].numel():
            self.seen.append((len(args[0]), int(args[1].max())))
        return func(*args, **(kwargs or {}))


def first_line(error: BaseException) -> str:
    """What an exception says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)
