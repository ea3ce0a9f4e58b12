# SPDX-License-Identifier: Apache-2.0
"""What holds an answer to calls of tools, or to thoughts that come before a structure.

In: a chat, how its model writes answers, and whether the request brings a grammar of its own.
Out: the frame that the engine is to hold the answer to, the request's grammar inside of it; None
if the engine needs no more than that grammar, or nothing. Pure.
"""

from collections.abc import Mapping
from typing import Any

from xinference.engine import Frame
from xinference.errors import InvalidRequest
from xinference.protocol.generation import ChatPrompt, ToolChoice

from .parsing.grammars import AnswerFormat
from .parsing.lark import ANSWER, Function, Lark

NO_ARGUMENTS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
ANY_ARGUMENTS: Mapping[str, Any] = {"type": "object"}


def frame_of(
    prompt: ChatPrompt,
    *,
    has_grammar: bool,
    answers: AnswerFormat,
    rendered: str,
    token_ids: Mapping[str, int],
) -> Frame | None:
    """Return what the answer is to be held to around the request's own grammar.

    Args:
        prompt: the chat; its model has the tools that it needs.
        has_grammar: whether the request brings a grammar, for the content of the answer.
        answers: how the model writes.
        rendered: the prompt's text, which may end inside of the thoughts.
        token_ids: of the markers of `answers` that are single tokens.

    Raises:
        InvalidRequest: calls are required beside a structure, or parameters cannot be followed.
    """
    form = answers.grammar
    lark = Lark(token_ids)
    offered = prompt.tools if prompt.tool_choice is not ToolChoice.NONE else ()
    may_call = bool(offered) and form is not None
    is_forced = prompt.tool_choice is ToolChoice.REQUIRED
    several = prompt.parallel_tool_calls
    if is_forced and has_grammar:
        raise InvalidRequest(
            field="tool_choice",
            problem="an answer that has to be a call has no content for a structure; "
            "give one of the two",
        )
    callable_now = functions_of(prompt)
    if (is_forced or offered) and not callable_now:
        raise InvalidRequest(field="tool_choice", problem="there are no tools to call")
    is_narrowed = len(callable_now) < len(offered) or any(one.strict for one in callable_now)
    if is_forced:
        assert form is not None, prompt
        body = form.calls(lark, callable_now, several=several)
    elif has_grammar:
        content = answers.content(lark, ANSWER)
        body = content
        if may_call and form is not None:
            body = f"{lark.rule(form.calls(lark, callable_now, several=several))} | {content}"
    elif may_call and is_narrowed:
        assert form is not None, prompt
        body = form.mixed(lark, callable_now, several=several)
    else:
        return None
    thoughts = answers.thoughts(
        lark, prompt=rendered, may_begin=prompt.enable_thinking is not False
    )
    if not thoughts and body == ANSWER:
        return None
    start = f"{thoughts} {lark.rule(body)}".strip()
    return Frame(text=lark.written(start), field="tools" if offered else "response_format")


def functions_of(prompt: ChatPrompt) -> list[Function]:
    """Return the functions that an answer may call, with what their arguments are held to."""
    if prompt.tool_choice is ToolChoice.NONE:
        return []
    names = {tool["function"]["name"] for tool in prompt.tools}
    if prompt.allowed_tools is not None:
        names &= {*prompt.allowed_tools}
    if prompt.tool_name is not None:
        names &= {prompt.tool_name}
    is_forced = prompt.tool_choice is ToolChoice.REQUIRED
    return [
        _function(tool["function"], is_forced=is_forced)
        for tool in prompt.tools
        if tool["function"]["name"] in names
    ]


def _function(described: Mapping[str, Any], *, is_forced: bool) -> Function:
    name, parameters = described["name"], described.get("parameters")
    is_strict = bool(described.get("strict"))
    if parameters is None:
        schema = NO_ARGUMENTS
    elif is_strict or is_forced:
        if parameters.get("type", "object") != "object":
            raise InvalidRequest(
                field="tools", problem=f"the parameters of {name} must be those of an object"
            )
        schema = {"type": "object", **parameters}
    else:
        # Why: only strict functions are promised that calls keep to the schema.
        schema = ANY_ARGUMENTS
    return Function(name=name, parameters=schema, strict=is_strict)
