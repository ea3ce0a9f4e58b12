# SPDX-License-Identifier: Apache-2.0
"""A model's files → the family they are of: its abilities, its form of tools, its variant.

For a launch that names a directory or a repository, and no family. All is read from small JSON
files and from the chat template that the tokenizer brings; what they do not say is left to the
engine.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from xinference.errors import InvalidRequest

from .encoder_family import EMBEDDING, NORMAL, RERANK, EncoderFamily
from .family import ModelFamily, Variant, parse_size
from .gguf_head import quantizations_of
from .memory import bits_of, gguf_bits
from .model_files import ModelFiles
from .sources import GGUF

_SCORES = "ForSequenceClassification"
_NO_LIMIT = 10**6
"""A tokenizer says such a number, or a larger one, where it knows no limit."""
_SENSES = {"vision_config": "vision", "audio_config": "audio"}
_QUANTIZERS = {
    "gptq": ("gptq", "Int{bits}"),
    "awq": ("awq", "Int{bits}"),
    "bitsandbytes": ("bnb", "{bits}-bit"),
    "fp8": ("fp8", "fp8"),
    "compressed-tensors": ("fp8", "fp8"),
}
"""By the method that a config names: the format, and how it calls so many bits."""

USUAL_QUANTIZATION = "Q4_K_M"
_THINK = ("<think>", "</think>")
_HARMONY_THOUGHTS = ("<|channel|>analysis<|message|>", "<|end|>")


def language_family(files: ModelFiles, name: str) -> ModelFamily:
    """Return the family that the files of a language model are of.

    Raises:
        InvalidRequest: they are those of another type of model, or of none.
    """
    config = _config(files)
    architectures = _texts(config.get("architectures"))
    if files.has("modules.json") or "pooling_type" in config:
        raise InvalidRequest(field="model_type", problem="the files are of a model that embeds")
    if any(one.endswith(_SCORES) for one in architectures):
        raise InvalidRequest(field="model_type", problem="the files are of a model that reranks")
    template, is_tokenizers = _template(files)
    tool_parser = tool_parser_of(template)
    thoughts = thoughts_of(template, tool_parser)
    abilities = ["chat" if template else "generate"]
    abilities += [ability for key, ability in _SENSES.items() if key in config]
    if thoughts is not None:
        abilities += ["reasoning", *(["hybrid"] if "enable_thinking" in template else [])]
    if tool_parser is not None:
        abilities.append("tools")
    return ModelFamily(
        model_name=name,
        model_description="",
        context_length=None,
        model_lang=(),
        model_ability=tuple(abilities),
        license=None,
        model_family=name,
        architectures=architectures,
        chat_template=None if is_tokenizers else template or None,
        stop_token_ids=(),
        stop=(),
        reasoning_start_tag=thoughts and thoughts[0],
        reasoning_end_tag=thoughts and thoughts[1],
        tool_parser=tool_parser,
        variants=_gguf_variants(files) or (_variant(files, config),),
        is_builtin=False,
    )


def encoder_family(files: ModelFiles, name: str, model_type: str) -> EncoderFamily:
    """Return the family that the files of a model that embeds or reranks are of.

    Raises:
        InvalidRequest: they are those of another type of model, or do not say enough.
    """
    if files.gguf_sizes:
        raise InvalidRequest(
            field="model_type", problem=f"is {model_type}, and GGUF files are served as LLM alone"
        )
    config = _config(files)
    architectures = _texts(config.get("architectures"))
    scores = any(one.endswith(_SCORES) for one in architectures)
    if model_type == RERANK and not scores:
        raise InvalidRequest(
            field="model_name", problem="is needed: the files do not say how the model reranks"
        )
    if model_type == EMBEDDING and scores:
        raise InvalidRequest(field="model_type", problem="the files are of a model that reranks")
    max_tokens = _max_tokens(files, config)
    dimensions = _dimensions(files, config) if model_type == EMBEDDING else None
    if max_tokens is None or (model_type == EMBEDDING and dimensions is None):
        raise InvalidRequest(
            field="model_name", problem="is needed: the files do not say how long texts may be"
        )
    return EncoderFamily(
        model_type=model_type,
        model_name=name,
        model_description="",
        max_tokens=max_tokens,
        language=(),
        model_ability=("embed",) if model_type == EMBEDDING else ("rerank",),
        license=None,
        variants=(_variant(files, config),),
        is_builtin=False,
        dimensions=dimensions,
        rerank_type=NORMAL if model_type == RERANK else None,
    )


def tool_parser_of(template: str) -> str | None:
    """Return how the calls are written that a template shows its model; None: none, or unknown."""
    if "tools" not in template:
        return None
    if "<|channel|>" in template:
        return "harmony"
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek-v3" if "```json" in template else "deepseek-v3.1"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<arg_key>" in template:
        return "glm4.5"
    if "<start_function_call>" in template or "<|tool_call>" in template:
        return "gemma"
    if "<tool_call>" in template:
        # Why not with these: Qwen's coders write calls as XML between the same marks.
        return None if "<function=" in template else "qwen"
    if "<|python_tag|>" in template or "Environment: ipython" in template:
        return "llama3"
    return "glm4" if "<|observation|>" in template else None


def thoughts_of(template: str, tool_parser: str | None) -> tuple[str, str] | None:
    """Return what the thoughts stand between that a template leaves room for; None: it has none."""
    if tool_parser == "harmony":
        return _HARMONY_THOUGHTS
    return _THINK if all(tag in template for tag in _THINK) else None


def _config(files: ModelFiles) -> dict[str, Any]:
    config = files.document("config.json")
    if config is None:
        raise InvalidRequest(
            field="model_name",
            problem=f"is needed: there is no config.json in {files} that the supervisor can read"
            + (" as JSON" if files.has("config.json") else ""),
        )
    return config


def _template(files: ModelFiles) -> tuple[str, bool]:
    """Return the chat template or "", and whether the tokenizer finds it by itself."""
    beside = files.chat_template()
    if beside is not None:
        return beside, True
    given = (files.document("tokenizer_config.json") or {}).get("chat_template")
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    if isinstance(given, str):
        return given, True
    given = (files.document("chat_template.json") or {}).get("chat_template")
    return (given, False) if isinstance(given, str) else ("", True)


def _gguf_variants(files: ModelFiles) -> tuple[Variant, ...]:
    """Return a variant for each quantization where the files are GGUF, the usual one first."""
    found = quantizations_of(files.gguf_sizes)
    source = files.source

    def variant(quantization: str, names: Sequence[str]) -> Variant:
        num_bytes = sum(files.gguf_sizes[name] for name in names)
        bits = gguf_bits(quantization)
        return Variant(
            model_format=GGUF,
            size=parse_size(f"{num_bytes * 8 / bits / 1e9:.3f}") or Decimal(0),
            quantization=quantization,
            model_hub="local" if source is None else source.hub,
            model_id=None if source is None else source.model_id,
            path=files.path,
            # Why as parts: they are found by their names, which follow no rule.
            carried={
                "model_file_name_split_template": "{part}",
                "quantization_parts": {quantization: list(names)},
            }
            if source is not None
            else {},
        )

    order = sorted(found, key=lambda name: (name.upper() != USUAL_QUANTIZATION, name))
    return tuple(variant(name, found[name]) for name in order)


def _variant(files: ModelFiles, config: Mapping[str, Any]) -> Variant:
    model_format, quantization = _format(config)
    weights, source = files.weights(), files.source
    size = Decimal(0)
    if weights is not None:
        bits = bits_of(quantization) or 16
        count = weights.num_parameters or weights.num_bytes * 8 // bits
        size = parse_size(f"{count / 1e9:.3f}") or Decimal(0)
    return Variant(
        model_format=model_format,
        size=size,
        quantization=quantization,
        model_hub="local" if source is None else source.hub,
        model_id=None if source is None else source.model_id,
        path=files.path,
    )


def _format(config: Mapping[str, Any]) -> tuple[str, str]:
    given = config.get("quantization_config")
    if isinstance(given, Mapping):
        known = _QUANTIZERS.get(str(given.get("quant_method")))
        bits = given.get("bits") or (4 if given.get("load_in_4bit") else 8)
        return ("pytorch", "none") if known is None else (known[0], known[1].format(bits=bits))
    mlx = config.get("quantization")
    if isinstance(mlx, Mapping):
        return "mlx", f"{mlx.get('bits', 4)}bit"
    return "pytorch", "none"


def _max_tokens(files: ModelFiles, config: Mapping[str, Any]) -> int | None:
    sentences = files.document("sentence_bert_config.json") or {}
    tokenizer = files.document("tokenizer_config.json") or {}
    for given in (
        sentences.get("max_seq_length"),
        tokenizer.get("model_max_length"),
        config.get("max_position_embeddings"),
    ):
        if isinstance(given, int) and 0 < given < _NO_LIMIT:
            return given
    return None


def _dimensions(files: ModelFiles, config: Mapping[str, Any]) -> int | None:
    pooling = files.document("1_Pooling/config.json") or {}
    for given in (pooling.get("word_embedding_dimension"), config.get("hidden_size")):
        if isinstance(given, int) and given > 0:
            return given
    return None


def _texts(given: object) -> tuple[str, ...]:
    return tuple(one for one in given if isinstance(one, str)) if isinstance(given, list) else ()
