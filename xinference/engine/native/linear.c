/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows of bfloat16 times a matrix that stays, on x86 CPUs that multiply bfloat16 in vectors.
 *
 * The matrix is packed: (panels, pairs, PANEL, 2). A panel is 16 outputs; a pair is two inputs that
 * lie next to each other, which one instruction multiplies and adds for a whole panel. Rows are
 * taken in groups of at most 16, as many as registers hold the sums of: a vector of the matrix that
 * is read once is used for all of them. The rows of a group are transposed once, so that what they
 * are multiplied by at the same time lies together.
 *
 * A number is summed over the inputs in their order, however many rows there are: the result of a
 * row is the same in any batch, and a NaN stays with its row.
 */

#include <immintrin.h>

#define BFLOAT16 1
#include "number.h"

/* Why not with AMX: PyTorch's own kernels compute in its tiles, at several times this speed. */
#if !defined __AVX512BF16__ || !defined __AVX512VL__ || defined __AMX_BF16__
#error this CPU is not one that linear.c is for
#endif

#define PANEL 16
/* Rows of a group, at most. */
#define GROUP 16
/* Panels of a task, at most: what they take together stays in the L2 cache between groups. */
#define STRIP 4
/* Tasks for each thread, at least, where there is work for them: some threads are slower. */
#define TASKS 4
/* Bytes. Why: the CPU's own prefetching ends where a page of 4 KiB does. */
#define AHEAD 4096
#define INLINE static inline __attribute__((always_inline))

/* Panels that are summed at once. Few rows have registers left, and more to wait for. */
#define PANELS_AT_ONCE(rows) ((rows) <= 6 ? 4 : (rows) <= 12 ? 2 : 1)

/* Multiply a group's rows with some panels. All but the pointers is known to the compiler.
 *
 *     hidden  (pairs, rows) of two numbers
 *     width   how many outputs there are from the first panel on
 */
INLINE void multiply(const int rows, const int panels, const uint32_t *hidden,
                     const number *weights, int64_t pairs, const number *bias, number *out,
                     int64_t out_row, int64_t width)
{
    __m512 sums[GROUP * 2];
#pragma GCC unroll 32
    for (int i = 0; i < rows * panels; i++)
        sums[i] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            const number *from = weights + (p * pairs + pair) * PANEL * 2;
            __m512bh weight = (__m512bh)_mm512_loadu_si512(from);
            _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                __m512bh both = (__m512bh)_mm512_set1_epi32((int)hidden[r]);
                sums[p * rows + r] = _mm512_dpbf16_ps(sums[p * rows + r], weight, both);
            }
        }
        hidden += rows;
    }
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) {
        int64_t left = width - p * PANEL;
        __mmask16 mask = left >= PANEL ? 0xffff : (__mmask16)((1u << left) - 1);
        __m512 added = _mm512_setzero_ps();
        if (bias) {
            __m256i narrow = _mm256_maskz_loadu_epi16(mask, bias + p * PANEL);
            added = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            __m256bh narrow = _mm512_cvtneps_pbh(_mm512_add_ps(sums[p * rows + r], added));
            _mm256_mask_storeu_epi16(out + r * out_row + p * PANEL, mask, (__m256i)narrow);
        }
    }
}

static void multiply_group(int rows, int64_t panels, const uint32_t *hidden, const number *weights,
                           int64_t pairs, const number *bias, number *out, int64_t out_row,
                           int64_t width)
{
    while (panels > 0) {
        int done;
        switch (rows) {
#define CASE(R)                                                                                  \
    case R:                                                                                      \
        done = panels >= PANELS_AT_ONCE(R) ? PANELS_AT_ONCE(R) : 1;                              \
        if (done > 1)                                                                            \
            multiply(R, PANELS_AT_ONCE(R), hidden, weights, pairs, bias, out, out_row, width);   \
        else                                                                                     \
            multiply(R, 1, hidden, weights, pairs, bias, out, out_row, width);                   \
        break;
            CASE(1)
            CASE(2)
            CASE(3)
            CASE(4)
            CASE(5)
            CASE(6)
            CASE(7)
            CASE(8)
            CASE(9)
            CASE(10)
            CASE(11)
            CASE(12)
            CASE(13)
            CASE(14)
            CASE(15)
            CASE(16)
        default:
            __builtin_unreachable();
        }
        panels -= done;
        weights += done * pairs * PANEL * 2;
        bias = bias ? bias + done * PANEL : 0;
        out += done * PANEL;
        width -= done * PANEL;
    }
}

static int64_t at_most(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* SiLU of the first half of each two panels, times the second; rounded as by three operations. */
static void gate(int64_t rows, int64_t panels, const number both[GROUP][STRIP * PANEL],
                 number *out, int64_t out_row, int64_t width)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < panels; p += 2) {
            const number *first = both[r] + p * PANEL, *second = first + PANEL;
            number gated[PANEL];
#pragma omp simd
            for (int n = 0; n < PANEL; n++) {
                float x = widened(first[n]), e = exponential(-fabsf(x));
                float active = widened(narrowed(x * (x < 0.0f ? e : 1.0f) / (1.0f + e)));
                gated[n] = narrowed(active * widened(second[n]));
            }
            int64_t done = p / 2 * PANEL;
            memcpy(out + r * out_row + done, gated,
                   (size_t)at_most(PANEL, width - done) * sizeof *gated);
        }
}

/* Transpose 16 × 16 pairs, whose rows begin `from_row` numbers apart, in four steps: each doubles
 * how many of a column lie together. */
static void transpose(const number *from, int64_t from_row, uint32_t *to)
{
    __m512i rows[16], pairs[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        rows[r] = _mm512_loadu_si512(from + r * from_row);
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        pairs[r] = _mm512_unpacklo_epi32(rows[r], rows[r + 1]);
        pairs[r + 1] = _mm512_unpackhi_epi32(rows[r], rows[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
        rows[r] = _mm512_unpacklo_epi64(pairs[r], pairs[r + 2]);
        rows[r + 1] = _mm512_unpackhi_epi64(pairs[r], pairs[r + 2]);
        rows[r + 2] = _mm512_unpacklo_epi64(pairs[r + 1], pairs[r + 3]);
        rows[r + 3] = _mm512_unpackhi_epi64(pairs[r + 1], pairs[r + 3]);
    }
    /* Now rows[4 i + c] holds, of rows 4 i to 4 i + 3, columns c, 4 + c, 8 + c and 12 + c. */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512i low = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
        __m512i high = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
        _mm512_storeu_si512(to + c * 16, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(to + (8 + c) * 16, _mm512_shuffle_i32x4(low, high, 0xdd));
        low = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd);
        high = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
        _mm512_storeu_si512(to + (4 + c) * 16, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(to + (12 + c) * 16, _mm512_shuffle_i32x4(low, high, 0xdd));
    }
}

/* Write some pairs of a group's rows to `to`, (pairs, rows). */
static void spread_group(const number *hidden, int64_t num_in, int64_t rows, int64_t num_pairs,
                         uint32_t *to)
{
    int64_t done = 0;
    if (rows == 16)
        for (; done + 16 <= num_pairs; done += 16)
            transpose(hidden + done * 2, num_in, to + done * 16);
    for (; done < num_pairs; done++)
        for (int64_t r = 0; r < rows; r++)
            memcpy(to + done * rows + r, hidden + r * num_in + done * 2, sizeof *to);
}

/* Write hidden × matrix + bias; or, gated, SiLU(hidden × one matrix) * (hidden × another).
 *
 *     hidden   (num_rows, num_in), num_in even
 *     packed   the matrix, as above; outputs that fill up the last panel are 0. Gated: a panel of
 *              each matrix by turns
 *     bias     (num_out), or NULL; gated: NULL
 *     spread   num_rows * num_in numbers of scratch
 *     out      (num_rows, num_out)
 */
void linear(const number *hidden, int64_t num_rows, int64_t num_in, const number *packed,
            int64_t num_out, const number *bias, int is_gated, uint32_t *spread, number *out,
            int num_threads)
{
    int64_t pairs = num_in / 2, panels = (num_out + PANEL - 1) / PANEL * (is_gated ? 2 : 1);
    int64_t groups = (num_rows + GROUP - 1) / GROUP, wanted = TASKS * num_threads;
    int64_t strip = panels >= wanted * STRIP ? STRIP : 2;
    int64_t strips = (panels + strip - 1) / strip;
    /* A task is all groups' for a strip, so that the matrix is read once; or fewer groups'. */
    int64_t block = at_most(groups, groups * strips / wanted + 1);
    int64_t blocks = (groups + block - 1) / block;
/* Groups are of as many rows as each other, give or take one. */
#define FIRST(group) ((group) * num_rows / groups)
#define PART 128
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for collapse(2)
        for (int64_t group = 0; group < groups; group++)
            for (int64_t begin = 0; begin < pairs; begin += PART) {
                int64_t first = FIRST(group), rows = FIRST(group + 1) - first;
                spread_group(hidden + first * num_in + begin * 2, num_in, rows,
                             at_most(PART, pairs - begin), spread + first * pairs + begin * rows);
            }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < strips * blocks; task++) {
            int64_t first_group = task / strips * block, panel = task % strips * strip;
            for (int64_t group = first_group; group < at_most(first_group + block, groups);
                 group++) {
                int64_t first = FIRST(group), rows = FIRST(group + 1) - first;
                int64_t count = at_most(strip, panels - panel);
                const number *weights = packed + panel * pairs * PANEL * 2;
                int64_t column = is_gated ? panel / 2 * PANEL : panel * PANEL;
                number *to = out + first * num_out + column;
                if (is_gated) {
                    number both[GROUP][STRIP * PANEL];
                    multiply_group((int)rows, count, spread + first * pairs, weights, pairs, 0,
                                   both[0], STRIP * PANEL, STRIP * PANEL);
                    gate(rows, count, both, to, num_out, num_out - column);
                } else
                    multiply_group((int)rows, count, spread + first * pairs, weights, pairs,
                                   bias ? bias + column : 0, to, num_out, num_out - column);
            }
        }
    }
}
