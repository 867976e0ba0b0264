/* Learning and classifying on integers: anchors per class, or codewords and an associative memory.
 * The meaning is thrifty/associative/: every word of the state and every winner is the same, bit for bit.
 *
 * A learner takes levels, unsigned integers of at most 8 bits, made from the features by a PREPARE. The macros below make
 * functions for the types of one learner; a model's C file uses each at most once. Distances are exact: ACC is wide
 * enough by construction. Votes of several views of one example add up until thrifty_clear_votes. */
#ifndef THRIFTY_ASSOCIATIVE_H
#define THRIFTY_ASSOCIATIVE_H

#include "arith.h"

typedef uint16_t thrifty_u16;
typedef uint32_t thrifty_u32;

typedef struct {
    uint16_t features, classes, parts;
    uint16_t each;   /* anchors per class and sub-space; codewords per sub-space */
    uint32_t most;   /* anchors: examples that one takes */
    uint32_t seed;   /* of stochastic rounding */
    uint8_t fraction; /* bits of a mean below the point */
} thrifty_learner_t;

/* where sub-vector `part` begins */
THRIFTY_INLINE uint32_t thrifty_bound(const thrifty_learner_t *k, uint32_t part)
{
    return part * k->features / k->parts;
}

THRIFTY_INLINE void thrifty_clear_votes(int32_t *votes, uint64_t *ties, uint32_t *saturated, int32_t classes)
{
    int32_t c;
    for (c = 0; c < classes; c++) {
        votes[c] = 0;
        if (ties) {
            ties[c] = 0;
        }
    }
    *saturated = 0;
}

/* Most votes, then least ties (where there are any), then the lowest class, among those of which `valid` has the bit (1) or `seen` is not 0;
 * -1 when there is none, or when the lead over the second is less than `margin`. */
THRIFTY_SHARED int32_t thrifty_winner(const int32_t *votes, const uint64_t *ties, const uint8_t *valid,
                                      const uint32_t *seen, int32_t classes, int32_t margin)
{
    int32_t best = -1;
    int32_t second = 0; /* votes of the second, when there is one */
    int32_t others = 0;
    int32_t c;
    for (c = 0; c < classes; c++) {
        if (valid ? !(valid[c >> 3] >> (c & 7) & 1) : seen[c] == 0) {
            continue;
        }
        if (best < 0) {
            best = c;
            continue;
        }
        if (votes[c] > votes[best] || (ties && votes[c] == votes[best] && ties[c] < ties[best])) {
            if (!others || votes[best] > second) {
                second = votes[best];
            }
            best = c;
        } else if (!others || votes[c] > second) {
            second = votes[c];
        }
        others = 1;
    }
    return others && votes[best] - second < margin ? -1 : best;
}

/* ---- levels: clamp(round_shift((feature + offset) * multiplier, shift), 0, top) << fraction; returns how many were
 * outside 0..top */
/* clang-format off */
#define THRIFTY_PREPARE(NAME, IN, OUT, OFFSET, MULTIPLIER, SHIFT, TOP, FRACTION)                                       \
    static uint32_t NAME(const thrifty_##IN *x, thrifty_##OUT *levels, int32_t count)                                  \
    {                                                                                                                  \
        uint32_t outside = 0;                                                                                          \
        int32_t i;                                                                                                     \
        for (i = 0; i < count; i++) {                                                                                  \
            int32_t v = ((int32_t)x[i] + (OFFSET)) * (MULTIPLIER);                                                     \
            v = (v + ((1 << (SHIFT)) >> 1)) >> (SHIFT);                                                                \
            outside += (uint32_t)v > (TOP);                                                                            \
            v = THRIFTY_CLAMP(v, 0, (TOP));                                                                            \
            levels[i] = (thrifty_##OUT)(v << (FRACTION));                                                              \
        }                                                                                                              \
        return outside;                                                                                                \
    }

/* ---- distances: thrifty_<metric>_<type>(a, b, count), in ACC; all numbers are at least 0 */
#define THRIFTY_DISTANCE(METRIC, TYPE, NAME, ACC)                                                                      \
    THRIFTY_INLINE ACC NAME(const thrifty_##TYPE *a, const thrifty_##TYPE *b, uint32_t count)                          \
    {                                                                                                                  \
        ACC sum = 0;                                                                                                   \
        THRIFTY_FAST_##METRIC##_##TYPE(ACC)                                                                            \
        for (; count > 0; count--) {                                                                                   \
            const int32_t e = (int32_t)*a++ - (int32_t)*b++;                                                           \
            sum += THRIFTY_ADDS_##METRIC(ACC, e);                                                                      \
        }                                                                                                              \
        return sum;                                                                                                    \
    }
#define THRIFTY_ADDS_l2(ACC, e) (ACC)((uint32_t)(e < 0 ? -e : e) * (ACC)(uint32_t)(e < 0 ? -e : e))
#define THRIFTY_ADDS_l1(ACC, e) (ACC)(uint32_t)(e < 0 ? -e : e)
#define THRIFTY_FAST_l2_u32(ACC)
#define THRIFTY_FAST_l1_u32(ACC)

#if THRIFTY_DSP
THRIFTY_INLINE uint32_t thrifty_minus2(uint32_t a, uint32_t b)
{
    uint32_t r;
    __asm__("ssub16 %0, %1, %2" : "=r"(r) : "r"(a), "r"(b) : "cc");
    return r;
}

/* sum + the squares of both signed lanes; _32 modulo 2^32, which no sum reaches */
THRIFTY_INLINE uint32_t thrifty_squares_32(uint32_t lanes, uint32_t sum)
{
    return (uint32_t)thrifty_dot2(lanes, lanes, (int32_t)sum);
}

THRIFTY_INLINE uint64_t thrifty_squares_64(uint32_t lanes, uint64_t sum)
{
    uint32_t low = (uint32_t)sum;
    uint32_t high = (uint32_t)(sum >> 32);
    __asm__("smlald %0, %1, %2, %2" : "+r"(low), "+r"(high) : "r"(lanes) : "cc");
    return (uint64_t)high << 32 | low;
}

/* sum + the four absolute differences of bytes */
THRIFTY_INLINE uint32_t thrifty_gaps4(uint32_t a, uint32_t b, uint32_t sum)
{
    uint32_t r;
    __asm__("usada8 %0, %1, %2, %3" : "=r"(r) : "r"(a), "r"(b), "r"(sum));
    return r;
}

#define THRIFTY_SQUARES(ACC, lanes, sum)                                                                               \
    (sizeof(ACC) == 4 ? (ACC)thrifty_squares_32(lanes, (uint32_t)(sum)) : (ACC)thrifty_squares_64(lanes, sum))
#define THRIFTY_PAIR_l2_s16(ACC, a, b) sum = THRIFTY_SQUARES(ACC, thrifty_minus2(a, b), sum);
/* the lanes are below 2^15: the larger less the smaller, both lanes added by a multiplication with 1 and 1 */
#define THRIFTY_PAIR_l1_s16(ACC, a, b)                                                                                 \
    sum += (ACC)(uint32_t)thrifty_dot2(thrifty_minus2(thrifty_max2_s16(a, b), thrifty_min2_s16(a, b)), 0x00010001u, 0);
#define THRIFTY_FAST_S16(METRIC, ACC)                                                                                  \
    for (; count >= 8; count -= 8, a += 8, b += 8) {                                                                   \
        THRIFTY_PAIR_##METRIC##_s16(ACC, thrifty_load4(a), thrifty_load4(b))                                           \
        THRIFTY_PAIR_##METRIC##_s16(ACC, thrifty_load4(a + 2), thrifty_load4(b + 2))                                   \
        THRIFTY_PAIR_##METRIC##_s16(ACC, thrifty_load4(a + 4), thrifty_load4(b + 4))                                   \
        THRIFTY_PAIR_##METRIC##_s16(ACC, thrifty_load4(a + 6), thrifty_load4(b + 6))                                   \
    }                                                                                                                  \
    for (; count >= 2; count -= 2, a += 2, b += 2) {                                                                   \
        THRIFTY_PAIR_##METRIC##_s16(ACC, thrifty_load4(a), thrifty_load4(b))                                           \
    }
#define THRIFTY_FAST_l2_s16(ACC) THRIFTY_FAST_S16(l2, ACC)
#define THRIFTY_FAST_l1_s16(ACC) THRIFTY_FAST_S16(l1, ACC)
#define THRIFTY_FAST_l2_u8(ACC)                                                                                        \
    for (; count >= 4; count -= 4, a += 4, b += 4) {                                                                   \
        const uint32_t x = thrifty_load4(a);                                                                           \
        const uint32_t y = thrifty_load4(b);                                                                           \
        sum = THRIFTY_SQUARES(ACC, thrifty_minus2(thrifty_even_u8(x), thrifty_even_u8(y)), sum);                       \
        sum = THRIFTY_SQUARES(ACC, thrifty_minus2(thrifty_odd_u8(x), thrifty_odd_u8(y)), sum);                         \
    }
#define THRIFTY_FAST_l1_u8(ACC)                                                                                        \
    for (; count >= 4; count -= 4, a += 4, b += 4) {                                                                   \
        sum = (ACC)thrifty_gaps4(thrifty_load4(a), thrifty_load4(b), (uint32_t)sum);                                   \
    }
#else
#define THRIFTY_FAST_l2_s16(ACC)
#define THRIFTY_FAST_l1_s16(ACC)
#define THRIFTY_FAST_l2_u8(ACC)
#define THRIFTY_FAST_l1_u8(ACC)
#endif

/* ---- anchors */
/* The class of the nearest used anchor gets the vote of each sub-space. COUNT: the length of all sub-vectors, which makes
 * for straight code; 0 when they differ. */
#define THRIFTY_ANCHORS_VOTE(NAME, MEAN, DISTANCE, ACC, COUNT)                                                         \
    static void NAME(const thrifty_learner_t *k, const uint32_t *seen, const thrifty_##MEAN *means,                    \
                     const thrifty_##MEAN *restrict query, int32_t *restrict votes, uint64_t *restrict ties)           \
    {                                                                                                                  \
        uint32_t p, c, i;                                                                                              \
        for (p = 0; p < k->parts; p++) {                                                                               \
            const uint32_t start = thrifty_bound(k, p);                                                                \
            const uint32_t count = (COUNT) ? (COUNT) : thrifty_bound(k, p + 1) - start;                                \
            const thrifty_##MEAN *of_class = means + start;                                                            \
            ACC best = (ACC) - 1;                                                                                      \
            int32_t winner = -1;                                                                                       \
            for (c = 0; c < k->classes; c++, of_class += (uint32_t)k->each * k->features) {                            \
                const uint32_t used = seen[c] < k->each ? seen[c] : k->each;                                           \
                const thrifty_##MEAN *mean = of_class;                                                                 \
                ACC least = (ACC) - 1;                                                                                 \
                for (i = 0; i < used; i++, mean += k->features) {                                                      \
                    const ACC away = DISTANCE(query + start, mean, count);                                             \
                    least = away < least ? away : least;                                                               \
                }                                                                                                      \
                if (ties) {                                                                                            \
                    ties[c] += used ? least : 0;                                                                       \
                }                                                                                                      \
                if (least < best) { /* no distance is all ones */                                                      \
                    best = least;                                                                                      \
                    winner = (int32_t)c;                                                                               \
                }                                                                                                      \
            }                                                                                                          \
            if (winner >= 0) {                                                                                         \
                votes[winner]++;                                                                                       \
            }                                                                                                          \
        }                                                                                                              \
    }

/* An anchor, or its part of one sub-space, takes its n-th example: `count` words from `place` on, levels from query[start]
 * on. _SUM: sums += levels, means = the rounded means. */
#define THRIFTY_MOVE_SUM(NAME, SUM, MEAN)                                                                              \
    THRIFTY_INLINE void NAME(const thrifty_learner_t *k, thrifty_##SUM *sums, thrifty_##MEAN *means, uint32_t place,   \
                             const thrifty_##MEAN *query, uint32_t start, uint32_t count, uint32_t n, uint32_t *draws) \
    {                                                                                                                  \
        uint32_t j;                                                                                                    \
        (void)draws;                                                                                                   \
        for (j = 0; j < count; j++) {                                                                                  \
            const uint32_t sum = (uint32_t)sums[place + j] + ((uint32_t)query[start + j] >> k->fraction);              \
            sums[place + j] = (thrifty_##SUM)sum;                                                                      \
            means[place + j] = (thrifty_##MEAN)(((sum << k->fraction) + (n >> 1)) / n);                                \
        }                                                                                                              \
    }

/* means += (level - mean) / n, rounded: ROUNDING 0 half up, 1 down, 2 at random with the right expectation; no sums */
#define THRIFTY_MOVE_MEAN(NAME, SUM, MEAN, ROUNDING)                                                                   \
    THRIFTY_INLINE void NAME(const thrifty_learner_t *k, thrifty_##SUM *sums, thrifty_##MEAN *means, uint32_t place,   \
                             const thrifty_##MEAN *query, uint32_t start, uint32_t count, uint32_t n, uint32_t *draws) \
    {                                                                                                                  \
        uint32_t j;                                                                                                    \
        (void)sums;                                                                                                    \
        for (j = 0; j < count; j++) {                                                                                  \
            const int32_t mean = (int32_t)means[place + j];                                                            \
            const int32_t gap = (int32_t)query[start + j] - mean;                                                      \
            int32_t step;                                                                                              \
            if ((ROUNDING) == 0) {                                                                                     \
                step = thrifty_floor_divide(2 * gap + (int32_t)n, 2 * n);                                              \
            } else if ((ROUNDING) == 1) {                                                                              \
                step = thrifty_floor_divide(gap, n);                                                                   \
            } else {                                                                                                   \
                const uint64_t wide = (uint64_t)thrifty_random(draws[0] + j, k->seed) * n;                             \
                step = thrifty_floor_divide(gap + (int32_t)(wide >> 32), n);                                           \
            }                                                                                                          \
            means[place + j] = (thrifty_##MEAN)(mean + step);                                                          \
        }                                                                                                              \
        if ((ROUNDING) == 2) {                                                                                         \
            draws[0] += count;                                                                                         \
        }                                                                                                              \
    }

/* The anchors of a class take turns; returns 0 when all are full. */
#define THRIFTY_LEARN_TURNS(NAME, MOVE, SUM, MEAN)                                                                     \
    static int32_t NAME(const thrifty_learner_t *k, uint32_t *seen, thrifty_##SUM *sums, thrifty_##MEAN *means,        \
                        const thrifty_##MEAN *query, uint32_t *draws, uint32_t c)                                      \
    {                                                                                                                  \
        const uint32_t t = seen[c];                                                                                    \
        if (t / k->each >= k->most) {                                                                                  \
            return 0;                                                                                                  \
        }                                                                                                              \
        MOVE(k, sums, means, (c * k->each + t % k->each) * k->features, query, 0, k->features, t / k->each + 1, draws);\
        seen[c] = t + 1;                                                                                               \
        return 1;                                                                                                      \
    }

/* The first examples of a class found its anchors, later ones go to the nearest in each sub-space; returns 0 when all of
 * these are full. */
#define THRIFTY_LEARN_NEAREST(NAME, MOVE, SUM, MEAN, COUNTER, DISTANCE, ACC, COUNT)                                    \
    static int32_t NAME(const thrifty_learner_t *k, uint32_t *seen, thrifty_##SUM *sums, thrifty_##MEAN *means,        \
                        const thrifty_##MEAN *query, uint32_t *draws, uint32_t c, thrifty_##COUNTER *counts)           \
    {                                                                                                                  \
        const uint32_t t = seen[c];                                                                                    \
        int32_t learned = 0;                                                                                           \
        uint32_t p, i;                                                                                                 \
        for (p = 0; p < k->parts; p++) {                                                                               \
            const uint32_t start = thrifty_bound(k, p);                                                                \
            const uint32_t count = (COUNT) ? (COUNT) : thrifty_bound(k, p + 1) - start;                                \
            const uint32_t first = c * k->each * k->features + start;                                                  \
            thrifty_##COUNTER *of_anchor = counts + (c * k->parts + p) * k->each;                                      \
            uint32_t chosen = t;                                                                                       \
            if (t >= k->each) {                                                                                        \
                ACC least = (ACC) - 1;                                                                                 \
                for (i = 0; i < k->each; i++) {                                                                        \
                    const ACC away = DISTANCE(query + start, means + first + i * k->features, count);                  \
                    if (away < least) {                                                                                \
                        least = away;                                                                                  \
                        chosen = i;                                                                                    \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            if (of_anchor[chosen] >= k->most) {                                                                        \
                continue;                                                                                              \
            }                                                                                                          \
            of_anchor[chosen]++;                                                                                       \
            MOVE(k, sums, means, first + chosen * k->features, query, start, count, of_anchor[chosen], draws);         \
            learned = 1;                                                                                               \
        }                                                                                                              \
        seen[c] = t + (uint32_t)learned;                                                                               \
        return learned;                                                                                                \
    }
/* clang-format on */

/* v / n, rounded down; C rounds towards 0 */
THRIFTY_INLINE int32_t thrifty_floor_divide(int32_t v, uint32_t n)
{
    return v >= 0 ? (int32_t)((uint32_t)v / n) : -(int32_t)(((uint32_t)-v + n - 1) / n);
}

/* 32 random bits of a counter: MurmurHash3's finaliser (public domain) */
THRIFTY_INLINE uint32_t thrifty_random(uint32_t counter, uint32_t seed)
{
    uint32_t x = counter * 0x9E3779B1u + seed;
    x ^= x >> 16;
    x *= 0x85EBCA6Bu;
    x ^= x >> 13;
    x *= 0xC2B2AE35u;
    return x ^ x >> 16;
}

/* ---- codewords: codebook holds for each sub-space its codewords, one behind the other */
/* clang-format off */
#define THRIFTY_ENCODE(NAME, DISTANCE, ACC, COUNT)                                                                     \
    static void NAME(const thrifty_learner_t *k, const uint8_t *codebook, const uint8_t *restrict query,               \
                     uint16_t *restrict codes)                                                                         \
    {                                                                                                                  \
        uint32_t p, i;                                                                                                 \
        for (p = 0; p < k->parts; p++) {                                                                               \
            const uint32_t start = thrifty_bound(k, p);                                                                \
            const uint32_t count = (COUNT) ? (COUNT) : thrifty_bound(k, p + 1) - start;                                \
            ACC best = (ACC) - 1;                                                                                      \
            for (i = 0; i < k->each; i++, codebook += count) {                                                         \
                const ACC away = DISTANCE(query + start, codebook, count);                                             \
                if (away < best) {                                                                                     \
                    best = away;                                                                                       \
                    codes[p] = (uint16_t)i;                                                                            \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
/* clang-format on */

/* bit `each` p + code of each class's row */
THRIFTY_INLINE void thrifty_bits_learn(const thrifty_learner_t *k, uint8_t *valid, uint8_t *cells,
                                       const uint16_t *codes, uint32_t c)
{
    const uint32_t row = ((uint32_t)k->parts * k->each + 7) >> 3;
    uint32_t p;
    for (p = 0; p < k->parts; p++) {
        const uint32_t place = p * k->each + codes[p];
        cells[c * row + (place >> 3)] = (uint8_t)(cells[c * row + (place >> 3)] | 1u << (place & 7));
    }
    valid[c >> 3] = (uint8_t)(valid[c >> 3] | 1u << (c & 7));
}

THRIFTY_INLINE void thrifty_bits_vote(const thrifty_learner_t *k, const uint8_t *cells, const uint16_t *codes,
                                      int32_t *votes)
{
    const uint32_t row = ((uint32_t)k->parts * k->each + 7) >> 3;
    uint32_t p, c;
    for (p = 0; p < k->parts; p++) {
        const uint32_t place = p * k->each + codes[p];
        const uint8_t *cell = cells + (place >> 3);
        for (c = 0; c < k->classes; c++, cell += row) {
            votes[c] += *cell >> (place & 7) & 1;
        }
    }
}

THRIFTY_INLINE void thrifty_counts_learn(const thrifty_learner_t *k, uint32_t *seen, uint8_t *cells,
                                         const uint16_t *codes, uint32_t c)
{
    uint32_t p;
    for (p = 0; p < k->parts; p++) {
        uint8_t *cell = cells + ((c * k->parts + p) * k->each + codes[p]);
        *cell = (uint8_t)(*cell + (*cell < 255));
    }
    seen[c]++;
}

/* log2(1 + m / 256) in units of 2^-8, half up */
static const uint8_t thrifty_log2_table[256] THRIFTY_UNUSED = {
    0, 1, 3, 4, 6, 7, 9, 10, 11, 13, 14, 16, 17, 18, 20, 21, 22, 24, 25, 26, 28, 29, 30, 32, 33, 34, 36, 37, 38,
    40, 41, 42, 44, 45, 46, 47, 49, 50, 51, 52, 54, 55, 56, 57, 59, 60, 61, 62, 63, 65, 66, 67, 68, 69, 71, 72,
    73, 74, 75, 77, 78, 79, 80, 81, 82, 84, 85, 86, 87, 88, 89, 90, 92, 93, 94, 95, 96, 97, 98, 99, 100, 102,
    103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 116, 117, 118, 119, 120, 121, 122, 123, 124,
    125, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142, 143, 144, 145,
    146, 147, 148, 149, 150, 151, 152, 153, 154, 155, 155, 156, 157, 158, 159, 160, 161, 162, 163, 164, 165,
    166, 167, 168, 169, 169, 170, 171, 172, 173, 174, 175, 176, 177, 178, 178, 179, 180, 181, 182, 183, 184,
    185, 185, 186, 187, 188, 189, 190, 191, 192, 192, 193, 194, 195, 196, 197, 198, 198, 199, 200, 201, 202,
    203, 203, 204, 205, 206, 207, 208, 208, 209, 210, 211, 212, 212, 213, 214, 215, 216, 216, 217, 218, 219,
    220, 220, 221, 222, 223, 224, 224, 225, 226, 227, 228, 228, 229, 230, 231, 231, 232, 233, 234, 234, 235,
    236, 237, 238, 238, 239, 240, 241, 241, 242, 243, 244, 244, 245, 246, 247, 247, 248, 249, 249, 250, 251,
    252, 252, 253, 254, 255, 255,
};

/* log2(v) in units of 2^-8; v at least 1 */
THRIFTY_INLINE int32_t thrifty_log2(uint32_t v)
{
#if defined(__GNUC__)
    const int32_t zeros = __builtin_clz(v);
#else
    int32_t zeros = 0;
    while (!(v << zeros >> 31)) {
        zeros++;
    }
#endif
    return ((31 - zeros) << 8) + thrifty_log2_table[v << zeros >> 23 & 255];
}

THRIFTY_INLINE void thrifty_counts_vote(const thrifty_learner_t *k, const uint32_t *seen, const uint8_t *cells,
                                        const uint16_t *codes, int32_t *votes)
{
    uint32_t p, c;
    for (c = 0; c < k->classes; c++) {
        int32_t score = 0;
        if (seen[c] == 0) {
            cells += (uint32_t)k->parts * k->each;
            continue;
        }
        for (p = 0; p < k->parts; p++, cells += k->each) {
            score += thrifty_log2(cells[codes[p]] + 1u);
        }
        votes[c] += score - (int32_t)k->parts * thrifty_log2(seen[c] + k->each);
    }
}

/* ---- forgetting */
THRIFTY_INLINE void thrifty_clear(void *from, uint32_t bytes)
{
    uint8_t *to = (uint8_t *)from;
    for (; bytes > 0; bytes--) {
        *to++ = 0;
    }
}

#endif
