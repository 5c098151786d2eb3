"""Text to token ids and back: `tokenizer.json`, the chat template, and a decoder for streamed output."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TURN_END = ("<turn|>", "<end_of_turn>")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, text that cannot be encoded, or a chat template that fails."""


class Tokenizer:
    """A checkpoint's tokenizer. `stop_ids` are the ids at which a reply ends, as the checkpoint's files state them;
    `turn_end_id` is the one of `<turn|>`, None where the vocabulary has no such token."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        stop_ids: Sequence[int] = (),
        source: str = "tokenizer",
    ):
        # A saved tokenizer may truncate or pad; a prompt must come through whole.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = {"bos_token": "<bos>", **(special_tokens or {})}
        self.chat_template = chat_template
        self.source = source
        bos = backend.token_to_id(self.special_tokens["bos_token"])
        if bos is None:
            raise TokenizerError(f"{source}: bos_token {self.special_tokens['bos_token']!r} is not in the vocabulary")
        self.bos_id: int = bos
        self.image_id: int | None = backend.token_to_id("<|image|>")
        """The token in whose place an image's soft tokens come; None in a vocabulary without images."""
        names = (self.special_tokens.get("eot_token"), *_TURN_END)
        ids = [backend.token_to_id(name) for name in names if name]
        self.turn_end_id: int | None = next((i for i in ids if i is not None), None)
        self.stop_ids = frozenset(stop_ids) | ({self.turn_end_id} - {None})
        self._skipped = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and, where present, tokenizer_config.json, chat_template.jinja and
        generation_config.json of the folder `path`, or what the GGUF file `path` holds. Raises FileNotFoundError,
        TokenizerError, GGUFError."""
        path = Path(path)
        if path.is_file() or path.suffix == ".gguf":
            from gemma4_impl.gguf.tokenizer import tokenizer_from_gguf

            return tokenizer_from_gguf(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder; a checkpoint folder holds tokenizer.json")
        file = path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; copy it from the checkpoint's original folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{file}: not a tokenizer ({_one_line(error)}); copy the file again") from None
        config = _read_json(path / "tokenizer_config.json")
        stop = _read_json(path / "generation_config.json").get("eos_token_id")
        stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
        if not all(type(i) is int for i in stop):
            raise TokenizerError(
                f"{path / 'generation_config.json'}: eos_token_id must be a token id or a list of them"
            )
        return cls(backend, _special_tokens(config), _chat_template(path, config), stop, str(path))

    def save(self, folder: Path) -> None:
        """Writes what `from_pretrained` reads: tokenizer.json, tokenizer_config.json, generation_config.json and, if
        there is a chat template, chat_template.jinja."""
        self._backend.save(str(folder / "tokenizer.json"))
        files: dict[str, dict[str, Any]] = {
            "tokenizer_config.json": self.special_tokens,
            "generation_config.json": {"eos_token_id": sorted(self.stop_ids)},
        }
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def id(self, token: str) -> int | None:
        """The id of a vocabulary's entry, spelt as it is stored; None if there is none."""
        return self._backend.token_to_id(token)

    def token(self, token: int) -> str | None:
        """The vocabulary's entry for the id `token`, as it is stored (spaces are ▁); None outside the vocabulary."""
        return self._backend.id_to_token(token) if 0 <= token < 1 << 32 else None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of `text`; with `bos` exactly one BOS comes first, also when the text brings its own.
        Special tokens written out in the text are recognised. Raises TokenizerError for lone surrogates."""
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise TokenizerError("the text is not valid Unicode; pass UTF-8 text") from None
        if not bos:
            return ids
        start = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [self.bos_id, *ids[start:]]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for `messages` (`{"role": ..., "content": ...}`), rendered as Hugging Face does.
        `variables` reach the template as they are (`tools`, `enable_thinking`). Raises TokenizerError."""
        if self.chat_template is None:
            raise TokenizerError(f"{self.source}: no chat template there; give the prompt as raw text (--raw)")
        context = {
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _environment().from_string(self.chat_template).render(context)
        except Exception as error:  # a template is a program of its own: it may fail in any way
            what = _one_line(error)
            if isinstance(error, jinja2.TemplateSyntaxError):
                what = f"line {error.lineno}: {what}"
            elif not isinstance(error, jinja2.TemplateError):
                what = f"{type(error).__name__}: {what}"
            raise TokenizerError(f"{self.source}: the chat template failed ({what})") from None


class StreamDecoder:
    """Decodes ids one at a time: the pieces that `push` and `finish` return join to `decode` of all ids.

    Byte tokens are held back until another token ends their run: only then is it known whether the bytes are
    UTF-8 (an invalid run is replaced as a whole). The cost of a push depends on that run alone."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._last: list[int] = []  # the last id decoded: some decoders treat the first token of a text apart
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Text that `token` completes, often its own, "" while bytes are held back."""
        if self._skip_special and token in self._tokenizer._skipped:
            return ""
        name = self._tokenizer.token(token)
        if name is None:
            return ""
        self._held.append(token)
        if _BYTE_TOKEN.fullmatch(name):
            return ""
        text = self._flush()
        self._last = [token]
        return text

    def finish(self) -> str:
        """The text still held back."""
        return self._flush()

    def _flush(self) -> str:
        before = self._tokenizer.decode(self._last, self._skip_special)
        text = self._tokenizer.decode(self._last + self._held, self._skip_special)
        self._held = []
        return text[len(before) :]


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, also from the nested objects that some transformers versions write."""
    nested = [config.get(key) for key in ("extra_special_tokens", "model_specific_special_tokens")]
    tokens = {}
    for mapping in (config, *(n for n in nested if isinstance(n, Mapping))):
        for key, value in mapping.items():
            content = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file}: not UTF-8 text ({error})") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{path / 'tokenizer_config.json'}: chat_template must be text")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: not valid JSON ({error}); copy the file again or remove it") from None
    if not isinstance(raw, dict):
        raise TokenizerError(f"{file}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
