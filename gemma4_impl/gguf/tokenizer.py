"""The tokenizer that a GGUF file carries: its vocabulary, merges, token types, special ids and chat template."""

import re
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from gemma4_impl.gguf.reader import GGUFArray, GGUFFile
from gemma4_impl.tokenizer import Tokenizer, TokenizerError

_MODEL = "gemma4"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _LAST_TYPE = 1, 2, 3, 4, 6
_MOST_ADDED = 1 << 16  # a text is searched for all of them at once; Gemma has 24
_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "eot_token": "eot_token_id",
    "eom_token": "eom_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
# Special in Hugging Face's files; converters mark them user-defined, so that llama.cpp prints them.
_PRINTED = {
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|channel>",
    "<channel|>",
    '<|"|>',
}
# What Gemma's special tokens look like.
_MARKER = re.compile(r"<\|[^<>]*>|<[^<>]*\|>")
# A reply ends here whatever the file's ids say.
_STOPS = ("<eos>", "<turn|>", "<|tool_response>")


def tokenizer_from_gguf(source: str | Path | GGUFFile) -> Tokenizer:
    """The tokenizer of a GGUF file whose `tokenizer.ggml.model` is gemma4; nothing but the file is needed.

    Ids and text are those of the `tokenizer.json` that the file was made from. Where llama.cpp does otherwise:
    - `encode` puts exactly one BOS first. llama.cpp adds one also to a text that brings its own, and whatever
      `add_bos_token` says.
    - `decode` keeps every space; llama.cpp drops some before `.,?!'`. A run of bytes that are not UTF-8 becomes one
      U+FFFD for each byte; llama.cpp returns the bytes.
    - `<|channel>`, `<|tool_call>`, `<|"|>` and their like are special, and so left out of a reply's text; llama.cpp
      prints them.
    - Where special tokens overlap in a text, the leftmost is taken, and of those the longest; llama.cpp looks for the
      longest in the whole text first. A character that has neither a token nor all its byte tokens is the unknown
      token; llama.cpp drops the bytes that have none. Neither can happen in Gemma's own vocabulary.

    Converters mark special tokens that tokenizer_config.json does not name as normal: one that looks like `<|turn>` or
    `<turn|>`, and that no merge makes, is special nevertheless. `added_tokens` that are not special may come out as
    normal too, and are ordinary tokens then; Gemma's own files have none. A reply stops at the file's eos, eot and eom
    ids and, as in llama.cpp, at `<eos>`, `<turn|>` and `<|tool_response>`.

    Peak memory is about 20 times the size of the arrays, 0.3 GB for Gemma's own. Raises FileNotFoundError, GGUFError,
    and TokenizerError for arrays that are missing or do not fit together."""
    if isinstance(source, GGUFFile):
        return _Reader(source).tokenizer()
    with GGUFFile(source) as file:
        return _Reader(file).tokenizer()


class _Reader:
    """The `tokenizer.*` metadata of one file, checked."""

    def __init__(self, file: GGUFFile):
        self.path, self.metadata = file.path, file.metadata
        model = self.metadata.get("tokenizer.ggml.model")
        if model is None:
            what = "is missing: the file holds no tokenizer; give the model's own file or a checkpoint folder"
            raise self._error("tokenizer.ggml.model", what)
        if model != _MODEL:
            raise self._error("tokenizer.ggml.model", f"is {short(model)}; only {_MODEL!r} is supported")
        self.tokens = self._texts("tokenizer.ggml.tokens")
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        if len(self.vocab) < len(self.tokens):
            i = next(i for i, token in enumerate(self.tokens) if self.vocab[token] != i)
            what = f"holds {short(self.tokens[i])} twice, as {i} and {self.vocab[self.tokens[i]]}"
            raise self._error("tokenizer.ggml.tokens", what)

    def tokenizer(self) -> Tokenizer:
        special_tokens = self._special_tokens()
        merges = [text.partition(" ")[::2] for text in self._texts("tokenizer.ggml.merges")]
        backend = tokenizers.Tokenizer(self._bpe(merges, special_tokens.get("unk_token")))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        added = self._added_tokens(merges)
        backend.add_tokens(added)
        stops = [special_tokens.get(key) for key in ("eos_token", "eom_token")]  # `Tokenizer` adds the eot_token
        stops += [token.content for token in added if token.content in _STOPS]
        return Tokenizer(
            backend,
            special_tokens,
            self._chat_template(),
            [self.vocab[token] for token in stops if token is not None],
            str(self.path),
        )

    def _error(self, key: str, what: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: {key} {what}")

    def _array(self, key: str, text: bool) -> GGUFArray:
        array = self.metadata.get(key)
        if array is None:
            raise self._error(key, "is missing; convert the model again, with its tokenizer")
        if not isinstance(array, GGUFArray) or array.is_text != text:
            raise self._error(key, f"must be an array of {'strings' if text else 'numbers'}")
        return array

    def _texts(self, key: str) -> list[str]:
        return self._array(key, text=True).tolist()

    def _per_token(self, key: str) -> np.ndarray:
        array = self._array(key, text=False)
        if len(array) != len(self.tokens):
            raise self._error(key, f"has {len(array)} entries, but tokenizer.ggml.tokens has {len(self.tokens)}")
        return array.numpy()

    def _bpe(self, merges: list[tuple[str, str]], unknown: str | None) -> models.BPE:
        try:
            return models.BPE(self.vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        except Exception as error:  # the library raises plain Exception
            for i, pair in enumerate(merges):
                absent = next((token for token in (*pair, "".join(pair)) if token not in self.vocab), None)
                if absent is not None:
                    what = f"{i}, {short(' '.join(pair))}: {short(absent)} is not in tokenizer.ggml.tokens"
                    raise self._error("tokenizer.ggml.merges", f"merge {what}") from None
            raise self._error("tokenizer.ggml.merges", f"cannot be used ({' '.join(str(error).split())})") from None

    def _added_tokens(self, merges: list[tuple[str, str]]) -> list[AddedToken]:
        """The tokens that are recognised in a text before anything else."""
        key = "tokenizer.ggml.token_type"
        types = self._per_token(key)
        if "tokenizer.ggml.scores" in self.metadata:
            self._per_token("tokenizer.ggml.scores")
        wrong = np.flatnonzero((types < 0) | (types > _LAST_TYPE) | (types != np.floor(types)))
        if wrong.size:
            raise self._error(key, f"of token {wrong[0]} is {types[wrong[0]].item()}; 0 to {_LAST_TYPE} are known")
        stated = np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
        markers = [i for i, token in enumerate(self.tokens) if token[:1] == "<" and _MARKER.fullmatch(token)]
        markers = [i for i in markers if types[i] == _NORMAL]
        if markers:  # never in a released file: the set below takes time
            made = {"".join(pair) for pair in merges}
            markers = [i for i in markers if self.tokens[i] not in made]
        if len(stated) + len(markers) > _MOST_ADDED:
            raise self._error(key, f"makes {len(stated) + len(markers)} tokens special; at most {_MOST_ADDED} may be")
        added = []
        for i in sorted(stated + markers):
            token = self.tokens[i]
            special = types[i] != _USER_DEFINED or token in _PRINTED
            added.append(AddedToken(token, normalized=False, special=bool(special)))
        return added

    def _special_tokens(self) -> dict[str, str]:
        tokens = {}
        for name, key in _SPECIAL_IDS.items():
            key = f"tokenizer.ggml.{key}"
            i = self.metadata.get(key)
            if i is None:
                continue
            if type(i) is not int or not 0 <= i < len(self.tokens):
                raise self._error(key, f"= {short(i)}: must be a token id below {len(self.tokens)}")
            tokens[name] = self.tokens[i]
        return tokens

    def _chat_template(self) -> Any:
        template = self.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise self._error("tokenizer.chat_template", "must be a string")
        return template
