/* SPDX-License-Identifier: Apache-2.0
 *
 * What a draw and a logprob need of a row of logits: sums of the weights of its tokens, without a
 * tensor of the weights.
 *
 *     BFLOAT16        1: numbers are bfloat16; 0: float
 */

#include "number.h"

/* Sum exp((logit - highest) / temperature) over chunks of tokens. What is below e^-87 counts 0.
 *
 *     logits       (num_rows, num_tokens): rows begin row_step apart
 *     highest      (num_rows) each row's
 *     temperature  (num_rows)
 *     sums         (num_rows, chunks); the last chunk may be short
 */
void chunk_sums(const number *logits, int64_t row_step, int64_t num_rows, int64_t num_tokens,
                int64_t chunk, const float *highest, const float *temperature, double *sums,
                int num_threads)
{
    int64_t num_chunks = (num_tokens + chunk - 1) / chunk;
#pragma omp parallel for num_threads(num_threads)
    for (int64_t task = 0; task < num_rows * num_chunks; task++) {
        int64_t row = task / num_chunks, first = task % num_chunks * chunk;
        int64_t count = num_tokens - first < chunk ? num_tokens - first : chunk;
        const number *from = logits + row * row_step + first;
        float top = highest[row], heat = temperature[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < count; n++) {
            float power = (widened(from[n]) - top) / heat;
            float weight = exponential(power);
            sum += power < -87.0f ? 0.0f : weight;
        }
        sums[task] = sum;
    }
}
