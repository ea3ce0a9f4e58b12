# SPDX-License-Identifier: Apache-2.0
"""Examines a guide model on questions it was never trained on.

In: a model directory and a file of questions (`training/text/held_out.md`). Out: how many are
answered right, apart for questions about Xinference, small talk and things it cannot know, and
the perplexity of the right answers. Decoding is greedy, in fp32, as the model is served.

    python -m training.evaluate_guide --model xinference/catalog/guide

An answer is right when it has every key string of its topic and no command, that is nothing in
backticks, that the topic's answer does not have.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .guide_text import TEXT_DIRECTORY, Grammar, Topic
from .tool_text import draw_tool_turns

MAX_NEW_TOKENS = 200
FORMS = ("plain", "json", "thought")
"""As it is, as a JSON object, after a thought."""
_SPAN = re.compile(r"`+([^`]+)`+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A held-out question and the topic whose answer it asks for."""

    topic: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the model said to a question, and whether that is right."""

    question: Question
    text: str
    is_right: bool


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file, lines of `topic: question` after the first blank line."""
    questions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"([a-z0-9_]+): (.+)", line)
        if match:
            questions.append(Question(topic=match[1], text=match[2]))
    return questions


def is_right(reply: str, topic: Topic) -> bool:
    """Whether a reply has every key of the topic and no command that its answer lacks."""
    return all(key in reply for key in topic.keys) and all(
        span in topic.answer for span in _SPAN.findall(reply)
    )


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, form: str = "plain"
) -> str:
    """Return the greedy answer to one question, taken out of its form; empty if that is broken."""
    if form == "json":
        question = f"{question} Answer in JSON."
    prompt = torch.tensor([prompt_token_ids(tokenizer, question, thinks=form == "thought")])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    text = str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    if form == "thought":
        return text.partition("</think>\n\n")[2]
    return _answer_of(text) if form == "json" else text


def _answer_of(text: str) -> str:
    try:
        return str(json.loads(text)["answer"])
    except (ValueError, LookupError, TypeError):
        return ""


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerFast, question: str, *, thinks: bool = False
) -> list[int]:
    """Return one question as the model is asked it."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=thinks,
    )
    return list(tokenizer.encode(str(text), add_special_tokens=False))


def answer_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, answer: str
) -> torch.Tensor:
    """Return the negative log-likelihood of each token of `answer` and of its end, [tokens]."""
    prompt = prompt_token_ids(tokenizer, question)
    continuation = tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False)
    token_ids = torch.tensor([prompt + continuation])
    with torch.inference_mode():
        logits = model(token_ids).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(continuation), reduction="none")


def examine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    grammar: Grammar,
    questions: Sequence[Question],
    form: str = "plain",
) -> tuple[list[Reply], float]:
    """Return a reply for each question, and the perplexity of the right plain answers."""
    replies = []
    losses = []
    for question in questions:
        topic = grammar.topic(question.topic)
        text = ask(model, tokenizer, question.text, form)
        replies.append(Reply(question=question, text=text, is_right=is_right(text, topic)))
        losses.append(answer_losses(model, tokenizer, question.text, topic.answer))
    return replies, math.exp(torch.cat(losses).mean().item())


def examine_calls(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_questions: int
) -> tuple[int, int]:
    """Return how often the right function was called, and how often with the right arguments.

    The names of the functions, and the values in the questions, are none that training draws.
    """
    rng = random.Random(2026)
    right_functions = right_calls = 0
    for _ in range(num_questions):
        tools, turns = draw_tool_turns(rng, is_examination=True)
        text = tokenizer.apply_chat_template(
            turns[:1], tools=tools, add_generation_prompt=True, tokenize=False
        )
        prompt = torch.tensor([tokenizer.encode(str(text), add_special_tokens=False)])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False
        )
        reply = str(tokenizer.decode(output[0, prompt.shape[1] :])).removesuffix("<|im_end|>")
        wanted = turns[1]["content"]
        right_functions += reply.startswith(wanted.split('"arguments"')[0])
        right_calls += reply == wanted
    return right_functions, right_calls


def share(replies: Sequence[Reply]) -> str:
    """Return "right of all (percent)"."""
    right = sum(reply.is_right for reply in replies)
    return f"{right} of {len(replies)} ({100 * right / max(1, len(replies)):.1f} %)"


def main() -> None:
    """Examine a model and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the model directory")
    parser.add_argument("--questions", type=Path, default=TEXT_DIRECTORY / "held_out.md")
    parser.add_argument("--form", choices=FORMS, default="plain", help="of the answers")
    parser.add_argument("--calls", type=int, default=0, help="ask for so many calls of tools, too")
    parser.add_argument("--quiet", action="store_true", help="do not print the wrong answers")
    arguments = parser.parse_args()
    grammar = Grammar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    replies, perplexity = examine(
        model, tokenizer, grammar, read_questions(arguments.questions), arguments.form
    )
    if not arguments.quiet:
        for reply in replies:
            if not reply.is_right:
                print(f"WRONG {reply.question.topic}: {reply.question.text}\n      {reply.text}")
    unknown = [reply for reply in replies if reply.question.topic == "unknown"]
    known = [reply for reply in replies if reply.question.topic != "unknown"]
    talk = [reply for reply in known if grammar.topic(reply.question.topic).plain]
    others = [reply for reply in known if not grammar.topic(reply.question.topic).plain]
    print(f"right, all questions        {share(replies)}")
    print(f"right, covered              {share(known)}")
    print(f"right, about Xinference     {share(others)}")
    print(f"right, small talk           {share(talk)}")
    print(f"right, says it cannot know  {share(unknown)}")
    print(f"perplexity of right answers {perplexity:.3f}")
    if arguments.calls:
        functions, calls = examine_calls(model, tokenizer, arguments.calls)
        print(f"calls the right function    {functions} of {arguments.calls}")
        print(f"with the right arguments    {calls} of {arguments.calls}")


if __name__ == "__main__":
    main()
