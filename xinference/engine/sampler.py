# SPDX-License-Identifier: Apache-2.0
"""Logits to token ids: greedy and sampled rows side by side, each by its own parameters.

A row's token is a pure function of its logits, its parameters and one number drawn for it,
`uniform(seed, position)`. So a seed gives the same draws alone, in any batch, after preemption
and after a restart; greedy rows draw nothing. The vocabulary is never sorted: top-k and top-p
only determine a *threshold*, everything at or above it may be drawn (ties included, so that
their order cannot matter), and the draw inverts the cumulative distribution in vocabulary order.

The order is transformers': temperature, top-k, top-p of what is left, min-p, typical-p of what is
left. What comes before the temperature is `logit_adjustment.py`'s.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), keyed by the seed and counting by position.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

_CHUNK = 512
_SMALL_CHUNK = 64
# Why a ladder: how many candidates a row looks at depends on the row alone, never on its batch.
_CANDIDATES = (128, 1024, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """Parameters of the rows that sample, all of length R."""

    temperature: npt.NDArray[np.float32]
    """0 is greedy."""
    top_p: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    """0 keeps every token."""
    seed: npt.NDArray[np.uint64]
    position: npt.NDArray[np.int64]
    """Of the token to be drawn, in its own sequence."""
    min_p: npt.NDArray[np.float32] | None = None
    """0 keeps every token. None: all 0."""
    typical_p: npt.NDArray[np.float32] | None = None
    """1 keeps every token. None: all 1."""


def uniform(
    seed: npt.NDArray[np.uint64], position: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return one number in [0, 1) for each (seed, position); 53 random bits each."""
    counter = position.astype(np.uint64)
    words = [counter & _LOW, counter >> _HALF, np.zeros_like(counter), np.zeros_like(counter)]
    key = [seed & _LOW, seed >> _HALF]
    for _ in range(_ROUNDS):
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            (second >> _HALF) ^ words[1] ^ key[0],
            second & _LOW,
            (first >> _HALF) ^ words[3] ^ key[1],
            first & _LOW,
        ]
        key = [(key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW]
    bits = (words[0] << _HALF | words[1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def sample(logits: Tensor, rows: SamplingRows) -> npt.NDArray[np.int64]:
    """Choose one token per row.

    Args:
        logits: (R, V), model dtype, on the model's device; not changed.
        rows: the parameters of each row.

    Returns:
        (R,) token ids. This is where the host waits for the device.
    """
    drawing = np.flatnonzero(rows.temperature > 0)
    tokens = np.empty(len(rows.temperature), np.int64)
    if drawing.size < len(tokens):
        greedy = np.flatnonzero(rows.temperature == 0)
        tokens[greedy] = highest_tokens(_take(logits, greedy)).cpu().numpy()
    if drawing.size:
        picked = _draw(_take(logits, drawing), rows, drawing)
        tokens[drawing] = picked.cpu().numpy()
    return tokens


def highest_tokens(logits: Tensor) -> Tensor:
    """Return (R,) the first token of the highest logit of each row of (R, V).

    Why not `argmax`: on CPU it is not vectorized. The maxima of chunks are, and leave one chunk to
    search; for 16 rows of 152k bfloat16 that is a tenth of the time.
    """
    vocab_size = logits.shape[1]
    num_whole = vocab_size // _CHUNK
    highest = logits[:, : num_whole * _CHUNK].unflatten(1, (num_whole, _CHUNK)).amax(-1)
    if num_whole * _CHUNK < vocab_size:
        rest = logits[:, num_whole * _CHUNK :].amax(-1, keepdim=True)
        highest = torch.cat((highest, rest), dim=1)
    chunk = highest.argmax(-1, keepdim=True) * _CHUNK
    # The last chunk may be short: its last token then stands in for those that are not there.
    inside = (chunk + torch.arange(_CHUNK, device=logits.device)).clamp_(max=vocab_size - 1)
    tokens: Tensor = chunk + logits.gather(1, inside).argmax(-1, keepdim=True)
    return tokens.squeeze(1)


def highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest scores of each row of (R, V), best first, and their tokens.

    Why not `topk` alone: on CPU its time grows with everything it looks at. The best chunks, by
    their maxima, hold all of the best tokens, and are few.
    """
    vocab_size = scores.shape[1]
    num_whole = vocab_size // _SMALL_CHUNK
    if num_whole <= 4 * count:
        return scores.topk(count, dim=1)
    rest = torch.arange(num_whole * _SMALL_CHUNK, vocab_size, device=scores.device)
    maxima = scores[:, : num_whole * _SMALL_CHUNK].unflatten(1, (num_whole, _SMALL_CHUNK)).amax(-1)
    chunks = maxima.topk(count, dim=1).indices.unsqueeze(2) * _SMALL_CHUNK
    ids = (chunks + torch.arange(_SMALL_CHUNK, device=scores.device)).flatten(1)
    ids = torch.cat((ids, rest.expand(len(scores), -1)), dim=1)
    best, places = scores.gather(1, ids).topk(count, dim=1)
    return best, ids.gather(1, places)


def _take(logits: Tensor, rows: npt.NDArray[np.int64]) -> Tensor:
    if len(rows) == len(logits):
        return logits
    return logits[torch.from_numpy(rows).to(logits.device)]


def _draw(logits: Tensor, rows: SamplingRows, drawing: npt.NDArray[np.int64]) -> Tensor:
    """Return the (drawing rows,) token ids of rows with a temperature."""
    device, vocab_size = logits.device, logits.shape[1]
    temperature = torch.from_numpy(rows.temperature[drawing]).to(device)
    draws = torch.from_numpy(uniform(rows.seed[drawing], rows.position[drawing])).to(device)
    top_k, top_p = rows.top_k[drawing], rows.top_p[drawing]
    top_k = np.where((top_k == 0) | (top_k > vocab_size), vocab_size, top_k)
    scores = logits.float() / temperature.unsqueeze(1)
    shares = _shares(rows, drawing, device)
    is_cut = (top_k < vocab_size) | (top_p < 1)
    tokens = torch.empty(len(drawing), dtype=torch.int64, device=device)
    open_rows = np.flatnonzero(~is_cut)
    if open_rows.size:
        index = torch.from_numpy(open_rows).to(device)
        tokens[index] = _invert(_take(scores, open_rows), draws[index], shares.of(index))
    pending = np.flatnonzero(is_cut)
    for num_candidates in (*_CANDIDATES, vocab_size):
        if not pending.size:
            break
        num_candidates = min(num_candidates, vocab_size)
        able = pending[(top_k[pending] < num_candidates) | (top_k[pending] == vocab_size)]
        if num_candidates == vocab_size:
            able = pending
        if not able.size:
            continue
        index = torch.from_numpy(able).to(device)
        picked, is_done = _draw_cut(
            scores[index],
            draws[index],
            torch.from_numpy(top_k[able]).to(device),
            torch.from_numpy(top_p[able].astype(np.float64)).to(device),
            num_candidates,
            shares.of(index),
        )
        tokens[index[is_done]] = picked[is_done]
        pending = np.setdiff1d(pending, able[is_done.cpu().numpy()])
    return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shares:
    """The last two cuts of some rows, (rows,) float64 each; None where no row is cut."""

    min_p: Tensor | None
    typical_p: Tensor | None

    def of(self, index: Tensor) -> "_Shares":
        return _Shares(
            min_p=None if self.min_p is None else self.min_p[index],
            typical_p=None if self.typical_p is None else self.typical_p[index],
        )


def _shares(rows: SamplingRows, drawing: npt.NDArray[np.int64], device: torch.device) -> _Shares:
    min_p, typical_p = rows.min_p, rows.typical_p
    has_min_p = min_p is not None and bool((min_p[drawing] > 0).any())
    has_typical_p = typical_p is not None and bool((typical_p[drawing] < 1).any())
    return _Shares(
        min_p=torch.from_numpy(min_p[drawing].astype(np.float64)).to(device)
        if min_p is not None and has_min_p
        else None,
        typical_p=torch.from_numpy(typical_p[drawing].astype(np.float64)).to(device)
        if typical_p is not None and has_typical_p
        else None,
    )


def _draw_cut(
    scores: Tensor,
    draws: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    num_candidates: int,
    shares: _Shares,
) -> tuple[Tensor, Tensor]:
    """Draw from rows cut by top-k, then by top-p of what top-k has left, then by `shares`.

    Args:
        scores: (rows, V) float32, divided by the temperature.
        draws: (rows,) float64 in [0, 1).
        top_k: (rows,) V where nothing is cut.
        top_p: (rows,) float64.
        num_candidates: how many of the highest scores to look at.
        shares: of the same rows.

    Returns:
        (rows,) token ids, and (rows,) whether the candidates were enough to know.
    """
    vocab_size = scores.shape[1]
    best, ids = highest(scores, num_candidates)
    last_kept = best.gather(1, (top_k.clamp(max=num_candidates) - 1).unsqueeze(1))
    threshold = torch.where((top_k < vocab_size).unsqueeze(1), last_kept, -torch.inf)
    weights = (best - best[:, :1]).double().exp()
    in_top_k = best >= threshold
    # What top-p is a share of: exact among the candidates if they hold all of top-k, else over V.
    kept_mass = torch.where(in_top_k, weights, 0.0).sum(1)
    whole_mass = (scores - best[:, :1]).exp().sum(1, dtype=torch.float64)
    mass = torch.where(top_k < vocab_size, kept_mass, whole_mass)
    before = weights.cumsum(1) - weights
    in_top_p = in_top_k & (before < (top_p * mass).unsqueeze(1))
    # Why a threshold again: tokens that tie with the last one kept are kept as well.
    lowest = torch.where(in_top_p, best, torch.inf).amin(1, keepdim=True)
    is_kept = best >= lowest
    # The candidates are enough if at least one of them falls below the threshold.
    is_done = ~is_kept[:, -1] | (num_candidates == vocab_size)
    order = ids.argsort(dim=1)  # by token id, over the candidates only
    weights = _cut_shares(torch.where(is_kept, weights, 0.0), shares)
    cumulated = weights.gather(1, order).cumsum(1)
    return ids.gather(1, order).gather(1, _search(cumulated, draws)).squeeze(1), is_done


def _invert(scores: Tensor, draws: Tensor, shares: _Shares) -> Tensor:
    """Draw from whole rows (rows, V) of float32 scores."""
    weights = (scores - scores.amax(1, keepdim=True)).exp_()
    return _search(_cut_shares(weights, shares).cumsum(1), draws).squeeze(1)


def _cut_shares(weights: Tensor, shares: _Shares) -> Tensor:
    """Return (rows, N) weights, the highest of each row 1, without what min-p and typical-p cut."""
    if shares.min_p is not None:
        weights = torch.where(weights < shares.min_p.unsqueeze(1), 0.0, weights)
    if shares.typical_p is not None:
        index = torch.nonzero(shares.typical_p < 1).squeeze(1)
        typical = _cut_typical(weights[index], shares.typical_p[index])
        weights = weights.index_copy(0, index, typical.to(weights.dtype))
    return weights


def _cut_typical(weights: Tensor, typical_p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the expected one (Meister et al. 2022).

    As transformers has it: ordered by that distance, tokens are kept until their mass reaches
    `typical_p`, and so are those that tie with the last.
    """
    shares = weights.double() / weights.sum(1, keepdim=True, dtype=torch.float64)
    surprise = -shares.log()
    expected = torch.where(shares > 0, shares * surprise, 0.0).sum(1, keepdim=True)
    distance = torch.where(shares > 0, (surprise - expected).abs(), torch.inf)
    farthest = torch.full_like(typical_p, torch.inf)
    pending = torch.arange(len(weights), device=weights.device)
    for num_candidates in (*_CANDIDATES, weights.shape[1]):
        count = min(num_candidates, weights.shape[1])
        if not len(pending):
            break
        nearest, places = highest(-distance[pending], count)
        mass = shares[pending].gather(1, places).cumsum(1)
        last = (mass < typical_p[pending].unsqueeze(1)).sum(1, keepdim=True)
        is_done = (last < count).squeeze(1)
        found = -nearest.gather(1, last.clamp(max=count - 1)).squeeze(1)
        farthest[pending[is_done]] = found[is_done]
        pending = pending[~is_done]
    return torch.where(distance <= farthest.unsqueeze(1), weights, 0.0)


def _search(cumulated: Tensor, draws: Tensor) -> Tensor:
    """Return (rows, 1): the first index whose cumulated weight exceeds the draw's share."""
    total = cumulated[:, -1:]
    target = (draws.unsqueeze(1) * total).to(cumulated.dtype)
    # Hazard: rounding up to the total would point behind the last token that has any weight.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True).clamp_(max=cumulated.shape[1] - 1)
