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

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .native.sampling import native_chunk_sums

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

_CHUNK = 512
_SMALL_CHUNK = 64
# Why a ladder: how many candidates a row looks at depends on the row alone, never on its batch.
_CANDIDATES = (128, 1024)
_HIGHEST_KEY = 2**31 - 1


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
    chunk = _highest_of_chunks(logits).argmax(-1, keepdim=True) * _CHUNK
    # The last chunk may be short: its last token then stands in for those that are not there.
    inside = (chunk + torch.arange(_CHUNK, device=logits.device)).clamp_(max=vocab_size - 1)
    tokens: Tensor = chunk + logits.gather(1, inside).argmax(-1, keepdim=True)
    return tokens.squeeze(1)


def highest_logits(logits: Tensor) -> Tensor:
    """Return (R,) the highest logit of each row of (R, V); NaN if one is.

    Why by chunks: as in `highest_tokens`; it takes less than half of the time.
    """
    maxima: Tensor = _highest_of_chunks(logits).amax(-1)
    return maxima


def _highest_of_chunks(logits: Tensor) -> Tensor:
    """Return (R, chunks); the last chunk may be short."""
    vocab_size = logits.shape[1]
    num_whole = vocab_size // _CHUNK
    maxima: Tensor = logits[:, : num_whole * _CHUNK].unflatten(1, (num_whole, _CHUNK)).amax(-1)
    if num_whole * _CHUNK < vocab_size:
        rest = logits[:, num_whole * _CHUNK :].amax(-1, keepdim=True)
        maxima = torch.cat((maxima, rest), dim=1)
    return maxima


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
    """Return the (drawing rows,) token ids of rows with a temperature.

    Args:
        logits: (drawing rows, V), model dtype; not changed.
        rows: the parameters of all rows.
        drawing: which of them draw.
    """
    vocab_size = logits.shape[1]
    top_k = rows.top_k[drawing]
    top_k = np.where((top_k == 0) | (top_k > vocab_size), vocab_size, top_k)
    cuts = _Cuts.of(rows, drawing, top_k, logits.device)
    tokens = torch.empty(len(drawing), dtype=torch.int64, device=logits.device)
    has_top_k = top_k < vocab_size
    pending = np.flatnonzero(has_top_k | (rows.top_p[drawing] < 1))
    if not has_top_k[pending].all():
        cuts = cuts.with_mass(logits, pending[~has_top_k[pending]])
    for num_candidates in _CANDIDATES:
        able = pending[(top_k[pending] < num_candidates) | ~has_top_k[pending]]
        if num_candidates >= vocab_size or not able.size:
            continue
        picked, is_done = _draw_among_best(_take(logits, able), num_candidates, cuts.at(able))
        index = torch.from_numpy(able).to(logits.device)
        tokens[index[is_done]] = picked[is_done]
        pending = np.setdiff1d(pending, able[is_done.cpu().numpy()])
    is_cut = np.zeros(len(drawing), bool)
    is_cut[pending] = True
    is_whole = is_cut | (~has_top_k & (rows.top_p[drawing] >= 1))
    if rows.min_p is not None:
        is_cut |= rows.min_p[drawing] > 0
    if rows.typical_p is not None:
        is_cut |= rows.typical_p[drawing] < 1
    uncut, cut = np.flatnonzero(is_whole & ~is_cut), np.flatnonzero(is_whole & is_cut)
    if uncut.size:
        index = torch.from_numpy(uncut).to(logits.device)
        tokens[index] = _draw_uncut(_take(logits, uncut), cuts.at(uncut))
    if cut.size:
        own = cuts.at(cut)
        weights = _weights(_take(logits, cut), own.temperature)
        if pending.size:
            index = torch.from_numpy(np.searchsorted(cut, pending)).to(logits.device)
            weights[index] = _cut_whole(weights[index], cuts.at(pending))
        tokens[torch.from_numpy(cut).to(logits.device)] = _invert(
            _cut_shares(weights, own), own.draws
        )
    return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cuts:
    """What some rows draw, and how they cut their distributions. All (rows,), on the device."""

    temperature: Tensor
    """float32"""
    draws: Tensor
    """float64 in [0, 1)"""
    top_k: Tensor
    """V where nothing is cut."""
    top_p: Tensor
    """float64"""
    mass: Tensor
    """float64, what top-p is a share of where there is no top-k; NaN where nobody has asked."""
    min_p: Tensor | None
    """float64; None: no row is cut."""
    typical_p: Tensor | None
    """float64; None: no row is cut."""

    @classmethod
    def of(
        cls,
        rows: SamplingRows,
        drawing: npt.NDArray[np.int64],
        top_k: npt.NDArray[np.int64],
        device: torch.device,
    ) -> "_Cuts":
        """Bring the parameters of the rows that draw to the device."""

        def moved(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values).to(device)

        min_p, typical_p = rows.min_p, rows.typical_p
        return cls(
            temperature=moved(rows.temperature[drawing]),
            draws=moved(uniform(rows.seed[drawing], rows.position[drawing])),
            top_k=moved(top_k),
            top_p=moved(rows.top_p[drawing].astype(np.float64)),
            mass=moved(np.full(len(drawing), np.nan)),
            min_p=moved(min_p[drawing].astype(np.float64))
            if min_p is not None and (min_p[drawing] > 0).any()
            else None,
            typical_p=moved(typical_p[drawing].astype(np.float64))
            if typical_p is not None and (typical_p[drawing] < 1).any()
            else None,
        )

    def at(self, rows: npt.NDArray[np.int64]) -> "_Cuts":
        """Return those of some of the rows, which are in order."""
        if len(rows) == len(self.draws):
            return self
        index = torch.from_numpy(rows).to(self.draws.device)
        return _Cuts(
            temperature=self.temperature[index],
            draws=self.draws[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            mass=self.mass[index],
            min_p=None if self.min_p is None else self.min_p[index],
            typical_p=None if self.typical_p is None else self.typical_p[index],
        )

    def with_mass(self, logits: Tensor, rows: npt.NDArray[np.int64]) -> "_Cuts":
        """Return the same with the mass of these rows, whose logits are among (all rows, V)."""
        own = self.at(rows)
        mass = self.mass.clone()
        sums = weight_sums(_take(logits, rows), own.temperature)
        mass[torch.from_numpy(rows).to(mass.device)] = sums.sum(1)
        return replace(self, mass=mass)


def _draw_among_best(logits: Tensor, num_candidates: int, cuts: _Cuts) -> tuple[Tensor, Tensor]:
    """Draw from rows cut by top-k, then by top-p of what top-k has left, then by the others.

    Args:
        logits: (rows, V)
        num_candidates: how many of the highest to look at; fewer than V.
        cuts: of the same rows.

    Returns:
        (rows,) token ids, and (rows,) whether the candidates were enough to know.
    """
    best, ids = highest(logits, num_candidates)
    scores = best.float()
    weights = ((scores - scores[:, :1]) / cuts.temperature.unsqueeze(1)).double().exp()
    has_top_k = (cuts.top_k < logits.shape[1]).unsqueeze(1)
    last_in_top_k = weights.gather(1, (cuts.top_k.clamp(max=num_candidates) - 1).unsqueeze(1))
    in_top_k = ~has_top_k | (weights >= last_in_top_k)
    kept_mass = torch.where(in_top_k, weights, 0.0).sum(1, keepdim=True)
    mass = torch.where(has_top_k, kept_mass, cuts.mass.unsqueeze(1))
    before = weights.cumsum(1) - weights
    in_top_p = in_top_k & (before < cuts.top_p.unsqueeze(1) * mass)
    # Why a threshold: tokens that tie with the last one kept are kept as well.
    lowest = torch.where(in_top_p, weights, torch.inf).amin(1, keepdim=True)
    is_kept = weights >= lowest
    order = ids.argsort(dim=1)  # by token id, over the candidates only
    kept = _cut_shares(torch.where(is_kept, weights, 0.0), cuts).gather(1, order)
    cumulated = kept.cumsum(1)
    place = _search(cumulated, cuts.draws.unsqueeze(1) * cumulated[:, -1:])
    # The candidates are enough if at least one of them falls below the threshold.
    return ids.gather(1, order).gather(1, place).squeeze(1), ~is_kept[:, -1]


def _draw_uncut(logits: Tensor, cuts: _Cuts) -> Tensor:
    """Return the (rows,) tokens that rows of (rows, V) draw where nothing is cut."""
    top = highest_logits(logits)
    chunk, share = _choose_chunk(weight_sums(logits, cuts.temperature, top), cuts.draws)
    ids, is_inside = _tokens_of(chunk, logits.shape[1])
    weights = _weights(logits.gather(1, ids), cuts.temperature, top)
    return _choose_in_chunk(weights, ids, is_inside, share)


def weight_sums(logits: Tensor, temperature: Tensor, top: Tensor | None = None) -> Tensor:
    """Return the sums of the weights of chunks of tokens, (rows, chunks) float64.

    Args:
        logits: (rows, V).
        temperature: (rows,).
        top: (rows,) the highest logits, where they are known.
    """
    top = highest_logits(logits) if top is None else top
    sums = native_chunk_sums(logits, top, temperature, chunk=_CHUNK)
    return _chunk_sums(_weights(logits, temperature, top)) if sums is None else sums


def _weights(logits: Tensor, temperature: Tensor, top: Tensor | None = None) -> Tensor:
    """Return (rows, V) float32, that of the highest logit of each row 1."""
    top = logits.amax(1) if top is None else top
    # The subtraction itself makes floats; made before it, they would be another tensor.
    weights = torch.sub(logits, top.float().unsqueeze(1))
    return weights.div_(temperature.unsqueeze(1)).exp_()


def _cut_whole(weights: Tensor, cuts: _Cuts) -> Tensor:
    """Return (rows, V) weights without what top-k, then top-p of what is left cut."""
    if (cuts.top_k < weights.shape[1]).any():
        keys = weights.view(torch.int32)
        least = _threshold(keys, torch.ones_like(weights), cuts.top_k.double())
        weights = torch.where(keys >= least, weights, 0.0)
    keys = weights.view(torch.int32)
    least = _threshold(keys, weights, cuts.top_p * _chunk_sums(weights).sum(1))
    return torch.where(keys >= least, weights, 0.0)


def _cut_shares(weights: Tensor, cuts: _Cuts) -> Tensor:
    """Return (rows, N) weights, the highest of each row 1, without what min-p and typical-p cut."""
    if cuts.min_p is not None:
        weights = torch.where(weights < cuts.min_p.unsqueeze(1), 0.0, weights)
    if cuts.typical_p is not None:
        index = torch.nonzero(cuts.typical_p < 1).squeeze(1)
        typical = _cut_typical(weights[index], cuts.typical_p[index])
        weights = weights.index_copy(0, index, typical)
    return weights


def _cut_typical(weights: Tensor, typical_p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the expected one (Meister et al. 2022).

    As transformers has it: ordered by that distance, tokens are kept until their mass reaches
    `typical_p`, and so are those that tie with the last.
    """
    shares = weights.double() / _chunk_sums(weights).sum(1, keepdim=True)
    surprise = -shares.log()
    expected = torch.where(shares > 0, shares * surprise, 0.0).sum(1, keepdim=True)
    distance = torch.where(shares > 0, (surprise - expected).abs(), torch.inf)
    keys = _HIGHEST_KEY - distance.float().view(torch.int32)
    least = _threshold(keys, shares, typical_p)
    return torch.where(keys >= least, weights, 0.0)


def _threshold(keys: Tensor, measures: Tensor, wanted: Tensor) -> Tensor:
    """Return the highest key such that the tokens with none below it measure what is wanted.

    Floats that are not negative order as their bits do, so these are found one after another, from
    the highest, without a sort.

    Args:
        keys: (rows, N) int32, not negative.
        measures: (rows, N) what each token counts.
        wanted: (rows,) float64.

    Returns:
        (rows, 1); 0 if all together measure less.
    """
    found = torch.zeros_like(keys[:, :1])
    for bit in reversed(range(_HIGHEST_KEY.bit_length())):
        higher = found | (1 << bit)
        measured = _chunk_sums(torch.where(keys >= higher, measures, 0.0)).sum(1)
        found = torch.where((measured >= wanted).unsqueeze(1), higher, found)
    return found


def _chunk_sums(values: Tensor) -> Tensor:
    """Return the sums of chunks of (rows, N), in float64.

    Why not one sum: a row's must be the same in any batch, and a single long one is split among
    threads. Those of chunks are short, so that float32 does.
    """
    num_whole = values.shape[1] // _CHUNK * _CHUNK
    sums: Tensor = values[:, :num_whole].unflatten(1, (-1, _CHUNK)).sum(-1)
    if num_whole < values.shape[1]:
        sums = torch.cat((sums, values[:, num_whole:].sum(-1, keepdim=True)), dim=1)
    return sums.double()


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """Return the (rows,) tokens at which the cumulated (rows, V) weights exceed the draws' shares.

    Why by chunks: few have to be cumulated, and all in float64.
    """
    chunk, share = _choose_chunk(_chunk_sums(weights), draws)
    ids, is_inside = _tokens_of(chunk, weights.shape[1])
    return _choose_in_chunk(weights.gather(1, ids), ids, is_inside, share)


def _choose_chunk(sums: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return which chunk each row draws from, (rows, 1), and how much weight of it comes before."""
    cumulated = sums.cumsum(1)
    target = draws.unsqueeze(1) * cumulated[:, -1:]
    chunk = _search(cumulated, target)
    return chunk, target - (cumulated.gather(1, chunk) - sums.gather(1, chunk))


def _tokens_of(chunk: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of each row's chunk, and which of them there are; (rows, _CHUNK) both."""
    ids = chunk * _CHUNK + torch.arange(_CHUNK, device=chunk.device)
    return ids.clamp(max=vocab_size - 1), ids < vocab_size


def _choose_in_chunk(weights: Tensor, ids: Tensor, is_inside: Tensor, share: Tensor) -> Tensor:
    """Return (rows,), of the tokens of a chunk those at which their weights exceed the share."""
    cumulated = weights.double().masked_fill_(~is_inside, 0.0).cumsum(1)
    return ids.gather(1, _search(cumulated, share)).squeeze(1)


def _search(cumulated: Tensor, target: Tensor) -> Tensor:
    """Return (rows, 1): the first index whose cumulated weight exceeds the target."""
    total = cumulated[:, -1:]
    # Hazard: rounding to the total or below 0 would point at a token that has no weight.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total))).clamp_(min=0.0)
    return torch.searchsorted(cumulated, target, right=True).clamp_(max=cumulated.shape[1] - 1)
