/* Integer linear layers, and convolutions with so few output pixels that each is better computed by itself: four output
 * channels of one window at a time.
 *
 * The stream of packed constants is as in conv.h, four channels instead of two; the last one to three channels follow
 * one by one. Inner kernels are instantiated with THRIFTY_FOURS and THRIFTY_SINGLE(..., 1), fills with one lane. */
#ifndef THRIFTY_LINEAR_H
#define THRIFTY_LINEAR_H

#include "block.h"
#include "rows.h"

typedef struct {
    const uint32_t *stream;
    thrifty_fill_t *fill; /* NULL: the input is read where it lies */
    thrifty_fours_t *fours; /* NULL when there are fewer than four channels */
    thrifty_single_t *single; /* NULL when they are a multiple of four */
    thrifty_finish_t finish;
    thrifty_rows_t rows;
    uint32_t four_words; /* words of the stream for all fours */
    uint16_t out_h, out_w;
    uint16_t stride_h, stride_w;
    uint16_t top, left;
    uint16_t steps;
    uint16_t window_words;
    uint16_t channels;
    uint16_t item_bytes; /* bytes of an output element */
} thrifty_linear_t;

THRIFTY_SHARED void thrifty_linear(const thrifty_linear_t *k, const void *x, void *y, void *scratch)
{
    uint8_t *out = (uint8_t *)y;
    const uint32_t together = k->channels & ~3u;
    for (uint32_t row = 0; row < k->out_h; row++)
        for (uint32_t column = 0; column < k->out_w; column++) {
            const thrifty_word_t *window = (const thrifty_word_t *)x;
            const uint32_t *stream = k->stream;
            if (k->fill) {
                window = (const thrifty_word_t *)scratch;
                k->fill(&k->rows, x, (int32_t)(row * k->stride_h) - k->top, (int32_t)(column * k->stride_w) - k->left,
                        (thrifty_word_t *)scratch);
            }
            if (together) {
                k->fours(window, stream, stream + k->four_words, out, k->steps, k->finish.max_less_high,
                         k->finish.min_less_low, k->finish.shift, window + k->window_words);
                stream += k->four_words;
                out += together * k->item_bytes;
            }
            for (uint32_t channel = together; channel < k->channels; channel++, out += k->item_bytes)
                stream = k->single(window, stream, 1, 0, k->steps, &out, 0, &k->finish, 0);
        }
}

#endif
