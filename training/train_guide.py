# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded model `xinference-guide` from `training/text` and writes its directory.

In: nothing but this folder and a seed. Out: a `transformers` model directory (bf16 weights,
byte-level BPE tokenizer, chat template, generation config). Two CPU cores suffice; the same
seed, threads and library versions draw the same text in the same order.

    python -m training.train_guide --output xinference/catalog/guide
"""

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.multiprocessing
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import distributed
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .guide_text import THOUGHT_START, Grammar, Message

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SECONDS_BETWEEN_CHECKPOINTS = 240
MAX_STEP_SECONDS = 5.0
"""A longer step was interrupted: the machine slept, or somebody stopped the process."""
TEMPLATE_FILE = Path(__file__).parent / "chat_template.jinja"
SHARED_WITH_LLAMA = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What the configurations of Qwen2 and Llama have in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 20
    vocab_size: int = 3072
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_key_value_heads: int = 3
    intermediate_size: int = 512
    max_positions: int = 2048
    num_tokenizer_conversations: int = 20_000
    num_conversations: int = 150_000
    batch_tokens: int = 1536
    """Tokens in the batch of one process, padding included."""
    peak_learning_rate: float = 2e-3
    warmup_share: float = 0.03
    weight_decay: float = 0.05
    user_token_weight: float = 0.0
    """Of the loss on what the user says, beside 1 for what the assistant says."""
    cut_share: float = 0.9
    """Of the conversations, those whose last answer is cut where it is told from all others."""
    cut_tokens: int = 2
    """So many tokens of it come after that."""
    length_step: int = 8
    """Conversations are padded to a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One conversation as token ids, and the weight of each token in the loss."""

    token_ids: list[int]
    weights: list[float]


Batch = tuple[list[Example], int, int]
"""Examples, the length to pad them to, and how many conversations were drawn so far."""


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, max_positions: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; every byte has a token, so any text comes back whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TOOL_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(TOOL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )
    fast.chat_template = TEMPLATE_FILE.read_text(encoding="utf-8")
    return fast


def encode(
    conversation: Sequence[Message], tokenizer: PreTrainedTokenizerFast, user_weight: float
) -> Example:
    """Return the conversation as the chat template writes it; only turns' own text is weighted."""
    token_ids: list[int] = []
    weights: list[float] = []
    for message in conversation:
        content = message["content"]
        given = THOUGHT_START if content.startswith(THOUGHT_START) else ""
        head = tokenizer.encode(f"<|im_start|>{message['role']}\n{given}", add_special_tokens=False)
        body = tokenizer.encode(
            f"{content.removeprefix(given)}<|im_end|>", add_special_tokens=False
        )
        tail = tokenizer.encode("\n", add_special_tokens=False)
        weight = {"assistant": 1.0, "user": user_weight, "system": 0.0}[message["role"]]
        token_ids += head + body + tail
        weights += [0.0] * len(head) + [weight] * len(body) + [0.0] * len(tail)
    return Example(token_ids=token_ids, weights=weights)


class Cutter:
    """Cuts a conversation soon after its last answer is told from those of all other topics.

    Which answer to give is decided there; the rest of it is learnt from far fewer examples.
    """

    def __init__(self, answers: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> None:
        self._token_ids = [
            tokenizer.encode(text.removeprefix(THOUGHT_START), add_special_tokens=False)
            for text in answers
        ]

    def cut(self, example: Example, num_more_tokens: int) -> Example:
        """Return the conversation up to `num_more_tokens` after that place.

        What is none of the answers, as a call of a tool, stays whole.
        """
        end = len(example.weights)
        while example.weights[end - 1] != 1.0:
            end -= 1
        start = end
        while example.weights[start - 1] == 1.0:
            start -= 1
        answer = example.token_ids[start:end]
        alike = self._token_ids
        num_tokens = 0
        while num_tokens < len(answer) and len(alike) > 1:
            here = slice(num_tokens, num_tokens + 1)
            alike = [other for other in alike if other[here] == answer[here]]
            num_tokens += 1
        if not alike:
            return example
        end = min(end, start + num_tokens + num_more_tokens)
        return Example(token_ids=example.token_ids[:end], weights=example.weights[:end])


def draw_batches(
    grammar: Grammar, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[Batch]:
    """Yield batches with the length to pad them to, and how many conversations were drawn so far.

    The padded length is a multiple of `length_step` and decides the number of rows. A few
    conversations whose batch is not full at the end are left out.
    """
    # Why few shapes: oneDNN compiles a kernel per shape, which costs more than the padding.
    rng = random.Random(recipe.seed)
    cutter = Cutter([form for topic in grammar.topics.values() for form in topic.forms], tokenizer)
    waiting: dict[int, list[Example]] = {}
    for drawn in range(1, recipe.num_conversations + 1):
        example = encode(grammar.draw_conversation(rng), tokenizer, recipe.user_token_weight)
        if rng.random() < recipe.cut_share:
            example = cutter.cut(example, recipe.cut_tokens)
        length = -(-len(example.token_ids) // recipe.length_step) * recipe.length_step
        batch = waiting.setdefault(length, [])
        batch.append(example)
        if len(batch) >= max(1, recipe.batch_tokens // length):
            yield waiting.pop(length), length, drawn


def batch_loss(model: Qwen2ForCausalLM, batch: Sequence[Example], length: int) -> torch.Tensor:
    """Return the weighted mean cross-entropy of a batch padded to `length`, scalar."""
    token_ids = torch.zeros(len(batch), length + 1, dtype=torch.long)
    weights = torch.zeros(len(batch), length + 1)
    for row, example in enumerate(batch):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        weights[row, : len(example.weights)] = torch.tensor(example.weights)
    # Why no mask: the padding is on the right, so causal attention never looks at it.
    hidden = model.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state
    labels, weights = token_ids[:, 1:].flatten(), weights[:, 1:].flatten()
    # Why gathered first: logits of tokens without weight would cost most of the output layer.
    places = weights.nonzero().squeeze(1)
    places = F.pad(places, (0, -len(places) % 128), value=len(weights) - 1)
    logits = model.lm_head(hidden.flatten(0, 1)[places]).float()
    losses = F.cross_entropy(logits, labels[places], reduction="none")
    return (losses * weights[places]).sum() / weights.sum()


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention as `transformers` calls it; returns [batch, tokens, heads, head width].

    Why: the backward of torch's own, on a CPU and over a few dozen tokens, takes as long as all
    matrix products of a step together.
    """
    num_rows, num_heads, num_tokens, width = query.shape
    num_key_heads = key.shape[1]
    # The heads that share a key head lie one after another: one product for all of them.
    shared = (num_rows, num_key_heads, num_heads // num_key_heads * num_tokens)
    scores = torch.matmul((query * scaling).reshape(*shared, width), key.transpose(2, 3))
    future = torch.full((num_tokens, num_tokens), -torch.inf).triu(1)
    scores = scores.view(num_rows, num_heads, num_tokens, num_tokens).float() + future
    shares = torch.softmax(scores, dim=-1).to(value.dtype)
    read = torch.matmul(shares.view(*shared, num_tokens), value).view(query.shape)
    return read.transpose(1, 2).contiguous(), None


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Qwen2ForCausalLM:
    """Return the untrained model, its weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    return Qwen2ForCausalLM(config)


def read_model(directory: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Return a model that `save` wrote, and its tokenizer with today's template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE_FILE.read_text(encoding="utf-8")
    llama = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = Qwen2Config(**{name: getattr(llama.config, name) for name in SHARED_WITH_LLAMA})
    model = Qwen2ForCausalLM(config)
    weights = {
        name: weight
        for name, weight in llama.state_dict().items()
        if not name.endswith("o_proj.bias")
    }
    model.load_state_dict(weights)
    return model, tokenizer


def train(
    model: Qwen2ForCausalLM,
    grammar: Grammar,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    bfloat16: bool,
    max_seconds: float,
    keep: Callable[[], None],
) -> None:
    """Train the model in place, together with the other processes of the group.

    Every process draws the same batches and takes its own share of them; the mean of the gradients
    keeps the copies equal. The schedule is over after `max_seconds`, less interruptions, or when
    all is drawn. The
    first process calls `keep` every few minutes, so that a run that is cut leaves something.
    """
    rank, num_processes = distributed.get_rank(), distributed.get_world_size()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameter for parameter in parameters if parameter.ndim >= 2],
                "weight_decay": recipe.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=recipe.peak_learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    # All gradients, then the share of the schedule that is done, and the loss.
    exchanged = torch.zeros(sum(parameter.numel() for parameter in parameters) + 2)
    offset = 0
    for parameter in parameters:
        view = exchanged[offset : offset + parameter.numel()]
        parameter.grad = view.view_as(parameter)
        offset += parameter.numel()
    AttentionInterface.register("training", attend)
    model.config._attn_implementation = "training"
    model.train()
    now = time.monotonic()
    seconds = 0.0
    smoothed = None
    kept = 0.0
    done = 0.0
    for step, group_of_batches in enumerate(
        in_groups(draw_batches(grammar, tokenizer, recipe), num_processes)
    ):
        batch, length, drawn = group_of_batches[rank]
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_learning_rate * schedule(done, recipe.warmup_share)
        exchanged.zero_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = batch_loss(model, batch, length)
        loss.backward()
        before, now = now, time.monotonic()
        seconds += min(now - before, MAX_STEP_SECONDS)
        exchanged[-2] = max(drawn / recipe.num_conversations, seconds / max_seconds)
        exchanged[-1] = loss.item()
        distributed.all_reduce(exchanged)
        exchanged /= num_processes
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        done, mean_loss = exchanged[-2:].tolist()
        smoothed = mean_loss if smoothed is None else 0.98 * smoothed + 0.02 * mean_loss
        if rank == 0 and step % 100 == 0:
            print(
                f"step {step:5d}  conversations {drawn:7d} of {recipe.num_conversations}  "
                f"loss {smoothed:.4f}  {seconds:.0f} s",
                flush=True,
            )
        if rank == 0 and seconds > kept + SECONDS_BETWEEN_CHECKPOINTS:
            keep()
            kept = seconds
        if done >= 1.0:
            break
    if rank == 0:
        print(f"{step + 1} steps, {drawn} conversations, loss {smoothed:.4f}", flush=True)
    model.eval()


def in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield the batches in lists of `size`; what is left over at the end is dropped."""
    while len(group := list(islice(batches, size))) == size:
        yield group


def schedule(done: float, warmup_share: float) -> float:
    """Return the share of the peak learning rate at `done`, from 0 to 1: warm-up, then cosine."""
    if done < warmup_share:
        return done / warmup_share
    progress = (done - warmup_share) / (1.0 - warmup_share)
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """Return the same network in Llama's classes: a Qwen2 is a Llama with three more biases.

    Why: whatever a directory of the type qwen2 says, `AutoTokenizer` gives it Qwen2's own rules of
    splitting and normalising text, and this tokenizer was trained with others.
    """
    config = LlamaConfig(
        attention_bias=True, **{name: getattr(model.config, name) for name in SHARED_WITH_LLAMA}
    )
    llama = LlamaForCausalLM(config)
    # Llama has a bias on the attention's output too.
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    for name in missing:
        if not name.endswith("o_proj.bias"):
            raise ValueError(f"Qwen2 has no weight for {name}")
        torch.nn.init.zeros_(llama.get_parameter(name))
    if unexpected:
        raise ValueError(f"Llama has no place for {unexpected}")
    return llama.eval()


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the model directory beside `directory`, then move the files in, one rename each."""
    directory.mkdir(parents=True, exist_ok=True)
    llama = as_llama(model)
    llama.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".guide-") as temporary:
        llama.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            file.chmod(0o644)
            file.replace(directory / file.name)


def run_process(rank: int, arguments: argparse.Namespace, meeting_file: str) -> None:
    """Be one of the training processes; the first one prints, and writes the model."""
    recipe = Recipe(**{"num_conversations": arguments.conversations, **arguments.recipe})
    # Why a thread each: threads of one process wait for each other after every operation, which
    # on a shared machine costs more than it brings; processes meet once a step.
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=arguments.processes
    )
    started = time.monotonic()
    grammar = Grammar()
    rng = random.Random(recipe.seed + 1)
    if arguments.start_from:
        model, tokenizer = read_model(arguments.start_from)
    else:
        texts = (
            message["content"]
            for _ in range(recipe.num_tokenizer_conversations)
            for message in grammar.draw_conversation(rng)
        )
        tokenizer = train_tokenizer(texts, recipe.vocab_size, recipe.max_positions)
        model = build_model(tokenizer, recipe)
    if rank == 0:
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{len(grammar.topics)} topics, {num_parameters / 1e6:.2f} M parameters", flush=True)
    train(
        model,
        grammar,
        tokenizer,
        recipe,
        bfloat16=not arguments.float32,
        max_seconds=arguments.max_minutes * 60,
        keep=lambda: save(model, tokenizer, arguments.output),
    )
    if rank == 0:
        save(model, tokenizer, arguments.output)
        seconds = time.monotonic() - started
        print(f"wrote {arguments.output} after {seconds:.0f} s", flush=True)
    distributed.destroy_process_group()


def main() -> None:
    """Train as the command line asks, and write the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the model")
    parser.add_argument("--conversations", type=int, default=Recipe().num_conversations)
    parser.add_argument("--start-from", type=Path, help="go on from the weights of this directory")
    parser.add_argument("--recipe", type=json.loads, default={}, help="other numbers, as JSON")
    parser.add_argument("--processes", type=int, default=2, help="one CPU core each")
    parser.add_argument("--max-minutes", type=float, default=55, help="end the schedule by then")
    parser.add_argument("--float32", action="store_true", help="for a CPU without bf16")
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(
            run_process, (arguments, str(Path(directory) / "meeting")), nprocs=arguments.processes
        )


if __name__ == "__main__":
    main()
