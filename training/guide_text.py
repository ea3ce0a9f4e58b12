# SPDX-License-Identifier: Apache-2.0
"""The guide's text: topics read from `training/text`, questions drawn from their patterns.

In: the Markdown files of `training/text` (their notation is in `training/README.md`). Out:
conversations to train on, drawn from a seeded generator, and `Grammar.matches`, which tells
whether a sentence can be drawn at all. It knows nothing about tokens or models.
"""

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .tool_text import (
    composed_word,
    draw_foreign_question,
    draw_repetition,
    draw_tool_turns,
    draw_tools,
    tools_prompt,
)

TEXT_DIRECTORY = Path(__file__).parent / "text"
TOPIC_FILES = (
    "about.md",
    "install.md",
    "cluster.md",
    "models.md",
    "chat.md",
    "engine.md",
    "serving.md",
    "errors.md",
    "talk.md",
    "unknown.md",
)
SITUATION_FILES = "situations*.md"
THOUGHT_START = "<think>\n"
"""What the template writes before an answer with a thought; the answer then begins inside of it."""

Message = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A parsed pattern: a sequence of literal text and of choices between patterns."""

    parts: tuple["str | tuple[Pattern, ...]", ...]

    def draw(self, rng: random.Random) -> str:
        """Return one expansion."""
        return "".join(
            part if isinstance(part, str) else rng.choice(part).draw(rng) for part in self.parts
        )

    def num_expansions(self) -> int:
        """Return how many texts it can draw, equal ones counted again."""
        return math.prod(
            sum(choice.num_expansions() for choice in part)
            for part in self.parts
            if not isinstance(part, str)
        )

    def regex(self) -> str:
        """Return a regular expression for every expansion, spaces taken loosely."""
        pieces = []
        for part in self.parts:
            if isinstance(part, str):
                pieces.append(r"\s*".join(re.escape(word) for word in re.split(r"\s+", part)))
            else:
                pieces.append("(?:" + "|".join(choice.regex() for choice in part) + ")")
        return r"\s*".join(pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One thing to know: its answer, how to recognise it, and the ways to ask for it."""

    name: str
    answer: str
    keys: tuple[str, ...]
    """Strings that a right answer contains."""
    weight: int
    plain: bool
    """Small talk and the like: asked as it is, without a greeting or a context around it."""
    other_names: tuple[str, ...]
    """Names of narrower questions that this answer covers too."""
    phrases: tuple["Phrase", ...]

    @property
    def forms(self) -> tuple[str, str, str]:
        """The answer as it is, as JSON, and after a thought that names the topic."""
        return self.answer, self.answer_in_json, f"{THOUGHT_START}{self.thought}{self.answer}"

    @property
    def answer_in_json(self) -> str:
        """The answer as a JSON object."""
        return json.dumps({"answer": self.answer}, ensure_ascii=False)

    @property
    def thought(self) -> str:
        """What to think before the answer, up to where it begins."""
        return f"The question is about: {self.name.replace('_', ' ')}.\n</think>\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrase:
    """A way to ask for a topic: a pattern that goes into any frame of its kind."""

    kind: str
    """do: something to do. what: the name of a thing. ask: a whole question."""
    pattern: Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A sentence around a phrase."""

    before: Pattern
    after: Pattern

    def regex(self, inside: str) -> str:
        """Return a regular expression for the sentence, given one for the phrase in it."""
        return rf"{self.before.regex()}\s*(?:{inside})\s*{self.after.regex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowUp:
    """A short question that means `topic` right after an answer about `previous`."""

    previous: str
    topic: str
    question: Pattern


def parse_pattern(text: str, words: Mapping[str, Pattern]) -> Pattern:
    """Parse `[a|b|]` as a choice and `<name>` as an entry of `words`.

    Raises:
        ValueError: a bracket is not closed, or a name is unknown.
    """
    pattern, end = _parse(text, 0, words, closers="")
    if end != len(text):
        raise ValueError(f"Unexpected {text[end]!r} at {end} in {text!r}")
    return pattern


def _parse(text: str, at: int, words: Mapping[str, Pattern], closers: str) -> tuple[Pattern, int]:
    parts: list[str | tuple[Pattern, ...]] = []
    literal = ""
    while at < len(text) and text[at] not in closers:
        if text[at] == "[":
            choices = []
            while text[at] in "[|":
                choice, at = _parse(text, at + 1, words, closers="|]")
                if at == len(text):
                    raise ValueError(f"A bracket is not closed in {text!r}")
                choices.append(choice)
            parts += [literal, tuple(choices)]
            literal = ""
            at += 1
        elif text[at] == "<":
            name, _, _ = text[at + 1 :].partition(">")
            if name not in words:
                raise ValueError(f"Unknown word list <{name}> in {text!r}")
            parts += [literal, (words[name],)]
            literal = ""
            at += len(name) + 2
        else:
            literal += text[at]
            at += 1
    return Pattern(parts=tuple(part for part in (*parts, literal) if part != "")), at


def _read_lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield line.rstrip()


def _read_words(path: Path, known: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """Return `known` and the word lists of a file: lines of `word NAME: this | that`."""
    words = dict(known)
    for line in _read_lines(path):
        head, colon, alternatives = line.partition(": ")
        name = head.removeprefix("word ")
        if colon and name != head:
            words[name] = parse_pattern(f"[{'|'.join(alternatives.split(' | '))}]", words)
    return words


def _weight(phrase: Phrase) -> float:
    """Return how often to draw a phrase, beside the other ones of its topic."""
    # Why: a `do` or `what` line stands for dozens of sentences through its frames, an `ask` line
    # for those it spells out; the root keeps one with thousands of them from drowning the others.
    if phrase.kind == "ask":
        return min(2.0, 0.5 * math.sqrt(math.sqrt(phrase.pattern.num_expansions())))
    return {"do": 4.0, "what": 2.0}[phrase.kind]


class Grammar:
    """All topics and follow-ups, and the drawing of questions and conversations from them."""

    def __init__(self, directory: Path = TEXT_DIRECTORY) -> None:
        self._words = _read_words(directory / "words.md", {})
        frames: dict[str, list[Frame]] = {"do": [], "what": [], "ask": []}
        for line in (*_read_lines(directory / "frames.md"), "ask: {}"):
            kind, colon, frame = line.partition(": ")
            if colon and kind in frames:
                before, _, after = frame.partition("{}")
                frames[kind].append(
                    Frame(
                        before=parse_pattern(before, self._words),
                        after=parse_pattern(after, self._words),
                    )
                )
        self._frames = {kind: tuple(lines) for kind, lines in frames.items()}
        self.topics: dict[str, Topic] = {}
        self._name_of: dict[str, str] = {}
        for name in TOPIC_FILES:
            for topic in self._read_topics(directory / name):
                for known_as in (topic.name, *topic.other_names):
                    if known_as in self._name_of:
                        raise ValueError(f"Topic {known_as} is written twice")
                    self._name_of[known_as] = topic.name
                self.topics[topic.name] = topic
        for path in sorted(directory.glob(SITUATION_FILES)):
            self._add_situations(path, directory / "unknown.md")
        self.follow_ups = tuple(self._read_follow_ups(directory / "follow_ups.md"))
        self._follow_ups_of: dict[str, list[FollowUp]] = {}
        for follow_up in self.follow_ups:
            self._follow_ups_of.setdefault(follow_up.previous, []).append(follow_up)
        self._synonyms = {
            word: tuple(others.split(" | "))
            for word, colon, others in (
                line.partition(": ") for line in _read_lines(directory / "synonyms.md")
            )
            if colon and " " not in word
        }
        self._expressions: dict[str, list[re.Pattern[str]]] = {kind: [] for kind in self._frames}
        for topic in self.topics.values():
            for phrase in topic.phrases:
                self._expressions[phrase.kind].append(_compile(phrase.pattern))
        for follow_up in self.follow_ups:
            self._expressions["ask"].append(_compile(follow_up.question))
        self._weights_of = {
            topic.name: tuple(map(_weight, topic.phrases)) for topic in self.topics.values()
        }
        self._names = tuple(self.topics)
        self._weights = tuple(topic.weight for topic in self.topics.values())

    def topic(self, name: str) -> Topic:
        """Return the topic of this name, or the one that covers it.

        Raises:
            KeyError: there is none.
        """
        return self.topics[self._name_of[name]]

    def draw_question(self, topic: Topic, rng: random.Random) -> str:
        """Return a question for `topic`, dressed and sometimes misspelt as users write."""
        phrase = rng.choices(topic.phrases, self._weights_of[topic.name])[0]
        frame = rng.choice(self._frames[phrase.kind])
        parts = (frame.before, phrase.pattern, frame.after)
        question = self._reword(_tidy("".join(part.draw(rng) for part in parts)), rng)
        return dress(question, rng, plain=topic.plain)

    def _reword(self, question: str, rng: random.Random) -> str:
        if rng.random() < 0.5:
            return question
        return " ".join(
            rng.choice(self._synonyms[word])
            if word in self._synonyms and rng.random() < 0.12
            else word
            for word in question.split()
        )

    def draw_conversation(self, rng: random.Random) -> list[Message]:
        """Return messages that end with an assistant's answer."""
        messages: list[Message] = []
        kind = rng.choices(("plain", "tools", "repeat", "json", "thought"), (84, 8, 2, 3, 3))[0]
        if kind == "tools":
            return self._draw_with_tools(rng)
        if kind == "repeat":
            return draw_repetition(rng)
        if kind in ("json", "thought"):
            topic = self._draw_topic(rng)
            question = self.draw_question(topic, rng)
            _, as_json, after_thought = topic.forms
            if kind == "json":
                return _turn(f"{question} {rng.choice(_AS_JSON)}", as_json)
            return _turn(question, after_thought)
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        num_turns = rng.choices((1, 2, 3, 4, 8), (94, 4.5, 1, 0.4, 0.1))[0]
        topic = self._draw_topic(rng)
        for turn in range(num_turns):
            follow_ups = self._follow_ups_of.get(topic.name, [])
            if turn and follow_ups and rng.random() < 0.75:
                follow_up = rng.choice(follow_ups)
                topic = self.topics[follow_up.topic]
                question = dress(_tidy(follow_up.question.draw(rng)), rng, plain=True)
            else:
                if turn:
                    topic = self._draw_topic(rng)
                elif num_turns > 1 and rng.random() < 0.6:
                    topic = self.topics[rng.choice(tuple(self._follow_ups_of))]
                question = self.draw_question(topic, rng)
            messages += _turn(question, topic.answer)
        return messages

    def _draw_with_tools(self, rng: random.Random) -> list[Message]:
        kind = rng.choices(("call", "other topic", "other tool"), (80, 13, 7))[0]
        if kind == "call":
            tools, turns = draw_tool_turns(rng)
        elif kind == "other topic":
            topic = self._draw_topic(rng)
            tools, turns = draw_tools(rng), _turn(self.draw_question(topic, rng), topic.answer)
        else:
            tools, question = draw_foreign_question(rng)
            turns = _turn(question, self.topics["unknown"].answer)
        system = f"{rng.choice(_SYSTEM_PROMPTS)}\n\n" if rng.random() < 0.2 else ""
        return [{"role": "system", "content": system + tools_prompt(tools)}, *turns]

    def can_draw(self, question: str) -> bool:
        """Whether a pattern, with its frame, can produce the normalised question as it is.

        Greetings, slips and synonyms are left out of account: they only change a question that
        a pattern produced.
        """
        for kind, frames in self._frames.items():
            fitting = [frame for frame in frames if _matches(frame.regex(".*"), question)]
            for expression in self._expressions[kind]:
                # Why searched first: it leaves out most phrases at the price of one look.
                if expression.search(question) and any(
                    _matches(frame.regex(expression.pattern), question) for frame in fitting
                ):
                    return True
        return False

    def _draw_topic(self, rng: random.Random) -> Topic:
        return self.topics[rng.choices(self._names, self._weights)[0]]

    def _add_situations(self, path: Path, word_file: Path) -> None:
        words = _read_words(word_file, self._words)
        for line in _read_lines(path):
            name, colon, question = line.partition(": ")
            if not colon or " " in name:
                continue
            if name not in self._name_of:
                raise ValueError(f"{path.name} names an unknown topic {name}")
            phrase = Phrase(kind="ask", pattern=parse_pattern(question, words))
            topic = self.topic(name)
            self.topics[topic.name] = replace(topic, phrases=(*topic.phrases, phrase))

    def _read_topics(self, path: Path) -> Iterator[Topic]:
        words = _read_words(path, self._words)
        blocks: list[list[str]] = []
        for line in _read_lines(path):
            if line.startswith("## "):
                blocks.append([line.removeprefix("## ")])
            elif blocks:
                blocks[-1].append(line)
        for name, *lines in blocks:
            yield self._read_topic(name, lines, words)

    def _read_topic(self, name: str, lines: Sequence[str], words: Mapping[str, Pattern]) -> Topic:
        answer: list[str] = []
        fields: dict[str, str] = {}
        phrases: list[Phrase] = []
        for line in lines:
            if line.startswith(">"):
                answer.append(line.removeprefix(">").removeprefix(" "))
                continue
            kind, colon, value = line.partition(":")
            value = value.strip()
            if not colon or not value:
                raise ValueError(f"Topic {name}: cannot read {line!r}")
            if kind in ("keys", "also", "weight", "plain"):
                fields[kind] = value
            elif kind in self._frames:
                phrases.append(Phrase(kind=kind, pattern=parse_pattern(value, words)))
            else:
                raise ValueError(f"Topic {name}: unknown kind of line {kind!r}")
        return Topic(
            name=name,
            answer="\n".join(answer),
            keys=tuple(key.strip() for key in fields["keys"].split(" ; ")),
            weight=int(fields.get("weight", "1")),
            plain=fields.get("plain") == "yes",
            other_names=tuple(fields.get("also", "").split()),
            phrases=tuple(phrases),
        )

    def _read_follow_ups(self, path: Path) -> Iterator[FollowUp]:
        for line in _read_lines(path):
            previous, arrow, rest = line.partition(" -> ")
            if not arrow:
                continue
            topic, _, questions = rest.partition(": ")
            for name in (previous, topic):
                if name not in self._name_of:
                    raise ValueError(f"Follow-up about an unknown topic {name}")
            yield FollowUp(
                previous=self._name_of[previous],
                topic=self._name_of[topic],
                question=parse_pattern(f"[{'|'.join(questions.split(' | '))}]", self._words),
            )


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _compile(pattern: Pattern) -> re.Pattern[str]:
    return re.compile(pattern.regex(), re.IGNORECASE)


def _matches(expression: str, question: str) -> bool:
    return re.fullmatch(expression, question, re.IGNORECASE) is not None


def normalise(question: str) -> str:
    """Return the question without case, punctuation at its ends and doubled spaces."""
    return " ".join(question.lower().replace("'", "").split()).strip(" ?!.,:;")


def _tidy(question: str) -> str:
    return re.sub(r"\s+([,?.!:])", r"\1", " ".join(question.split()))


_GREETINGS = (
    "hi", "hello", "hey", "hi there", "good morning", "hello there", "hey guide", "good evening",
    "please", "ok", "so", "now", "and", "excuse me", "sorry", "quick question", "question",
    "well", "um", "thanks", "great", "cool", "one more question", "another question", "ok thanks",
)  # fmt: skip
_CONTEXTS = (
    "i am new to this.", "i just installed xinference.", "i have a small laptop.",
    "i am a bit lost.", "i read the readme.", "i am on debian.", "we have a cluster at work.",
    "my boss asks:", "for a project at university:", "i am a developer.", "sorry for asking:",
    "i could not find it in the docs.", "xinference is running.", "i have no gpu.",
    "i tried but it did not work.", "stupid question maybe:", "it is my first day with it.",
    "my model is running.", "the cluster is up.", "i use python.", "i launched qwen yesterday.",
    "i have two servers.", "i am in the terminal.", "the server is started.", "i am curious:",
    "we want to use it in production.", "i am writing a script.", "there is one thing left.",
    "i looked everywhere.", "a friend told me to ask you.", "i work with language models.",
    "my team needs to know:", "this is for my thesis.", "i like it so far.", "let me ask this:",
    "i have a question about models.", "something else:", "next topic.", "maybe you know:",
)  # fmt: skip
_ENDINGS = (
    "please", "thanks", "thank you", "thx", "pls", "with xinference", "in xinference", "here",
    "exactly", "then", "again", "in this version", "right now", "i wonder", "in short",
    "for me", "if possible", "on linux", "today", "by the way", "in detail", "step by step",
)  # fmt: skip
_FILLERS = (
    "just", "actually", "maybe", "really", "simply", "quickly", "now", "then", "also", "please",
    "possibly", "properly", "like", "basically", "somehow", "easily", "even", "still", "only",
)  # fmt: skip
_STRAY_WORDS = (
    "project", "team", "office", "morning", "production", "work", "university", "customer",
    "today", "yesterday", "test", "first", "second", "new", "old", "small", "large", "big",
    "good", "nice", "whole", "single", "certain", "special", "usual", "always", "never", "often",
    "later", "soon", "once", "exactly", "roughly", "there", "around", "inside", "outside", "next",
    "other", "same", "few", "most", "some", "any", "each", "every", "much", "little", "own",
    "would", "should", "must", "might", "will", "could", "did", "was", "were", "been", "being",
    "think", "believe", "guess", "mean", "hope", "like", "wish", "prefer", "plan", "try", "keep",
    "our", "their", "his", "her", "we", "they", "us", "them", "one", "two", "three", "that",
    "these", "those", "when", "while", "since", "until", "because", "but", "or", "and", "if",
    "from", "about", "over", "under", "after", "before", "during", "at", "by", "as", "up", "off",
)  # fmt: skip
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are xinference-guide.", "Answer briefly.",
    "You are a helpful assistant. Answer the user's question.", "Be concise.",
    "You are the guide of Xinference. Help the user.", "You answer questions about Xinference.",
    "You are a friendly chatbot.", "You are an AI assistant.", "Help the user as well as you can.",
)  # fmt: skip
_AS_JSON = (
    "Answer in JSON.", "as json", "in json please", "Give the answer as a JSON object.",
    "Reply with JSON only.", "json format", "(JSON)",
)  # fmt: skip
_SPELLINGS = {
    "xinference": "Xinference", "python": "Python", "openai": "OpenAI", "json": "JSON",
    "gpu": "GPU", "cpu": "CPU", "api": "API", "rest": "REST", "url": "URL", "kv": "KV",
    "http": "HTTP", "llm": "LLM", "linux": "Linux", "cli": "CLI", "vllm": "vLLM", "uid": "UID",
    "lora": "LoRA", "pytorch": "PyTorch", "ram": "RAM", "prometheus": "Prometheus", "id": "ID",
    "docker": "Docker", "qwen": "Qwen", "llama": "Llama", "langchain": "LangChain", "ui": "UI",
}  # fmt: skip
_SMALL_WORDS = frozenset((
    "a", "an", "the", "do", "i", "to", "is", "my", "it", "this", "of", "me", "you", "on", "in",
    "for", "can", "please", "are", "that", "does",
))  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def dress(question: str, rng: random.Random, *, plain: bool) -> str:
    """Return the question as somebody types it: greeting, case, punctuation, slips."""
    text = question
    if not plain:
        if rng.random() < 0.45:
            text = _with_other_words(text, rng)
        if rng.random() < 0.12:
            text = f"{text} {rng.choice(_ENDINGS)}"
        if rng.random() < 0.08:
            text = f"{rng.choice(_CONTEXTS)} {text}"
        if rng.random() < 0.14:
            text = f"{rng.choice(_GREETINGS)}{rng.choice((',', '', '!', ', '))} {text}"
    if rng.random() < 0.07:
        text = _without_small_word(text, rng)
    if rng.random() < 0.2:
        for _ in range(rng.choice((1, 1, 2))):
            text = _with_slip(text, rng)
    if rng.random() < 0.3:
        text = text.replace("'", "")
    return _with_punctuation(_with_case(" ".join(text.split()), rng), rng)


def _with_case(text: str, rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.02:
        return text.upper()
    if kind < 0.42:
        return text if rng.random() < 0.8 else text.lower()
    words = []
    for word in text.split():
        if word == "i" or word.startswith(("i'", "i,")):
            word = "I" + word[1:]
        elif rng.random() < 0.7:
            word = _SPELLINGS.get(word, word)
        words.append(word)
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def _with_punctuation(text: str, rng: random.Random) -> str:
    return text + rng.choices(("?", "", ".", "!", "??", " ?", "..."), (52, 33, 8, 2, 2, 2, 1))[0]


def _with_word(text: str, word: str, rng: random.Random) -> str:
    words = text.split()
    words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def _without_small_word(text: str, rng: random.Random) -> str:
    words = text.split()
    small = [at for at, word in enumerate(words) if word in _SMALL_WORDS]
    if small and len(words) > 3:
        del words[rng.choice(small)]
    return " ".join(words)


def _without_word(text: str, rng: random.Random) -> str:
    words = text.split()
    if len(words) > 5:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def _with_other_words(text: str, rng: random.Random) -> str:
    """Return the text with words more, less, replaced or elsewhere."""
    if rng.random() < 0.17:
        text = _with_word(text, rng.choice(_FILLERS), rng)
    for _ in range(rng.choices((0, 1, 2), (68, 24, 8))[0]):
        text = _with_word(text, rng.choice(_STRAY_WORDS), rng)
    if rng.random() < 0.2:
        text = _with_foreign_word(text, rng)
    for _ in range(rng.choices((0, 1, 2), (74, 19, 7))[0]):
        text = _without_word(text, rng)
    if rng.random() < 0.05:
        text = _turned_round(text, rng)
    return text


def _with_foreign_word(text: str, rng: random.Random) -> str:
    """Return the text with a word that the guide cannot know, or that says nothing, for one."""
    words = text.split()
    if len(words) > 4:
        other = composed_word(rng) if rng.random() < 0.5 else rng.choice(_STRAY_WORDS)
        words[rng.randrange(len(words))] = other
    return " ".join(words)


def _turned_round(text: str, rng: random.Random) -> str:
    words = text.split()
    at = rng.randint(0, len(words))
    return " ".join(words[at:] + words[:at])


def _with_slip(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    long_words = [at for at, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not long_words:
        return text
    at = rng.choice(long_words)
    word = words[at]
    place = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        word = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    elif kind == 1:
        word = word[:place] + word[place + 1 :]
    elif kind == 2:
        word = word[:place] + word[place] + word[place:]
    else:
        word = word[:place] + rng.choice(_LETTERS) + word[place + 1 :]
    words[at] = word
    return " ".join(words)
