# SPDX-License-Identifier: Apache-2.0
"""A model that scores documents by their relevance to a query: cross-encoders and language models.

In: `RerankRequest`. Out: one `Scores` when every document has been read. A document that does not
fit the model beside its query is read chunk by chunk and has the score of its best one. What a
pair of texts looks like to a model, and how it is scored, is its `Scorer`'s; batches are those of
`encoder_loop.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from tokenizers import Encoding
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from xinference.engine.config import Placement
from xinference.errors import InvalidRequest, LoadFailed
from xinference.identifiers import RequestId
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.encoding import RerankTemplate
from xinference.protocol.vectors import ModelRequest, RerankRequest, Scores, VectorPiece

from .base import OnProgress, expect
from .encoder import Described, EncoderModel
from .encoder_loading import check_complete, loading, pack, place, set_threads
from .encoder_loop import Texts, TokenIds
from .text_tokens import TextTokens, ids_of

OVERLAP_SHARE = 8
"""A chunk begins with the last eighth of the one before, so that no sentence is only cut."""
SCORE_BYTES = 9
DEFAULT_MAX_TOKENS = 512
"""Of a row, where the files do not say."""


@dataclass(frozen=True, slots=True)
class Row:
    """A query and a chunk of a document, as a model reads them."""

    ids: TokenIds
    type_ids: TokenIds | None = None


class Scorer(Protocol):
    """A loaded model that scores rows."""

    @property
    def tokens(self) -> TextTokens:
        """Its tokenizer."""
        ...

    @property
    def config(self) -> Any:
        """Of the model, as transformers has it."""
        ...

    @property
    def max_tokens(self) -> int:
        """Of a row, by the files."""
        ...

    @property
    def bytes_per_row(self) -> int:
        """Memory that a row takes whatever its length."""
        ...

    def rows(self, request: RerankRequest, room: int) -> Iterator[tuple[int, Row]]:
        """Yield every document's index with a row, or with several where it is long.

        Args:
            room: tokens that a row may have.

        Raises:
            InvalidRequest
        """
        ...

    def score(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return the score of each row: (rows,)."""
        ...


class CrossEncoderScorer:
    """A classifier with one label over the pair of query and document. Implements `Scorer`."""

    def __init__(self, model: CrossEncoder, placement: Placement, *, model_name: str) -> None:
        (first, *_) = model.children()
        if not isinstance(first, Transformer) or "message" in first.modality_config:
            raise LoadFailed(model=model_name, problem="it does not take plain pairs of texts")
        architectures = first.config.architectures or ["its class"]
        if not any(one.endswith("ForSequenceClassification") for one in architectures):
            # Why: transformers would make up the classifier's weights.
            problem = f"{', '.join(architectures)} is no classifier over pairs of texts"
            raise LoadFailed(model=model_name, problem=problem)
        if model.num_labels != 1:
            raise LoadFailed(
                model=model_name,
                problem=f"it gives {model.num_labels} scores to a pair; a reranker gives one",
            )
        self._model = model
        self._placement = placement
        self.config = first.config
        self.tokens = TextTokens(first.tokenizer, model_name=model_name)
        self.max_tokens = int(model.max_seq_length or DEFAULT_MAX_TOKENS)
        self.bytes_per_row = 0

    def rows(self, request: RerankRequest, room: int) -> Iterator[tuple[int, Row]]:
        """See `Scorer`."""
        if request.instruction is not None:
            raise InvalidRequest(field="instruction", problem="this model takes none")
        (query,) = self.tokens.encodings([request.query], special=False)
        left = _left_beside(len(query.ids) + self.tokens.num_special(of_pair=True), room)
        documents = self.tokens.encodings(request.documents, special=False)
        for index, document in enumerate(documents):
            for chunk in _chunks(document, request, left):
                pair = self.tokens.finish(query, chunk)
                yield index, Row(ids_of(pair), np.asarray(pair.type_ids, dtype=np.int32))

    def score(self, rows: Sequence[Row]) -> torch.Tensor:
        """See `Scorer`."""
        types = [row.type_ids for row in rows if row.type_ids is not None]
        ids = [row.ids for row in rows]
        features = self._model(self.tokens.features(ids, types, self._placement.device))
        scores = features["scores"].float()
        if self._model.activation_fn is not None:
            scores = self._model.activation_fn(scores)
        flat: torch.Tensor = scores.reshape(len(rows))
        return flat


class LanguageScorer:
    """A language model that is asked for a yes or a no. Implements `Scorer`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: RerankTemplate,
        placement: Placement,
        *,
        model_name: str,
    ) -> None:
        # Why: the next token of every row is then at the same place.
        tokenizer.padding_side = "left"
        self._model = model
        self._template = template
        self._placement = placement
        self.config = model.config
        self.tokens = TextTokens(tokenizer, model_name=model_name)
        self.max_tokens = int(getattr(model.config, "max_position_embeddings", 0) or 8192)
        self.bytes_per_row = 2 * 4 * int(model.config.vocab_size)
        self._yes = _token_id(tokenizer, template.yes, model_name)
        self._no = None if template.no is None else _token_id(tokenizer, template.no, model_name)
        before, _, after = template.document.partition("{document}")
        self._prefix, self._suffix, self._before, self._after = (
            self._plain(text) for text in (template.prefix, template.suffix, before, after)
        )

    def _plain(self, text: str) -> TokenIds:
        encodings = list(self.tokens.encodings([text], special=False)) if text else []
        return ids_of(encodings[0]) if encodings else np.zeros(0, dtype=np.int32)

    def rows(self, request: RerankRequest, room: int) -> Iterator[tuple[int, Row]]:
        """See `Scorer`."""
        takes_instruction = "{instruction}" in self._template.query
        if request.instruction is not None and not takes_instruction:
            raise InvalidRequest(field="instruction", problem="this model takes none")
        asked = self._template.query.replace(
            "{instruction}", request.instruction or self._template.instruction or ""
        ).replace("{query}", request.query)
        query = self._plain(asked)
        frame = (self._prefix, query, self._before, self._after, self._suffix)
        left = _left_beside(sum(map(len, frame)), room)
        head = np.concatenate([self._prefix, query])
        documents = self.tokens.encodings(request.documents, special=False)
        whole = self.tokens.encodings(
            [self._template.document.replace("{document}", one) for one in request.documents],
            special=False,
        )
        for index, (document, framed) in enumerate(zip(documents, whole, strict=True)):
            limit = request.max_tokens_per_doc
            if len(document.ids) <= min(left, limit or left):
                # Why not put together: the tokens at the seams may be others in one text.
                yield index, Row(np.concatenate([head, ids_of(framed), self._suffix]))
                continue
            for chunk in _chunks(document, request, left):
                parts = (head, self._before, ids_of(chunk), self._after, self._suffix)
                yield index, Row(np.concatenate(parts))

    def score(self, rows: Sequence[Row]) -> torch.Tensor:
        """See `Scorer`."""
        features = self.tokens.features([row.ids for row in rows], None, self._placement.device)
        mask = features["attention_mask"]
        logits = self._model(
            input_ids=features["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1, :]
        yes = logits[:, self._yes].float()
        return torch.sigmoid(yes if self._no is None else yes - logits[:, self._no].float())


def _left_beside(num_tokens: int, room: int) -> int:
    """Return how many tokens of a row are left for its document.

    Raises:
        InvalidRequest: less than half of it.
    """
    if num_tokens > room // 2:
        raise InvalidRequest(
            field="query",
            problem=f"takes {num_tokens} tokens with what the model adds, more than half of the "
            f"{room} that it reads at once; nothing worth while is left for a document",
        )
    return room - num_tokens


def _chunks(document: Encoding, request: RerankRequest, left: int) -> list[Encoding]:
    if request.max_tokens_per_doc is not None:
        document.truncate(request.max_tokens_per_doc)
    if len(document.ids) <= left:
        return [document]
    document.truncate(left, stride=left // OVERLAP_SHARE)
    return [document, *document.overflowing][: request.max_chunks_per_doc]


def _token_id(tokenizer: Any, text: str, model_name: str) -> int:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise LoadFailed(model=model_name, problem=f"{text!r} is {len(ids)} of its tokens, not one")
    return ids[0]


@dataclass(slots=True, eq=False)
class RerankJob:
    """One request while it is computed. Implements `Job`."""

    request: RerankRequest
    rows: list[Row]
    owners: list[int]
    """Of each row, which document it belongs to."""
    num_left: int
    scores: list[float] = field(default_factory=list)

    @property
    def request_id(self) -> RequestId:
        """Of the request."""
        return self.request.request_id

    @property
    def texts(self) -> list[TokenIds]:
        """The token ids of each row."""
        return [row.ids for row in self.rows]

    def num_answer_bytes(self, index: int) -> int:
        """Return the size of a score."""
        return SCORE_BYTES

    def read(self, indices: Sequence[int], results: Sequence[float]) -> list[VectorPiece]:
        """Return all scores, when these were the last."""
        for index, score in zip(indices, results, strict=True):
            owner = self.owners[index]
            self.scores[owner] = max(self.scores[owner], score)
        self.num_left -= len(indices)
        return [] if self.num_left else [Scores(scores=tuple(self.scores))]


class RerankModel(EncoderModel):
    """A loaded reranker."""

    def __init__(self, scorer: Scorer, spec: ReplicaSpec, placement: Placement) -> None:
        super().__init__(
            spec,
            placement,
            scorer.config,
            max_tokens=scorer.max_tokens,
            bytes_per_row=scorer.bytes_per_row,
        )
        self._scorer = scorer

    def about(self) -> Mapping[str, Described]:
        """Return how it scores."""
        return {"scorer": type(self._scorer).__name__}

    def prepare(self, request: ModelRequest) -> RerankJob:
        """Return the rows of a request.

        Raises:
            AbilityMissing: the request is not for scores.
            InvalidRequest: the query leaves no room for documents, say.
        """
        asked = expect(request, RerankRequest, model_name=self._name)
        owners, rows = zip(*self._scorer.rows(asked, self._context_length), strict=True)
        return RerankJob(
            request=asked,
            rows=list(rows),
            owners=list(owners),
            num_left=len(rows),
            scores=[float("-inf")] * len(asked.documents),
        )

    def compute(self, texts: Texts) -> list[float]:
        """Return the scores of some rows of rerank jobs, computed together."""
        rows = [job.rows[index] for job, index in texts if isinstance(job, RerankJob)]
        with torch.inference_mode():
            scores: list[float] = self._scorer.score(rows).cpu().tolist()
        return scores


def load_rerank_model(spec: ReplicaSpec, *, on_progress: OnProgress) -> RerankModel:
    """Load tokenizer and weights.

    Raises:
        LoadFailed: the files are not there or do not load.
        InvalidRequest: an option asks for what this model or machine cannot do.
    """
    name = str(spec.replica.model)
    options = spec.engine_options
    with loading(spec, name, on_progress) as path:
        set_threads(options)
        placement = place(path, spec, name)
        template = spec.source.rerank_template
        scorer: Scorer
        if template is None:
            model = CrossEncoder(
                str(path),
                device=str(placement.device),
                local_files_only=True,
                trust_remote_code=options.trust_remote_code,
                model_kwargs={"dtype": placement.dtype},
            )
            body: nn.Module = model.eval().requires_grad_(False)
            scorer = CrossEncoderScorer(model, placement, model_name=name)
        else:
            trust = {"trust_remote_code": options.trust_remote_code, "local_files_only": True}
            # Why Any: with `output_loading_info` it returns a pair, which its annotation denies.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=placement.dtype, output_loading_info=True, **trust
            )
            language, found = loaded
            check_complete(found, name)
            language.eval().requires_grad_(False).to(placement.device)
            tokenizer = AutoTokenizer.from_pretrained(path, **trust)
            scorer = LanguageScorer(language, tokenizer, template, placement, model_name=name)
            # Why without the head: it is used once a row, and is often the embedding's own matrix.
            body = language.base_model
        two_tokens = Row(np.arange(2, dtype=np.int32), np.zeros(2, dtype=np.int32))
        pack(body, placement, lambda: scorer.score([two_tokens]))
        return RerankModel(scorer, spec, placement)
