/* y[i] = (x[i] * clamp(x[i] + 3, 0, 6)) / 6 in float32, each step rounded. y may be x. Integers use lookup.h. */
#ifndef THRIFTY_HARDSWISH_H
#define THRIFTY_HARDSWISH_H

#include "simd.h"

THRIFTY_INLINE void thrifty_hardswish_f32(const float *x, float *y, int32_t count)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        const float raised = x[i] + 3.0f;
        const float gate = THRIFTY_CLAMP(raised, 0.0f, 6.0f);
        y[i] = (x[i] * gate) / 6.0f;
    }
}

#endif
