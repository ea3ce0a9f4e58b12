# SPDX-License-Identifier: Apache-2.0
"""A model that turns texts into vectors: `sentence_transformers` underneath, batches of our own.

In: `EmbeddingRequest`. Out: pieces with the vectors, in the order in which they are computed. It
owns prompts, token limits and what is computed of a batch; `encoder_loop.py` owns the thread, and
`batching.py` says which texts of which callers are computed together. The modules of the files
compute the vectors, so they are those of `SentenceTransformer.encode`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch.nn import functional

from xinference.engine.config import Placement
from xinference.errors import AbilityMissing, InvalidRequest, LoadFailed
from xinference.identifiers import RequestId
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.vectors import (
    BYTES_PER_NUMBER,
    CUT_TO_MODEL,
    DenseVectors,
    EmbeddingRequest,
    InputType,
    ModelRequest,
    SparseVector,
    TokenVectors,
    VectorKind,
    VectorPiece,
)

from .base import OnProgress, expect
from .batching import MAX_ANSWER_BYTES
from .embedding_heads import MultiVectorHead, SparseHead, load_heads
from .encoder import Described, EncoderModel
from .encoder_loading import loading, pack, place, set_threads
from .encoder_loop import Texts, TokenIds
from .text_tokens import TextTokens, ids_of

Floats = npt.NDArray[np.float32]

DEFAULT_MAX_TOKENS = 512
"""Of a text, where the files do not say."""
PIECE_BYTES = 256 * 1024
"""About so much of a text's many vectors travels in one piece."""
PROMPTS_OF: Mapping[InputType, tuple[str, ...]] = {
    InputType.QUERY: ("query", "search_query", "retrieval.query"),
    InputType.DOCUMENT: ("document", "passage", "search_document", "retrieval.passage"),
}
"""Names that files give to the prompts for queries and for documents."""
ABILITY_OF = {
    VectorKind.DENSE: "give dense vectors",
    VectorKind.SPARSE: "give sparse vectors",
    VectorKind.MULTI_VECTOR: "give a vector for each token",
}


@dataclass(frozen=True, slots=True)
class TextVectors:
    """What was computed of one text: what any caller of its batch wants."""

    dense: Floats
    sparse: tuple[npt.NDArray[np.int32], Floats] | None
    tokens: Floats | None


@dataclass(slots=True, eq=False)
class EmbeddingJob:
    """One request while it is computed. Implements `Job`."""

    request: EmbeddingRequest
    texts: list[TokenIds]
    prompt_length: int
    """Tokens at the beginning of each text that are its prompt."""
    dense_bytes: int
    token_bytes: int
    """Of each token, where all have a vector; else 0."""
    renormalize: bool
    """Vectors that are cut are of unit length again."""

    @property
    def request_id(self) -> RequestId:
        """Of the request."""
        return self.request.request_id

    def num_answer_bytes(self, index: int) -> int:
        """Return how large the vectors of one text will be."""
        return self.dense_bytes + self.token_bytes * len(self.texts[index])

    def read(self, indices: Sequence[int], results: Sequence[TextVectors]) -> list[VectorPiece]:
        """Return the vectors that are wanted of these texts."""
        pieces: list[VectorPiece] = []
        if VectorKind.DENSE in self.request.kinds:
            rows = np.stack([result.dense for result in results])
            data = self._cut(rows).astype("<f4").tobytes()
            pieces.append(DenseVectors(indices=tuple(indices), data=data))
        for index, result in zip(indices, results, strict=True):
            if VectorKind.SPARSE in self.request.kinds and result.sparse is not None:
                token_ids, weights = result.sparse
                pieces.append(
                    SparseVector(
                        index=index,
                        token_ids=tuple(token_ids.tolist()),
                        weights=weights.astype("<f4").tobytes(),
                    )
                )
            if VectorKind.MULTI_VECTOR in self.request.kinds and result.tokens is not None:
                pieces += _token_pieces(index, result.tokens)
        return pieces

    def _cut(self, rows: Floats) -> Floats:
        dimensions = self.request.dimensions
        if dimensions is None or dimensions == rows.shape[1]:
            return rows
        cut = rows[:, :dimensions]
        if self.renormalize:
            cut = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
        return cut


def _token_pieces(index: int, rows: Floats) -> list[VectorPiece]:
    dimensions = rows.shape[1]
    num_rows = max(1, PIECE_BYTES // (dimensions * BYTES_PER_NUMBER))
    return [
        TokenVectors(
            index=index,
            dimensions=dimensions,
            data=rows[first : first + num_rows].astype("<f4").tobytes(),
        )
        for first in range(0, len(rows), num_rows)
    ]


class EmbeddingModel(EncoderModel):
    """A loaded embedding model."""

    def __init__(
        self,
        model: SentenceTransformer,
        spec: ReplicaSpec,
        placement: Placement,
        *,
        sparse: SparseHead | None = None,
        multi_vector: MultiVectorHead | None = None,
    ) -> None:
        first, *rest = model.children()
        if not isinstance(first, Transformer) or "message" in first.modality_config:
            raise LoadFailed(
                model=str(spec.replica.model),
                problem=f"its first module, {type(first).__name__}, does not take plain tokens; "
                "only models whose first module is a Transformer are served",
            )
        super().__init__(
            spec,
            placement,
            first.config,
            max_tokens=int(model.max_seq_length or DEFAULT_MAX_TOKENS),
        )
        self._transformer = first
        self._rest = rest
        self._sparse = sparse
        self._multi_vector = multi_vector
        self._tokens = TextTokens(first.tokenizer, model_name=self._name)
        self._normalize = spec.encoder_options.normalize_embeddings
        self._prompts = {**spec.source.prompts, **_given_prompts(model.prompts)}
        self._default_prompt = self._prompts.get(model.default_prompt_name or "", "")
        self._excludes_prompt = any(getattr(one, "include_prompt", True) is False for one in rest)
        self.dimensions = int(model.get_embedding_dimension() or 0)
        """Of a dense vector."""

    @property
    def kinds(self) -> tuple[VectorKind, ...]:
        """What it can make of a text."""
        has = {
            VectorKind.DENSE: True,
            VectorKind.SPARSE: self._sparse is not None,
            VectorKind.MULTI_VECTOR: self._multi_vector is not None,
        }
        return tuple(kind for kind, is_there in has.items() if is_there)

    def about(self) -> Mapping[str, Described]:
        """Return what it gives and takes."""
        return {
            "dimensions": self.dimensions,
            "kinds": ", ".join(self.kinds),
            "prompts": ", ".join(sorted(self._prompts)),
        }

    # --- before the model's thread

    def prepare(self, request: ModelRequest) -> EmbeddingJob:
        """Return the token ids of a request.

        Raises:
            AbilityMissing: the request is not for vectors, or for a kind that this model has not.
            InvalidRequest: a text is longer than the model takes, say.
        """
        request = expect(request, EmbeddingRequest, model_name=self._name)
        for kind in request.kinds:
            if kind not in self.kinds:
                raise AbilityMissing(model=self._name, ability=ABILITY_OF[kind])
        if request.dimensions is not None and request.dimensions > self.dimensions:
            raise InvalidRequest(
                field="dimensions",
                problem=f"must be at most the {self.dimensions} of this model, "
                f"got {request.dimensions}",
            )
        prompt = self._prompt_of(request)
        texts = self._encode(request, prompt)
        token_bytes = 0
        if VectorKind.MULTI_VECTOR in request.kinds and self._multi_vector is not None:
            token_bytes = self._multi_vector.dimensions * BYTES_PER_NUMBER
            num_bytes = token_bytes * sum(map(len, texts))
            if num_bytes > MAX_ANSWER_BYTES:
                raise InvalidRequest(
                    field="return_multi_vector",
                    problem=f"the vectors of {sum(map(len, texts))} tokens are {num_bytes} bytes, "
                    f"more than the {MAX_ANSWER_BYTES} of one request; send fewer texts at once",
                )
        return EmbeddingJob(
            request=request,
            texts=texts,
            prompt_length=self._prompt_length(prompt) if self._excludes_prompt else 0,
            dense_bytes=self.dimensions * BYTES_PER_NUMBER,
            token_bytes=token_bytes,
            renormalize=self._normalize,
        )

    def _prompt_of(self, request: EmbeddingRequest) -> str:
        if request.prompt is not None:
            return request.prompt
        if request.prompt_name is not None:
            if request.prompt_name not in self._prompts:
                known = ", ".join(sorted(self._prompts)) or "none"
                raise InvalidRequest(
                    field="prompt_name",
                    problem=f"{request.prompt_name[:60]!r} is not a prompt of this model; "
                    f"it has {known}",
                )
            return self._prompts[request.prompt_name]
        if request.input_type is not None:
            # Why no refusal: a model without such a prompt was trained to take both as they are.
            names = [name for name in PROMPTS_OF[request.input_type] if name in self._prompts]
            return self._prompts[names[0]] if names else ""
        if all(isinstance(given, str) for given in request.inputs):
            return self._default_prompt
        return ""

    def _prompt_length(self, prompt: str) -> int:
        if not prompt:
            return 0
        (encoding,) = self._tokens.encodings([prompt], special=True)
        ends_special = encoding.ids[-1] in self._tokens.special_ids
        return len(encoding.ids) - ends_special

    def _encode(self, request: EmbeddingRequest, prompt: str) -> list[TokenIds]:
        cut_to = request.truncate_to
        if cut_to == CUT_TO_MODEL:
            cut_to = self._context_length
        elif cut_to is not None and cut_to > self._context_length:
            raise InvalidRequest(
                field="truncate_prompt_tokens",
                problem=f"must be at most the {self._context_length} tokens that this model "
                f"takes, got {cut_to}",
            )
        strings = [prompt + given for given in request.inputs if isinstance(given, str)]
        num_special = self._tokens.num_special(of_pair=False)
        if cut_to is not None and cut_to <= num_special:
            raise InvalidRequest(
                field="truncate_prompt_tokens",
                problem=f"leaves no room beside the {num_special} tokens that the model adds",
            )
        encodings = self._tokens.encodings(strings, special=cut_to is None)
        texts: list[TokenIds] = []
        for index, given in enumerate(request.inputs):
            if isinstance(given, str):
                encoding = next(encodings)
                if cut_to is not None:
                    encoding.truncate(cut_to - num_special)
                    encoding = self._tokens.finish(encoding)
                ids = ids_of(encoding)
            else:
                ids = self._checked_ids(index, given)
                ids = ids if cut_to is None else ids[:cut_to]
            self._check_length(index, len(ids))
            texts.append(ids)
        return texts

    def _checked_ids(self, index: int, given: tuple[int, ...]) -> TokenIds:
        if not 0 <= min(given) <= max(given) < self._tokens.vocab_size:
            raise InvalidRequest(
                field=f"input.{index}",
                problem=f"has ids that are none of the model's {self._tokens.vocab_size} tokens",
            )
        return np.asarray(given, dtype=np.int32)

    def _check_length(self, index: int, num_tokens: int) -> None:
        if num_tokens == 0:
            raise InvalidRequest(field=f"input.{index}", problem="has no tokens")
        if num_tokens > self._context_length:
            raise InvalidRequest(
                field=f"input.{index}",
                problem=f"has {num_tokens} tokens, more than the {self._context_length} that this "
                "model takes; truncate_prompt_tokens -1 cuts it to them",
            )

    def try_out(self) -> None:
        """Compute a text of two tokens, and say nothing of it."""
        self._transformed([np.arange(2, dtype=np.int32)])

    # --- in the model's thread

    def compute(self, texts: Texts) -> list[TextVectors]:
        """Return the vectors of some texts of embedding jobs, computed together."""
        jobs = [(job, index) for job, index in texts if isinstance(job, EmbeddingJob)]
        rows = [job.texts[index] for job, index in jobs]
        wanted = {kind for job, _ in jobs for kind in job.request.kinds}
        with torch.inference_mode():
            features = self._transformed(rows)
            hidden, mask = features["token_embeddings"], features["attention_mask"]
            sparse = tokens = None
            if VectorKind.SPARSE in wanted and self._sparse is not None:
                sparse = self._sparse.weights(hidden, rows, mask)
            if VectorKind.MULTI_VECTOR in wanted and self._multi_vector is not None:
                tokens = self._multi_vector.vectors(hidden, mask)
            if self._excludes_prompt:
                features["attention_mask"] = _without_prompts(
                    mask, [job.prompt_length for job, _ in jobs]
                )
            for module in self._rest:
                features = module(features)
            vectors = features["sentence_embedding"].float()
            if self._normalize:
                vectors = functional.normalize(vectors, dim=1)
        dense = vectors.cpu().numpy()
        return [
            TextVectors(
                dense[row],
                None if sparse is None else sparse[row],
                None if tokens is None else tokens[row],
            )
            for row in range(len(rows))
        ]

    def _transformed(self, rows: Sequence[TokenIds]) -> dict[str, Any]:
        """Return what the first module makes of some texts."""
        given = self._tokens.features(rows, None, self._placement.device)
        features: dict[str, Any] = self._transformer(given)
        return features


def _without_prompts(mask: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the mask without the first so many tokens of each row, wherever the row begins."""
    position = mask.cumsum(dim=1)
    prompts = torch.tensor(lengths, device=mask.device).unsqueeze(1)
    return mask * (position > prompts)


def _given_prompts(prompts: Mapping[str, str | None]) -> dict[str, str]:
    # Why not the empty ones: sentence_transformers adds query and document to every model.
    return {name: text for name, text in prompts.items() if text}


def load_embedding_model(spec: ReplicaSpec, *, on_progress: OnProgress) -> EmbeddingModel:
    """Load tokenizer, weights and the modules behind them.

    Raises:
        LoadFailed: the files are not there or do not load.
        InvalidRequest: an option asks for what this model or machine cannot do.
    """
    name = str(spec.replica.model)
    with loading(spec, name, on_progress) as path:
        set_threads(spec.engine_options)
        placement = place(path, spec, name)
        model = SentenceTransformer(
            str(path),
            device=str(placement.device),
            local_files_only=True,
            trust_remote_code=spec.engine_options.trust_remote_code,
            model_kwargs={"dtype": placement.dtype},
        )
        model.eval().requires_grad_(False)
        sparse, multi_vector = _heads(path, model, placement)
        loaded = EmbeddingModel(model, spec, placement, sparse=sparse, multi_vector=multi_vector)
        pack(model, placement, loaded.try_out)
        return loaded


def _heads(
    path: Path, model: SentenceTransformer, placement: Placement
) -> tuple[SparseHead | None, MultiVectorHead | None]:
    tokenizer: Any = model.tokenizer
    ids = (
        tokenizer.cls_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    )
    return load_heads(
        path,
        device=placement.device,
        dtype=placement.dtype,
        unused_ids=frozenset(one for one in ids if one is not None),
    )
