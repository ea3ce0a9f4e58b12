/* SPDX-License-Identifier: Apache-2.0
 *
 * What a tensor holds, and the float that is computed in. BFLOAT16: 1 for bfloat16, 0 for float.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if BFLOAT16
typedef uint16_t number;

static inline float widened(number given)
{
    uint32_t bits = (uint32_t)given << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* To the nearest, and of two to the even one. */
static inline number narrowed(float given)
{
    uint32_t bits;
    memcpy(&bits, &given, sizeof bits);
    if (given != given)
        return (number)(bits >> 16 | 0x40);
    return (number)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
typedef float number;

static inline float widened(number given)
{
    return given;
}

static inline number narrowed(float given)
{
    return given;
}
#endif

/* e to a power of at most 0, to two units in the last place; below -87 it is as good as 0.
 *
 * Why not expf: compilers do not compute several at once without being told that there is no NaN.
 */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float e = 1.9875691500e-4f;
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    int32_t bits = ((int32_t)(n == n ? n : 0.0f) + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return e * scale;
}
