"""Chat records as text, through the tokenizer's chat template: what is given and what is to be answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from megatron_dlm.data.tokenizers.special_tokens import TOKENIZER_FILE
from megatron_dlm.interfaces import InputError

ASSISTANT = "assistant"
"""Role whose turns are learnt."""
ChatTurns = Literal["together", "apart"]


@dataclass(frozen=True)
class ChatTemplate:
    """How lists of messages become text.

    A template must write a conversation's beginning in the same way whatever follows, and must announce an
    assistant's turn by the text that `add_generation_prompt` adds: that is what a model is given when it is
    to answer.
    """

    render: Callable[[Sequence[dict[str, Any]], bool], str]
    """Text of messages; if the flag is set, with what announces an assistant's turn behind them."""
    source: str
    """The template itself."""
    turns: ChatTurns

    def documents(self, messages: object) -> list[list[str]]:
        """Turn one record into documents whose sequences are given text and assistant turns in turn.

        Args:
            messages: list of objects with the texts `role` and `content`, and what else the template uses.

        Returns:
            One document with all assistant turns, or one for each of them. What follows the last assistant
            turn is left out.

        Raises:
            ValueError: no such list, no assistant turn, or a conversation that the template does not take.
        """
        pieces = self._pieces(_checked(messages))
        if self.turns == "together":
            return [pieces]
        ends = range(1, len(pieces), 2)
        return [["".join(pieces[:end]), pieces[end]] for end in ends]

    def _pieces(self, messages: Sequence[dict[str, Any]]) -> list[str]:
        """Given text and assistant's turn in turn."""
        pieces: list[str] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            asked = self._rendered(messages[:number], announces=True)
            answered = self._rendered(messages[: number + 1], announces=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise ValueError(
                    f"the chat template changes what is before message {number} once that is answered"
                )
            pieces += [asked[len(done) :], answered[len(asked) :]]
            done = answered
        return pieces

    def _rendered(self, messages: Sequence[dict[str, Any]], *, announces: bool) -> str:
        try:
            return self.render(messages, announces)
        except Exception as error:  # a template raises Jinja's errors and any that its expressions raise
            raise ValueError(f"the chat template: {type(error).__name__}: {error}") from error


def load_chat_template(tokenizer: Path, file: Path | None, turns: ChatTurns) -> ChatTemplate:
    """Read the chat template of a Hugging Face tokenizer, or one from a file, as transformers renders it.

    Args:
        tokenizer: directory with tokenizer.json, and the template in tokenizer_config.json or
            chat_template.jinja.
        file: Jinja template that takes its place; None: the tokenizer's.
        turns: whether all assistant turns of a record are learnt together, or each in a document of its own.

    Returns:
        The template.

    Raises:
        InputError: transformers is not installed, or there is no template.
    """
    if find_spec("transformers") is None:
        raise InputError("chat_key: chat templates need transformers; install megatron-dlm[hf]")
    if not (tokenizer / TOKENIZER_FILE).is_file():
        raise InputError(f"chat_key: {tokenizer} is no directory of a Hugging Face tokenizer")
    from transformers import PreTrainedTokenizerFast

    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(str(tokenizer), local_files_only=True)
        if file is not None:
            loaded.chat_template = file.read_text(encoding="utf-8")
        template: str = loaded.get_chat_template()
    except OSError as error:
        raise InputError(f"chat_template: {file or tokenizer}: {error}") from error
    except ValueError as error:
        raise InputError(
            f"chat_template: {file or tokenizer}: no chat template, or none named default; --chat-template "
            "names a Jinja file"
        ) from error

    def render(messages: Sequence[dict[str, Any]], announces: bool) -> str:
        text = loaded.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=announces
        )
        assert isinstance(text, str)
        return text

    return ChatTemplate(render, template, turns)


def _checked(messages: object) -> Sequence[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("the chat is not a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is not an object")
        for name in ("role", "content"):
            value = message.get(name)
            if value is None:
                raise ValueError(f"message {number} has no {name}")
            if not isinstance(value, str):
                raise ValueError(f"message {number}: {name} is {type(value).__name__}, not a text")
    if messages[0]["role"] == ASSISTANT:
        raise ValueError("the chat begins with an assistant turn, which answers nothing")
    if all(message["role"] != ASSISTANT for message in messages):
        raise ValueError("the chat has no assistant turn")
    # A Parquet file has None where another of its messages has a value.
    return [{name: value for name, value in message.items() if value is not None} for message in messages]
