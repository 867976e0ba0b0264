/* Convolution, depthwise convolution and linear layers in float32.
 *
 * Every sum starts at the bias and runs in the order (ky, kx, ci), each product and each sum rounded: the compiler must
 * not contract them (-ffp-contract=off). Speed comes from computing four channels, and four windows, side by side.
 * Windows are gathered in scratch memory, the same tap of the four one behind the other; zeros stand for what lies
 * outside the input. Constants: for each four channels of a group their biases, then their weights tap by tap; a rest
 * of one to three channels follows in the same way, one by one. */
#ifndef THRIFTY_CONV_FLOAT_H
#define THRIFTY_CONV_FLOAT_H

#include "arith.h"

typedef struct {
    const float *stream;
    float low, high;
    uint16_t in_h, in_w, in_c, out_h, out_w, channels; /* channels: of the output */
    uint16_t kernel_h, kernel_w, stride_h, stride_w, top, left;
    uint16_t group_in, group_out; /* channels of a group */
} thrifty_float_t;

THRIFTY_INLINE float thrifty_float_clamp(float v, const thrifty_float_t *k)
{
    return v < k->low ? k->low : v > k->high ? k->high : v;
}

/* Gather the window of output pixel (row, column), channels from `first` on, as every `lanes`-th number of `to`. */
THRIFTY_SHARED void thrifty_float_window(const thrifty_float_t *k, const float *x, int32_t row, int32_t column,
                                        uint32_t first, float *to, const uint32_t lanes)
{
    row = row * k->stride_h - k->top;
    column = column * k->stride_w - k->left;
    for (int32_t iy = row; iy < row + k->kernel_h; iy++)
        for (int32_t ix = column; ix < column + k->kernel_w; ix++) {
            uint32_t left = k->group_in;
            if (iy >= 0 && iy < k->in_h && ix >= 0 && ix < k->in_w) {
                const float *from = x + (uint32_t)(iy * k->in_w + ix) * k->in_c + first;
                for (; left >= 4; left -= 4, from += 4, to += 4 * lanes) {
                    const float a = from[0], b = from[1], c = from[2], d = from[3];
                    to[0] = a;
                    to[lanes] = b;
                    to[2 * lanes] = c;
                    to[3 * lanes] = d;
                }
                for (; left > 0; left--, to += lanes)
                    *to = *from++;
            } else
                for (; left > 0; left--, to += lanes)
                    *to = 0.0f;
        }
}

#define THRIFTY_FLOAT_ROW(a, x)                                                                                        \
    a##0 += w0 * x;                                                                                                    \
    a##1 += w1 * x;                                                                                                    \
    a##2 += w2 * x;                                                                                                    \
    a##3 += w3 * x;
#define THRIFTY_FLOAT_PUT(a, to)                                                                                       \
    (to)[0] = thrifty_float_clamp(a##0, k);                                                                            \
    (to)[1] = thrifty_float_clamp(a##1, k);                                                                            \
    (to)[2] = thrifty_float_clamp(a##2, k);                                                                            \
    (to)[3] = thrifty_float_clamp(a##3, k);

/* Four channels of four windows. */
THRIFTY_SHARED void thrifty_float_4x4(const thrifty_float_t *k, const float *w, const float *x, uint32_t taps,
                                     float *const *y, uint32_t channel)
{
    float a0 = w[0], a1 = w[1], a2 = w[2], a3 = w[3];
    float b0 = a0, b1 = a1, b2 = a2, b3 = a3, c0 = a0, c1 = a1, c2 = a2, c3 = a3, d0 = a0, d1 = a1, d2 = a2, d3 = a3;
    for (w += 4; taps > 0; taps--, w += 4, x += 4) {
        const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
        THRIFTY_FLOAT_ROW(a, x0)
        THRIFTY_FLOAT_ROW(b, x1)
        THRIFTY_FLOAT_ROW(c, x2)
        THRIFTY_FLOAT_ROW(d, x3)
    }
    THRIFTY_FLOAT_PUT(a, y[0] + channel)
    THRIFTY_FLOAT_PUT(b, y[1] + channel)
    THRIFTY_FLOAT_PUT(c, y[2] + channel)
    THRIFTY_FLOAT_PUT(d, y[3] + channel)
}

/* Four channels of one window. */
THRIFTY_SHARED void thrifty_float_4x1(const thrifty_float_t *k, const float *w, const float *x, uint32_t taps, float *y)
{
    float a0 = w[0], a1 = w[1], a2 = w[2], a3 = w[3];
    for (w += 4; taps > 0; taps--, w += 4) {
        const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], x0 = *x++;
        THRIFTY_FLOAT_ROW(a, x0)
    }
    THRIFTY_FLOAT_PUT(a, y)
}

/* One channel of one window, whose taps lie `lanes` apart. */
THRIFTY_SHARED void thrifty_float_1x1(const thrifty_float_t *k, const float *w, const float *x, uint32_t taps, float *y,
                                     const uint32_t lanes)
{
    float sum = *w++;
    for (; taps > 0; taps--, x += lanes)
        sum += *w++ * *x;
    *y = thrifty_float_clamp(sum, k);
}

THRIFTY_SHARED void thrifty_conv_float(const thrifty_float_t *k, const void *input, void *output, void *scratch)
{
    const uint32_t taps = (uint32_t)k->kernel_h * k->kernel_w * k->group_in, pixels = (uint32_t)k->out_h * k->out_w;
    float *const windows = (float *)scratch;
    int32_t row = 0, column = 0;
    for (uint32_t pixel = 0; pixel < pixels; pixel += 4) {
        const float *w = k->stream;
        float *y[4];
        int32_t rows[4], columns[4];
        for (uint32_t lane = 0; lane < 4; lane++) {
            const uint32_t at = pixel + lane;
            rows[lane] = row;
            columns[lane] = column;
            y[lane] = (float *)output + (at < pixels ? at : pixels - 1) * k->channels;
            if (at + 1 < pixels && ++column == k->out_w) {
                column = 0;
                row++;
            }
        }
        for (uint32_t channel = 0, first = 0; channel < k->channels; first += k->group_in) {
            for (uint32_t lane = 0; lane < 4; lane++)
                thrifty_float_window(k, (const float *)input, rows[lane], columns[lane], first, windows + lane, 4);
            uint32_t left = k->group_out;
            for (; left >= 4; left -= 4, channel += 4, w += 4 * (taps + 1))
                thrifty_float_4x4(k, w, windows, taps, y, channel);
            for (left &= 3u; left > 0; left--, channel++, w += taps + 1)
                for (uint32_t lane = 0; lane < 4; lane++)
                    thrifty_float_1x1(k, w, windows + lane, taps, y[lane] + channel, 4);
        }
    }
}

THRIFTY_SHARED void thrifty_linear_float(const thrifty_float_t *k, const void *input, void *output,
                                        void *scratch THRIFTY_UNUSED)
{
    const float *w = k->stream, *x = (const float *)input;
    const uint32_t taps = k->group_in;
    float *y = (float *)output;
    uint32_t left = k->channels;
    for (; left >= 4; left -= 4, y += 4, w += 4 * (taps + 1))
        thrifty_float_4x1(k, w, x, taps, y);
    for (left &= 3u; left > 0; left--, y++, w += taps + 1)
        thrifty_float_1x1(k, w, x, taps, y, 1);
}

/* Constants: for each four channels their biases, then their weights tap by tap; the last one to three one by one. */
THRIFTY_SHARED void thrifty_depthwise_float(const thrifty_float_t *k, const void *input, void *output,
                                           void *scratch THRIFTY_UNUSED)
{
    const float *const x = (const float *)input;
    float *y = (float *)output;
    for (int32_t row = -(int32_t)k->top, rows = k->out_h; rows > 0; rows--, row += k->stride_h) {
        const int32_t ky0 = row < 0 ? -row : 0, ky1 = k->in_h - row < k->kernel_h ? k->in_h - row : k->kernel_h;
        for (int32_t column = -(int32_t)k->left, columns = k->out_w; columns > 0; columns--, column += k->stride_w) {
            const int32_t kx0 = column < 0 ? -column : 0;
            const int32_t kx1 = k->in_w - column < k->kernel_w ? k->in_w - column : k->kernel_w;
            const float *stream = k->stream;
            for (uint32_t channel = 0; channel < k->channels;) {
                const uint32_t together = k->channels - channel >= 4 ? 4 : 1;
                float a0 = stream[0], a1 = 0.0f, a2 = 0.0f, a3 = 0.0f;
                if (together == 4) {
                    a1 = stream[1];
                    a2 = stream[2];
                    a3 = stream[3];
                }
                for (int32_t ky = ky0; ky < ky1; ky++) {
                    const float *from = x + ((row + ky) * k->in_w + column + kx0) * k->in_c + channel;
                    const float *w = stream + together * (uint32_t)(1 + ky * k->kernel_w + kx0);
                    if (together == 4)
                        for (int32_t kx = kx0; kx < kx1; kx++, from += k->in_c, w += 4) {
                            a0 += w[0] * from[0];
                            a1 += w[1] * from[1];
                            a2 += w[2] * from[2];
                            a3 += w[3] * from[3];
                        }
                    else
                        for (int32_t kx = kx0; kx < kx1; kx++, from += k->in_c, w++)
                            a0 += w[0] * from[0];
                }
                stream += together * (uint32_t)(1 + k->kernel_h * k->kernel_w);
                channel += together;
                *y++ = thrifty_float_clamp(a0, k);
                if (together == 4) {
                    *y++ = thrifty_float_clamp(a1, k);
                    *y++ = thrifty_float_clamp(a2, k);
                    *y++ = thrifty_float_clamp(a3, k);
                }
            }
        }
    }
}

#endif
