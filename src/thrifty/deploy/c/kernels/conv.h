/* Integer convolution: two output channels times three output pixels at a time, from interleaved row buffers.
 *
 * Output rows are cut into tiles, runs of `tile` pixels. Three tiles are computed together: their windows are widened
 * into three interleaved row buffers (rows.h), so that one load-multiple reads two taps of three pixels, and one more
 * reads weights of two channels. An inner kernel (block.h) walks the pixels of the tiles, all channel pairs for each.
 *
 * The stream of packed constants holds, for each pair of channels: two biases; then, word by word, weights of the first
 * and of the second channel, taps padded with zeros to whole steps; then two multipliers, unless requantisation is a
 * shift. A last odd channel has the same by itself.
 *
 * An inner kernel is named by how weights are stored, how sums are requantised and how results are clamped and stored;
 * the emitted C instantiates those that it needs with THRIFTY_PAIRS, THRIFTY_SINGLE and THRIFTY_FILL:
 *   W8, W16, W4, W4X         see block.h
 *   MULT, PRE, SHIFT         a multiplier; a left shift, then a multiplier; one shift, its rounding folded in the bias
 *   S8, U8, S16, U15         the limits of the type, or 0..32767
 *   C8, C16                  other limits, in 8 or 16 bits */
#ifndef THRIFTY_CONV_H
#define THRIFTY_CONV_H

#include "block.h"
#include "rows.h"

typedef struct {
    const uint32_t *stream;
    thrifty_fill_t *fill;
    thrifty_pairs_t *pairs;   /* NULL when there is but one channel */
    thrifty_single_t *single; /* for a last odd channel, or NULL */
    thrifty_finish_t finish;
    thrifty_rows_t rows;
    uint32_t pair_words;           /* words of the stream for all pairs */
    uint16_t out_h, out_w;         /* output pixels */
    uint16_t tile;                 /* pixels of a tile, at most out_w */
    uint16_t stride_h, stride_w;
    uint16_t top, left;            /* padding */
    uint16_t steps;                /* of a window */
    uint16_t window_words;         /* words of a window, the last step complete */
    uint16_t advance;              /* words of one lane from a window to the next */
    uint16_t lane_words;           /* words of one lane */
    uint16_t channels;             /* output channels */
    uint16_t pixel_bytes;          /* bytes of an output pixel */
} thrifty_conv_t;

THRIFTY_SHARED void thrifty_conv(const thrifty_conv_t *k, const void *x, void *y, void *scratch)
{
    thrifty_word_t *const window = (thrifty_word_t *)scratch;
    const uint32_t odd = k->channels & 1u ? k->pixel_bytes / k->channels : 0u;
    const uint32_t advance = 4u * k->advance * THRIFTY_LANE_STEP(THRIFTY_LANES);
    uint32_t row = 0, column = 0;
    while (row < k->out_h) {
        uint8_t *out[THRIFTY_LANES];
        for (uint32_t lane = 0; lane < THRIFTY_LANES; lane++) {
            /* the last tile of a row moves left to be full; lanes behind the last tile of all repeat it */
            const uint32_t last = (uint32_t)k->out_w - k->tile, first = column < last ? column : last;
            const uint32_t at = row < k->out_h ? row : (uint32_t)k->out_h - 1u;
            const uint32_t from = row < k->out_h ? first : last;
            k->fill(&k->rows, x, (int32_t)(at * k->stride_h) - k->top, (int32_t)(from * k->stride_w) - k->left,
                    window + lane * THRIFTY_LANE_START(k->lane_words));
            out[lane] = (uint8_t *)y + (at * k->out_w + from) * k->pixel_bytes;
            column += k->tile;
            if (column >= k->out_w) {
                column = 0;
                row++;
            }
        }
        if (k->pairs)
            k->pairs(window, k->stream, k->stream + k->pair_words, k->tile, advance,
                     window + (uint32_t)k->window_words * THRIFTY_LANE_STEP(THRIFTY_LANES), out[0], out[1], out[2], odd,
                     k->steps, k->finish.max_less_high, k->finish.min_less_low, k->finish.shift, 4u * k->lane_words,
                     k->pixel_bytes);
        if (odd) {
            for (uint32_t lane = 0; lane < THRIFTY_LANES; lane++)
                out[lane] += k->pixel_bytes - odd;
            k->single(window, k->stream + k->pair_words, k->tile, advance, k->steps, out, k->pixel_bytes, &k->finish,
                      4u * k->lane_words);
        }
    }
}

#endif
