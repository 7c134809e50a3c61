"""From messages of a conversation to text, by a chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossworks.data.answers.examples import Example, Span
from lossworks.errors import UserError

_PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_ASSISTANT = "assistant"


class ChatTemplate:
    """A Jinja template as models of transformers have one; it runs in a sandbox.

    Args:
        source: The template.
        name: What messages call it.
        tokens: Special tokens that it may name, such as ``bos_token``.

    Raises:
        UserError: It is no template.
    """

    def __init__(self, source: str, name: str, tokens: dict[str, str] | None = None) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._name, self._tokens = name, tokens or {}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{name}: is no chat template: {error}") from None

    @classmethod
    def find(cls, path: str | None, tokenizer: str | None) -> "ChatTemplate":
        """Return the template of a file, that beside a tokenizer, or the plain one.

        Args:
            path: Of the file; None for the one beside the tokenizer.
            tokenizer: Path of a ``tokenizer.json``; None for none.

        Raises:
            UserError: A file can't be read.
        """
        if path is not None:
            return cls(_text(Path(path).expanduser(), "data.chat_template"), path)
        beside = None if tokenizer is None else Path(tokenizer).expanduser().parent
        if beside is not None and (beside / "chat_template.jinja").is_file():
            file = beside / "chat_template.jinja"
            return cls(_text(file, "data.chat_template"), str(file), _special(beside))
        config = {} if beside is None else _config(beside)
        source = config.get("chat_template")
        if isinstance(source, str):
            return cls(source, str(beside), _special(beside) if beside else None)
        return cls(_PLAIN, "the plain chat template")

    def example(self, messages: Sequence[dict[str, Any]], place: str) -> Example:
        """Return a conversation as spans, of which the assistant's messages count.

        Args:
            messages: Each with ``role`` and ``content``.
            place: For messages to a person.

        Raises:
            UserError: A message is none, none is the assistant's, or the template doesn't write messages one
                behind the other.
        """
        for message in messages:
            if not (
                isinstance(message, dict)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
            ):
                raise UserError(f"{place}: messages must be objects with role and content, both text")
        answers = [index for index, message in enumerate(messages) if message["role"] == _ASSISTANT]
        if not answers:
            raise UserError(f"{place}: messages hold none of the role {_ASSISTANT}, so there is no answer")
        spans: list[Span] = []
        done = ""
        for index in answers:
            if not messages[index]["content"].strip():
                raise UserError(f"{place}: message {index + 1}, of the {_ASSISTANT}, is empty")
            before = self._render(messages[:index], place, prompts=True)
            behind = self._render(messages[: index + 1], place, prompts=False)
            if not (before.startswith(done) and behind.startswith(before) and len(behind) > len(before)):
                raise UserError(
                    f"{place}: {self._name} doesn't write messages one behind the other, so that it can't be "
                    "told what the answer is"
                )
            spans += [Span(before[len(done) :], counts=False)] if len(before) > len(done) else []
            spans.append(Span(behind[len(before) :], counts=True))
            done = behind
        return tuple(spans)

    def prompt(self, messages: Sequence[dict[str, Any]], place: str) -> str:
        """Return the text that an answer to messages follows."""
        return self._render(messages, place, prompts=True)

    def _render(self, messages: Sequence[dict[str, Any]], place: str, *, prompts: bool) -> str:
        try:
            return str(
                self._template.render(messages=messages, add_generation_prompt=prompts, **self._tokens)
            )
        except Exception as error:  # noqa: BLE001 - a template of anybody's
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{place}: {self._name} can't write these messages: {reason}") from None


def _refuse(reason: str) -> None:
    """Raise what a template says is wrong."""
    raise ValueError(reason)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _special(folder: Path) -> dict[str, str]:
    """Return the special tokens that a tokenizer's configuration names."""
    found = {}
    for name, value in _config(folder).items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _text(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}={path}: can't be read: {error}") from None
