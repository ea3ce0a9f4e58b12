# SPDX-License-Identifier: Apache-2.0
"""Registrations of the oldest form → those of today.

Of a language model, their `prompt_style` says in a few fields what a chat template says now. A
style that is known here becomes a Jinja template; another one is refused with the rest converted,
to be completed. Models that embed or rerank had one variant, whose fields stood beside the others.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from xinference.errors import InvalidRequest

PROMPT_STYLE = "prompt_style"
_NO_FAMILY = "other"
"""What such registrations call a family that is none of the built-in ones."""
_FILES_FIELDS = ("model_id", "model_revision", "model_hub", "model_uri")
"""Where the files are: of a spec today, of the model itself in such a registration."""

_ASK = "{% if add_generation_prompt %}"
_END = "{% endif %}"
_EACH = "{% for message in messages %}"
_DONE = "{% endfor %}"
_CONTENT = "{{ message['content'] }}"


def converted(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a registration of today's form.

    Args:
        given: one with a `prompt_style`.

    Raises:
        InvalidRequest: the style is unknown, or no style; with what else the registration becomes.
    """
    today = {name: value for name, value in given.items() if name != PROMPT_STYLE}
    today["version"] = 2
    if today.get("model_family") == _NO_FAMILY:
        del today["model_family"]
    style = given[PROMPT_STYLE]
    if style is None:
        return today
    if not isinstance(style, Mapping):
        raise InvalidRequest(field=PROMPT_STYLE, problem=f"must be an object, got {style!r:.100}")
    for name in ("stop", "stop_token_ids"):
        if style.get(name):
            today.setdefault(name, style[name])
    if today.get("chat_template"):
        return today
    name = str(style.get("style_name", ""))
    write = _STYLES.get(name.upper())
    if write is None:
        shown = json.dumps({**today, "chat_template": "…"}, ensure_ascii=False)
        raise InvalidRequest(
            field=PROMPT_STYLE,
            problem=f"of the style {name!r:.60} cannot be converted; write its template as "
            f"chat_template (Jinja), or leave that out for the tokenizer's own: {shown:.2000}",
        )
    today["chat_template"] = write(_Style(style))
    return today


def with_specs(given: dict[str, Any]) -> dict[str, Any]:
    """Return the registration of a model that embeds or reranks with its variant as a spec."""
    files = {name: given[name] for name in _FILES_FIELDS if name in given}
    if not files or "model_specs" in given:
        return given
    today = {name: value for name, value in given.items() if name not in files}
    return today | {"model_specs": [{"model_format": "pytorch", **files}]}


class _Style:
    """The fields of a `prompt_style`."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        roles = given.get("roles")
        if not isinstance(roles, list) or len(roles) != 2:
            roles = ["user", "assistant"]
        self.user, self.assistant = map(str, roles)

    def text(self, name: str) -> str:
        """Return a text; "" if there is none."""
        value = self._given.get(name)
        return value if isinstance(value, str) else ""

    @property
    def system(self) -> str:
        """What stands before the first message: the style's own, unless the caller gives one."""
        return self.text("system_prompt")

    @property
    def role(self) -> str:
        """The name of a message's role, as an expression."""
        user, assistant = _quoted(self.user), _quoted(self.assistant)
        return f"({assistant} if message['role'] == 'assistant' else {user})"

    @property
    def separator(self) -> str:
        """What ends a message: one text after the user's, another after the model's."""
        inside = _quoted(self.text("intra_message_sep"))
        return f"({_quoted(self.text('inter_message_sep'))} if loop.index0 % 2 else {inside})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _put(text: str) -> str:
    return "{{ " + _quoted(text) + " }}" if text else ""


def _colons(style: _Style, separator: str) -> str:
    return (
        _put(style.system + style.text("intra_message_sep"))
        + _EACH + "{{ " + style.role + " }}: " + _CONTENT + "{{ " + separator + " }}" + _DONE
        + _ASK + _put(style.assistant + ":") + _END
    )  # fmt: skip


def _colons_with_one_end(style: _Style) -> str:
    return _colons(style, _quoted(style.text("intra_message_sep")))


def _colons_with_two_ends(style: _Style) -> str:
    return _colons(style, style.separator)


def _no_colons(style: _Style) -> str:
    return (
        _put(style.system)
        + _EACH + "{{ " + style.role + " }}" + _CONTENT + "{{ " + style.separator + " }}" + _DONE
        + _ASK + _put(style.assistant) + _END
    )  # fmt: skip


def _llama2(style: _Style) -> str:
    return (
        _put(style.system)
        + _EACH + "{% if loop.first %}" + _CONTENT + "{% else %}"
        + "{{ " + style.role + " }} " + _CONTENT + "{{ " + style.separator + " }}" + _END + _DONE
        + _ASK + _put(style.assistant) + _END
    )  # fmt: skip


def _turns(begin: str, middle: str, end: str, *, assistant: str = "assistant") -> str:
    """Return a template of messages that each name their role."""
    role = f"('{assistant}' if message['role'] == 'assistant' else message['role'])"
    return (
        _EACH + _put(begin) + "{{ " + role + " }}" + _put(middle) + _CONTENT + _put(end) + _DONE
        + _ASK + _put(begin + assistant + middle) + _END
    )  # fmt: skip


def _own_system(style: _Style, system: str) -> str:
    """Return what stands first where the caller gives no system message."""
    if not style.system:
        return ""
    return "{% if messages[0]['role'] != 'system' %}" + _put(system) + _END


def _chatml(style: _Style) -> str:
    plain = style.system.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>")
    system = f"<|im_start|>system\n{plain}<|im_end|>\n"
    return _own_system(style, system) + _turns("<|im_start|>", "\n", "<|im_end|>\n")


def _llama3(style: _Style) -> str:
    begin, middle, end = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
    system = f"{begin}system{middle}{style.system}{end}"
    return _put("<|begin_of_text|>") + _own_system(style, system) + _turns(begin, middle, end)


def _gemma(style: _Style) -> str:
    return _turns("<start_of_turn>", "\n", "<end_of_turn>\n", assistant="model")


def _phi3(style: _Style) -> str:
    system = f"<|system|>\n{style.system}<|end|>\n"
    return _own_system(style, system) + _turns("<|", "|>\n", "<|end|>\n")


_STYLES: Mapping[str, Callable[[_Style], str]] = {
    "ADD_COLON_SINGLE": _colons_with_one_end,
    "ADD_COLON_TWO": _colons_with_two_ends,
    "NO_COLON_TWO": _no_colons,
    "LLAMA2": _llama2,
    "LLAMA3": _llama3,
    "CHATML": _chatml,
    "QWEN": _chatml,
    "GEMMA": _gemma,
    "PHI3": _phi3,
}
