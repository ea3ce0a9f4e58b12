/* SPDX-License-Identifier: Apache-2.0
 *
 * The small operations of a layer, each in one pass. They round where PyTorch's chains of
 * operations do, which write a tensor after each. A NaN stays with its row.
 *
 *     BFLOAT16        1: numbers are bfloat16; 0: float
 */

#include "number.h"

/* Numbers that one thread does sooner than it wakes others. */
#define FEW 32768

static inline float rounded(float given)
{
    return widened(narrowed(given));
}

/* Root mean square norms: out = hidden / sqrt(mean(hidden²) + epsilon) * weight.
 *
 *     hidden  (outer, inner, dim): rows begin at o * outer_step + i * inner_step
 *     weight  (dim)
 *     out     (outer, inner, dim), dense
 */
void normalize(const number *hidden, int64_t outer, int64_t inner, int64_t outer_step,
               int64_t inner_step, int64_t dim, const number *weight, float epsilon, number *out,
               int num_threads)
{
#pragma omp parallel for num_threads(num_threads) if (outer * inner * dim > FEW)
    for (int64_t row = 0; row < outer * inner; row++) {
        const number *from = hidden + row / inner * outer_step + row % inner * inner_step;
        number *to = out + row * dim;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; d++)
            sum += widened(from[d]) * widened(from[d]);
        float scale = 1.0f / sqrtf(sum / (float)dim + epsilon);
#pragma omp simd
        for (int64_t d = 0; d < dim; d++)
            to[d] = narrowed(rounded(widened(from[d]) * scale) * widened(weight[d]));
    }
}

static inline void turn(const number *from, const number *cosine, const number *sine, int64_t dim,
                        number *to)
{
    int64_t half = dim / 2;
#pragma omp simd
    for (int64_t d = 0; d < half; d++) {
        float first = widened(from[d]), second = widened(from[half + d]);
        to[d] = narrowed(rounded(first * widened(cosine[d])) -
                         rounded(second * widened(sine[d])));
        to[half + d] = narrowed(rounded(second * widened(cosine[half + d])) +
                                rounded(first * widened(sine[half + d])));
    }
}

/* Rotary positions, halves apart (https://arxiv.org/abs/2104.09864).
 *
 *     query   heads of a token begin at token * query_token + head * query_head
 *     key     likewise
 *     cosine  (tokens, dim); sine likewise
 *     out     (tokens, query heads, dim), then (tokens, key heads, dim), dense
 */
void rotate(const number *query, int64_t query_token, int64_t query_head, int64_t num_heads,
            const number *key, int64_t key_token, int64_t key_head, int64_t num_kv_heads,
            const number *cosine, const number *sine, int64_t num_tokens, int64_t dim,
            number *out, int num_threads)
{
    number *out_key = out + num_tokens * num_heads * dim;
#pragma omp parallel for num_threads(num_threads) \
    if (num_tokens * (num_heads + num_kv_heads) * dim > FEW)
    for (int64_t token = 0; token < num_tokens; token++) {
        const number *c = cosine + token * dim, *s = sine + token * dim;
        for (int64_t head = 0; head < num_heads; head++)
            turn(query + token * query_token + head * query_head, c, s, dim,
                 out + (token * num_heads + head) * dim);
        for (int64_t head = 0; head < num_kv_heads; head++)
            turn(key + token * key_token + head * key_head, c, s, dim,
                 out_key + (token * num_kv_heads + head) * dim);
    }
}

/* Put keys and values into pages of (blocks, heads, block_size, dim).
 *
 *     key     heads of a token begin at token * key_token + head * key_head; value likewise
 *     slots   (num_tokens) block * block_size + place
 */
void store(const number *key, int64_t key_token, int64_t key_head, int64_t key_dim,
           const number *value, int64_t value_token, int64_t value_head, int64_t value_dim,
           const int64_t *slots, int64_t num_tokens, int64_t num_heads, int64_t block_size,
           number *keys, number *values, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) \
    if (num_tokens * num_heads * (key_dim + value_dim) > FEW)
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t head = 0; head < num_heads; head++) {
            int64_t block = slots[token] / block_size * num_heads + head;
            int64_t to = block * block_size + slots[token] % block_size;
            memcpy(keys + to * key_dim, key + token * key_token + head * key_head,
                   (size_t)key_dim * sizeof *key);
            memcpy(values + to * value_dim, value + token * value_token + head * value_head,
                   (size_t)value_dim * sizeof *value);
        }
}
