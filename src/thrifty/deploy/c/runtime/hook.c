/* Counts what an emulated core executes: called by Unicorn at the start of each basic block. Built for this computer. */
#include <stdint.h>

typedef struct {
    const uint8_t *code;    /* the image, from address 0 */
    uint64_t half_words;    /* of code, and entries of the arrays below that are indexed by address / 2 */
    const uint16_t *entry;  /* 1 + number of the layer whose function starts here, or 0 */
    uint32_t *size;         /* bytes of the block that starts here, as last seen */
    uint32_t *length;       /* its instructions */
    uint64_t *executed;     /* how often it ran */
    uint64_t *left;         /* how often the next block was not the one behind it: a taken branch */
    uint64_t *instructions; /* of each layer */
    uint64_t layer, last, behind;
} counter;

void on_block(void *engine, uint64_t address, uint32_t size, void *user);

/* 4 bytes when the top five bits of the first half word are 11101, 11110 or 11111 */
static uint32_t instructions_in(const uint8_t *code, uint32_t size)
{
    uint32_t position = 0, count = 0;
    for (; position < size; count++) {
        position += code[position + 1] >= 0xE8 ? 4 : 2;
    }
    return count;
}

void on_block(void *engine, uint64_t address, uint32_t size, void *user)
{
    counter *const c = user;
    const uint64_t i = address >> 1;
    (void)engine;
    if (i >= c->half_words) {
        return;
    }
    if (c->entry[i] != 0) {
        c->layer = c->entry[i] - 1u;
    }
    if (c->size[i] != size) {
        c->size[i] = size;
        c->length[i] = instructions_in(c->code + address, size);
    }
    c->instructions[c->layer] += c->length[i];
    c->executed[i]++;
    c->left[c->last] += address != c->behind;
    c->last = i;
    c->behind = address + size;
}
