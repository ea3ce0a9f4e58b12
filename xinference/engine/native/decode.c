/* SPDX-License-Identifier: Apache-2.0
 *
 * Attention of single tokens over pages, on CPUs. `attention/native.py` compiles it for
 * one shape of a layer:
 *
 *     BFLOAT16        1: numbers are bfloat16; 0: float
 *     KEY_DIM, VALUE_DIM, NUM_KV_HEADS, BLOCK_SIZE
 *     GROUP           query heads that share a key head
 *     PART            tokens of a task; a multiple of 16
 *
 * A row's context is cut into parts at places that only its own length decides, so its result is
 * the same in any batch. Each part of each key head is a task of its own; then the parts of a row
 * are merged by what they weigh, as in FlashDecoding
 * (https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Everything between the numbers that
 * are read and the ones that are written is float. A NaN stays with its row.
 */

#include "number.h"

/* Tokens that are read at once. Why: what is summed over them stays in registers meanwhile. */
#define TILE 16
/* Query heads of a key head, filled up to whole vectors. Few of them are summed one by one. */
#if GROUP > 2
#define LANES ((GROUP + 7) / 8 * 8)
#else
#define LANES GROUP
#endif

/* Several numbers at once, in a register where the CPU has ones that long. */
#if VALUE_DIM % 16 == 0
#define VALUE_LANES 16
#elif VALUE_DIM % 4 == 0
#define VALUE_LANES 4
#else
#define VALUE_LANES 1
#endif
#define VECTOR(lanes) __attribute__((vector_size(lanes * sizeof(float)), aligned(4), may_alias))
typedef float values VECTOR(VALUE_LANES);

/* What one part says of the query heads of one key head. */
struct partial {
    float highest[LANES];
    float sum[LANES];
    float mixed[GROUP][VALUE_DIM];
};

/* Read the numbers of tokens [first, first + count) of a row; those behind them are 0. */
#define READ_TILE(wide, pages, width)                                                            \
    for (int t = 0; t < TILE; t++) {                                                             \
        if (t >= count) {                                                                        \
            memset(wide[t], 0, sizeof wide[t]);                                                  \
            continue;                                                                            \
        }                                                                                        \
        int64_t block = table[(first + t) / BLOCK_SIZE] * NUM_KV_HEADS + head;                   \
        const number *one = pages + (block * BLOCK_SIZE + (first + t) % BLOCK_SIZE) * width;     \
        _Pragma("omp simd") for (int d = 0; d < width; d++) wide[t][d] = widened(one[d]);        \
    }

#if GROUP > 2
typedef float heads VECTOR(8);

static void score_tile(const float query[KEY_DIM][LANES], const float key[TILE][KEY_DIM],
                       float scores[TILE][LANES])
{
    for (int g = 0; g < LANES; g += 8)
        for (int t = 0; t < TILE; t += 4) {
            heads one = {0}, two = {0}, three = {0}, four = {0};
#pragma GCC unroll 8
            for (int d = 0; d < KEY_DIM; d++) {
                heads of_query = *(const heads *)(query[d] + g);
                one += of_query * key[t][d];
                two += of_query * key[t + 1][d];
                three += of_query * key[t + 2][d];
                four += of_query * key[t + 3][d];
            }
            *(heads *)(scores[t] + g) = one;
            *(heads *)(scores[t + 1] + g) = two;
            *(heads *)(scores[t + 2] + g) = three;
            *(heads *)(scores[t + 3] + g) = four;
        }
}
#else
static void score_tile(const float query[KEY_DIM][LANES], const float key[TILE][KEY_DIM],
                       float scores[TILE][LANES])
{
    for (int t = 0; t < TILE; t++)
        for (int g = 0; g < GROUP; g++) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int d = 0; d < KEY_DIM; d++)
                sum += query[d][g] * key[t][d];
            scores[t][g] = sum;
        }
}
#endif

static void mix_tile(const float value[TILE][VALUE_DIM], const float weights[TILE][LANES],
                     float mixed[GROUP][VALUE_DIM])
{
    enum { COUNT = VALUE_DIM / VALUE_LANES };
    for (int g = 0; g < GROUP; g++) {
        values sums[COUNT];
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++)
            sums[i] = ((const values *)mixed[g])[i];
        for (int t = 0; t < TILE; t++) {
            float weight = weights[t][g];
#pragma GCC unroll 16
            for (int i = 0; i < COUNT; i++)
                sums[i] += ((const values *)value[t])[i] * weight;
        }
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++)
            ((values *)mixed[g])[i] = sums[i];
    }
}

static void attend_part(const float query[KEY_DIM][LANES], const number *keys,
                        const number *values, const int64_t *table, int64_t head, int64_t begin,
                        int64_t end, struct partial *said)
{
    float scores[PART][LANES], tile[TILE][KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM];
    int num_tokens = (int)(end - begin);

    for (int g = 0; g < LANES; g++) {
        said->highest[g] = -INFINITY;
        said->sum[g] = 0.0f;
    }
    memset(said->mixed, 0, sizeof said->mixed);

    for (int done = 0; done < num_tokens; done += TILE) {
        int64_t first = begin + done;
        int count = num_tokens - done < TILE ? num_tokens - done : TILE;
        float(*key)[KEY_DIM] = (void *)tile;
        READ_TILE(key, keys, KEY_DIM)
        score_tile(query, key, scores + done);
        for (int t = 0; t < count; t++)
#pragma omp simd
            for (int g = 0; g < LANES; g++)
                said->highest[g] = scores[done + t][g] > said->highest[g] ? scores[done + t][g]
                                                                         : said->highest[g];
    }
    for (int t = 0; t < num_tokens; t++)
#pragma omp simd
        for (int g = 0; g < LANES; g++) {
            scores[t][g] = exponential(scores[t][g] - said->highest[g]);
            said->sum[g] += scores[t][g];
        }
    for (int done = 0; done < num_tokens; done += TILE) {
        int64_t first = begin + done;
        int count = num_tokens - done < TILE ? num_tokens - done : TILE;
        float(*value)[VALUE_DIM] = (void *)tile;
        READ_TILE(value, values, VALUE_DIM)
        if (count < TILE)
            memset(scores[done + count], 0, (TILE - count) * sizeof scores[0]);
        mix_tile(value, scores + done, said->mixed);
    }
}

/* Write (GROUP, VALUE_DIM). A sink only adds to what the weights are divided by. */
static void merge_parts(const struct partial *said, int64_t num_parts, const float *sinks,
                        number *out)
{
    for (int g = 0; g < GROUP; g++) {
        float highest = sinks ? sinks[g] : -INFINITY;
        for (int64_t part = 0; part < num_parts; part++) {
            float other = said[part * NUM_KV_HEADS].highest[g];
            highest = other > highest ? other : highest;
        }
        float mixed[VALUE_DIM] = {0}, sum = sinks ? exponential(sinks[g] - highest) : 0.0f;
        for (int64_t part = 0; part < num_parts; part++) {
            const struct partial *one = said + part * NUM_KV_HEADS;
            float share = exponential(one->highest[g] - highest);
            sum += share * one->sum[g];
#pragma omp simd
            for (int d = 0; d < VALUE_DIM; d++)
                mixed[d] += share * one->mixed[g][d];
        }
        for (int d = 0; d < VALUE_DIM; d++)
            out[g * VALUE_DIM + d] = narrowed(mixed[d] / sum);
    }
}

/* How many bytes a part of a key head takes in `partials`. */
int64_t partial_bytes(void)
{
    return sizeof(struct partial);
}

/* Attend, for each row, to its tokens from its first part's begin to its end.
 *
 *     query       number at row * query_row + head * query_head + d
 *     keys        (blocks, NUM_KV_HEADS, BLOCK_SIZE, KEY_DIM); values likewise
 *     tables      the block ids of a row's context are at row * table_row
 *     ends        (num_rows) where each row's context ends
 *     part_rows   (num_parts) whose each part is, ascending
 *     part_begins (num_parts) its first token
 *     row_parts   (num_rows + 1) where the parts of each row begin among all
 *     sinks       (heads), or NULL
 *     partials    num_parts * NUM_KV_HEADS * partial_bytes()
 *     out         (num_rows, heads, VALUE_DIM)
 */
void decode(const number *query, int64_t query_row, int64_t query_head, const number *keys,
            const number *values, const int64_t *tables, int64_t table_row, const int64_t *ends,
            const int64_t *part_rows, const int64_t *part_begins, int64_t num_parts,
            const int64_t *row_parts, int64_t num_rows, float scaling, const float *sinks,
            struct partial *partials, number *out, int num_threads)
{
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_parts * NUM_KV_HEADS; task++) {
            int64_t part = task / NUM_KV_HEADS, head = task % NUM_KV_HEADS;
            int64_t row = part_rows[part], first = part_begins[part];
            int64_t last = first + PART < ends[row] ? first + PART : ends[row];
            float scaled[KEY_DIM][LANES] = {0};
            for (int g = 0; g < GROUP; g++) {
                const number *one = query + row * query_row + (head * GROUP + g) * query_head;
                for (int d = 0; d < KEY_DIM; d++)
                    scaled[d][g] = widened(one[d]) * scaling;
            }
            attend_part(scaled, keys, values, tables + row * table_row, head, first, last,
                        partials + task);
        }
#pragma omp for
        for (int64_t task = 0; task < num_rows * NUM_KV_HEADS; task++) {
            int64_t row = task / NUM_KV_HEADS, head = task % NUM_KV_HEADS;
            merge_parts(partials + row_parts[row] * NUM_KV_HEADS + head,
                        row_parts[row + 1] - row_parts[row], sinks ? sinks + head * GROUP : 0,
                        out + task * GROUP * VALUE_DIM);
        }
    }
}
