# SPDX-License-Identifier: Apache-2.0
"""The computing part of a step: rows of a schedule in, a token for each that samples out.

Builds the batch, runs the model, shapes the logits as each request wants them, draws, and appends
to the slots. It ends nothing, tells nobody and moves no block, so that rows may be run again.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xinference.identifiers import RequestId

from .grammar import StepMasks
from .live_request import LiveRequest
from .logit_adjustment import adjust
from .logprobs import (
    PromptRows,
    RowLogprobs,
    TokenLogprobs,
    logprobs_of_rows,
    row_logprobs,
    with_prompt_rows,
)
from .model_runner import Runner
from .sampler import SamplingRows, highest_logits, sample
from .scheduler import ScheduledRow, Sequence
from .slots import SlotTable


class Drawn(NamedTuple):
    """A sequence and its new token."""

    sequence: Sequence
    token_id: int | None
    """None if the model computed no numbers to draw it from."""
    logprobs: TokenLogprobs | None = None
    """None if nobody wants them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What some rows of a step brought."""

    drawn: list[Drawn]
    prompts: list[tuple[LiveRequest, RowLogprobs]]
    """What became known of the tokens of prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """What the rows of one step are computed with."""

    runner: Runner
    slots: SlotTable
    live: Mapping[RequestId, LiveRequest]
    masks: StepMasks | None
    """What grammars leave of the vocabulary; None if no row has one."""
    max_model_len: int

    def run(self, rows: Items[ScheduledRow]) -> Computed:
        """Compute these rows and draw a token for each that samples. May be repeated."""
        batch = self.slots.build(rows)
        sequences = [row.sequence for row in rows if row.samples]
        prompt_rows = self._prompt_rows(rows)
        if not prompt_rows:
            logits = self.runner.forward(batch)
            return Computed(drawn=self._sample(logits, sequences), prompts=[])
        sample_tokens = with_prompt_rows(batch, prompt_rows)
        logits = self.runner.forward(replace(batch, sample_tokens=sample_tokens))
        prompts = self._prompt_logprobs(rows, prompt_rows, logits[len(sequences) :])
        drawn = self._sample(logits[: len(sequences)], sequences)
        return Computed(drawn=drawn, prompts=prompts)

    def _sample(self, logits: Tensor, sequences: list[Sequence]) -> list[Drawn]:
        """Draw the next token of each sequence, in order, and append it to its slot."""
        if not sequences:
            return []
        # Why the maximum: it is NaN or infinite if one of them is; -inf, some models have anyway.
        is_sound = torch.isfinite(highest_logits(logits)).cpu().numpy()
        unsound: list[Drawn] = []
        if not is_sound.all():
            sound = np.flatnonzero(is_sound)
            unsound = [Drawn(sequences[index], None) for index in np.flatnonzero(~is_sound)]
            sequences = [sequences[index] for index in sound]
            logits = logits[torch.from_numpy(sound).to(logits.device)]
            if not sequences:
                return unsound
        slots = np.array([sequence.slot for sequence in sequences])
        positions = np.array([sequence.num_tokens for sequence in sequences])
        table = self.slots
        num_logprobs = table.num_logprobs[slots]
        has_logprobs = bool((num_logprobs >= 0).any())
        own_logits = logits
        if self.masks is not None:
            if has_logprobs:
                logits = logits.clone()  # masks are applied in place; logprobs are the model's own
            self.masks.apply(logits, [sequence.request_id for sequence in sequences])
        adjusted = np.flatnonzero(table.adjusts[slots])
        if adjusted.size:
            logits = self._adjusted(logits, sequences, adjusted)
        token_ids = sample(
            logits,
            SamplingRows(
                temperature=table.temperature[slots],
                top_p=table.top_p[slots],
                top_k=table.top_k[slots],
                seed=table.seed[slots],
                position=positions,
                min_p=table.min_p[slots],
                typical_p=table.typical_p[slots],
            ),
        )
        # Why not the last token of a context: nothing will ever read it, and it has no place.
        inside = positions < self.max_model_len
        table.append(slots[inside], positions[inside], token_ids[inside])
        logprobs = logprobs_of_rows(own_logits, token_ids, num_logprobs) if has_logprobs else {}
        drawn = [
            Drawn(sequence, token_id, logprobs.get(row))
            for row, (sequence, token_id) in enumerate(
                zip(sequences, token_ids.tolist(), strict=True)
            )
        ]
        return drawn + unsound

    def _adjusted(
        self, logits: Tensor, sequences: list[Sequence], rows: npt.NDArray[np.int64]
    ) -> Tensor:
        """Return the logits as the requests of these rows want them changed."""
        adjustments = []
        for row in rows.tolist():
            adjustment = self.live[sequences[row].request_id].adjustment
            assert adjustment is not None, sequences[row]
            adjustments.append((row, adjustment))
        adjusted = adjust(logits, adjustments)
        if self.masks is not None:
            # Why: what min_tokens and bad_words forbid may be all that a grammar leaves.
            is_stuck = adjusted.amax(1, keepdim=True) == -torch.inf
            adjusted = torch.where(is_stuck, logits.float(), adjusted)
        return adjusted

    def _prompt_rows(self, rows: Items[ScheduledRow]) -> list[PromptRows]:
        """Return which tokens of these rows tell how likely the prompt's next ones are."""
        found = []
        for row, scheduled in enumerate(rows):
            sequence = scheduled.sequence
            if sequence.wants_prompt_logits:
                prompt = self.live[sequence.request_id].prompt
                assert prompt is not None, sequence
                start = max(sequence.num_computed, prompt.num_told)
                stop = min(sequence.num_computed + scheduled.num_new, prompt.num_to_tell)
                if start < stop:
                    first = start - sequence.num_computed
                    found.append(PromptRows(row=row, first=first, count=stop - start))
        return found

    def _prompt_logprobs(
        self, rows: Items[ScheduledRow], prompt_rows: list[PromptRows], logits: Tensor
    ) -> list[tuple[LiveRequest, RowLogprobs]]:
        """Return what the logits, row after row, say of the prompts."""
        found = []
        for prompt_row in prompt_rows:
            live = self.live[rows[prompt_row.row].sequence.request_id]
            assert live.prompt is not None, prompt_row
            own, logits = logits[: prompt_row.count], logits[prompt_row.count :]
            next_ids = live.prompt.next_ids(prompt_row.count)
            found.append((live, row_logprobs(own, next_ids, live.sampling.logprobs or 0)))
        return found
