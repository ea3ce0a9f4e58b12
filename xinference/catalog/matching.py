# SPDX-License-Identifier: Apache-2.0
"""What was asked for → one variant of a family and an engine that runs it, or why not.

Pure: names, numbers and texts only. What is not asked for is chosen: the first variant, in the
order of the data, that the engine can run. Every refusal says what would be accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from xinference.errors import InvalidRequest, UnsupportedVariant
from xinference.protocol.servers import ServerEngine, server_engine_named

from .family import ModelFamily, Variant, parse_size, size_text
from .runnable import TRANSFORMERS, refusal
from .schema import did_you_mean

MAX_SUGGESTIONS = 8

ENGINES: tuple[str, ...] = (TRANSFORMERS, *ServerEngine)
"""Those that are served, in the order in which users see them."""
OTHER_ENGINES = {
    "MLX": "is for Apple silicon, which this version does not serve; use Transformers",
    "LMDEPLOY": "is not served; use Transformers",
}
"""Engines that users know by name, and why this version does not offer them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a launch says of the variant it wants. None: whatever there is."""

    size: Decimal | None = None
    model_format: str | None = None
    quantization: str | None = None

    @classmethod
    def of(cls, *, size: str | None, model_format: str | None, quantization: str | None) -> "Wish":
        """Read the texts of a launch; letter case does not matter, "0.5" is "0_5", "" is None.

        Raises:
            InvalidRequest: the size is not a number.
        """
        billions = parse_size(size.strip()) if size else None
        if size and billions is None:
            raise InvalidRequest(
                field="model_size_in_billions", problem=f"must be as 7, 0_5 or 0.5, got {size!r}"
            )
        return cls(
            size=billions,
            model_format=model_format.casefold() if model_format else None,
            quantization=quantization.casefold() if quantization else None,
        )

    def parts(self, variant: Variant) -> list[tuple[str, bool]]:
        """Return each thing that is asked for, in words, and whether the variant is that."""
        parts = []
        if self.size is not None:
            billions = size_text(self.size).replace("_", ".")
            parts.append((f"of {billions}B", self.size == variant.size))
        if self.model_format is not None:
            parts.append(
                (f"in format {self.model_format}", self.model_format == variant.model_format)
            )
        if self.quantization is not None:
            is_so = self.quantization == variant.quantization.casefold()
            parts.append((f"with quantization {self.quantization}", is_so))
        return parts

    def num_misses(self, variant: Variant) -> int:
        """Count what is asked for and the variant is not; 0 if it fits."""
        return sum(not is_so for _, is_so in self.parts(variant))


def engine_named(name: str | None) -> str:
    """Return the engine's name as it is written; None asks for the default one.

    Raises:
        InvalidRequest: there is none of this name, or this version does not serve it.
    """
    if name is None:
        return TRANSFORMERS
    server = server_engine_named(name)
    known = name if server is None else str(server)
    for engine in ENGINES:
        if known.casefold() == engine.casefold():
            return str(engine)
    for other, reason in OTHER_ENGINES.items():
        if known.casefold() == other.casefold():
            raise InvalidRequest(field="model_engine", problem=f"{other} {reason}")
    raise InvalidRequest(
        field="model_engine",
        problem=f"{name!r} is not an engine" + did_you_mean(name, (*ENGINES, *OTHER_ENGINES)),
    )


def find(family: ModelFamily, wish: Wish) -> Variant:
    """Return the first variant that fits a wish, whether anything here runs it or not.

    Raises:
        UnsupportedVariant: there is none.
    """
    return _fitting(family, wish, TRANSFORMERS)[0]


def match(
    family: ModelFamily,
    wish: Wish,
    engine: str = TRANSFORMERS,
    *,
    trust_remote_code: bool = False,
) -> Variant:
    """Choose the variant to launch with an engine.

    Args:
        family: to choose from.
        wish: what the launch says.
        engine: as it is written.
        trust_remote_code: whether code that comes with the files may run.

    Raises:
        UnsupportedVariant: none fits the wish, or none that fits can run.
    """
    fitting = _fitting(family, wish, engine)
    reasons = [refusal(family, one, engine, trust_remote_code=trust_remote_code) for one in fitting]
    for variant, reason in zip(fitting, reasons, strict=True):
        if reason is None:
            return variant
    raise UnsupportedVariant(
        family=family.model_name,
        problem=reasons[0] or "",
        suggestions=_near(family, wish, engine),
    )


def parameter_objects(
    family: ModelFamily, engine: str = TRANSFORMERS
) -> list[dict[str, object]] | str:
    """Return what `GET /v1/engines` shows of an engine: one object for each format and size.

    A text says why none of the variants can run.
    """
    runnable = [one for one in family.variants if refusal(family, one, engine) is None]
    if not runnable:
        return refusal(family, family.variants[0], engine) or ""
    grouped: dict[tuple[str, Decimal], list[str]] = {}
    for variant in runnable:
        quantizations = grouped.setdefault((variant.model_format, variant.size), [])
        if variant.quantization not in quantizations:
            quantizations.append(variant.quantization)
    return [
        {
            "model_name": family.model_name,
            "model_format": model_format,
            "model_size_in_billions": size_text(size) if size % 1 else int(size),
            "quantizations": quantizations,
        }
        for (model_format, size), quantizations in grouped.items()
    ]


def missing_words(variants: Sequence[Variant], wish: Wish) -> str:
    """Return what of a wish none of the variants is, in words."""
    by_variant = [wish.parts(variant) for variant in variants]
    asked = [words for words, _ in by_variant[0]]
    # Why: "no variant of 5B" is clearer than the whole wish where the size alone fails.
    for index, words in enumerate(asked):
        if not any(parts[index][1] for parts in by_variant):
            return words
    return " ".join(asked)


def _fitting(family: ModelFamily, wish: Wish, engine: str) -> list[Variant]:
    fitting = [variant for variant in family.variants if wish.num_misses(variant) == 0]
    if not fitting:
        raise UnsupportedVariant(
            family=family.model_name,
            problem="there is no variant " + missing_words(family.variants, wish),
            suggestions=_near(family, wish, engine),
        )
    return fitting


def _near(family: ModelFamily, wish: Wish, engine: str) -> list[str]:
    def distance(variant: Variant) -> tuple[int, Decimal]:
        size = wish.size if wish.size is not None else Decimal(0)
        return wish.num_misses(variant), abs(variant.size - size)

    runnable = [one for one in family.variants if refusal(family, one, engine) is None]
    nearest = sorted(runnable, key=distance)
    return list(dict.fromkeys(str(variant) for variant in nearest))[:MAX_SUGGESTIONS]
