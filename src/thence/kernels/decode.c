/* A decoding step of a Llama-like model, for float32 on a CPU: its attention, norms and gates for models whose matrix
 * products torch does, and the whole step for models that fit the processor's caches.
 *
 * Compiled when first used, for this processor and one head size (HEAD). The cache holds blocks of LANE columns; a block has
 * all key-value heads of a row, keys transposed, so that scores of neighbouring columns lie side by side, and a row's
 * cache is read from front to back. Rows are independent of each other: a row's result does not depend on how many there
 * are, nor on the number of threads.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HALF (HEAD / 2)
#define LANE 16
#define SIZE (LANE * HEAD) /* floats of a block's keys or values of one head */

/* A matrix product's tile: TALL rows times two vectors of WIDE columns fill the processor's vector registers. */
#if defined(__AVX512F__)
#define WIDE 16
#define TALL 8
#elif defined(__AVX__)
#define WIDE 8
#define TALL 4
#else
#define WIDE 4
#define TALL 4
#endif
#define PANEL (2 * WIDE)
typedef float vector __attribute__((vector_size(4 * WIDE), aligned(4)));

/* Turn one head by its position's angles (rotary embedding), scaled. */
static void turn(const float *restrict x, const float *restrict cosine, const float *restrict sine, float scale,
                 float *restrict out) {
    for (int i = 0; i < HALF; i++) {
        out[i] = scale * (x[i] * cosine[i] - x[i + HALF] * sine[i]);
        out[i + HALF] = scale * (x[i + HALF] * cosine[i] + x[i] * sine[i]);
    }
}

/* score[l] = query . key l of one block; key (HEAD, LANE). Two sums, so that one need not wait for the other. */
static void products(const float *restrict query, const float *restrict key, float *restrict score) {
    float low[LANE] = {0}, high[LANE] = {0};
    for (int i = 0; i < HALF; i++)
        for (int l = 0; l < LANE; l++) {
            low[l] += query[i] * key[i * LANE + l];
            high[l] += query[i + HALF] * key[(i + HALF) * LANE + l];
        }
    for (int l = 0; l < LANE; l++) score[l] = low[l] + high[l];
}

/* Scores of whole blocks to shares, where only columns from begin to before end count; the others get none.
 * They take a score that counts meanwhile: all loops run over whole blocks, and a NaN that counts is not passed over. */
static void softmax(float *score, int64_t begin, int64_t end, int64_t columns) {
    float highest = score[begin], total = 0.0f;
    for (int64_t j = 0; j < begin; j++) score[j] = highest;
    for (int64_t j = end; j < columns; j++) score[j] = highest;
    for (int64_t j = 0; j < columns; j++) highest = score[j] > highest ? score[j] : highest;
    for (int64_t j = 0; j < columns; j++) score[j] = expf(score[j] - highest);
    for (int64_t j = 0; j < begin; j++) score[j] = 0.0f;
    for (int64_t j = end; j < columns; j++) score[j] = 0.0f;
    for (int64_t j = 0; j < columns; j++) total += score[j];
    total = 1.0f / total;
    for (int64_t j = 0; j < columns; j++) score[j] *= total;
}

/* out += sum over columns begin to before end of a block of share * value; even and odd ones apart. */
static void weighted(const float *restrict share, const float *restrict value, int64_t begin, int64_t end, float *restrict out) {
    float even[HEAD] = {0}, odd[HEAD] = {0};
    int64_t j = begin;
    for (; j + 1 < end; j += 2)
        for (int i = 0; i < HEAD; i++) {
            even[i] += share[j] * value[j * HEAD + i];
            odd[i] += share[j + 1] * value[(j + 1) * HEAD + i];
        }
    if (j < end)
        for (int i = 0; i < HEAD; i++) even[i] += share[j] * value[j * HEAD + i];
    for (int i = 0; i < HEAD; i++) out[i] += even[i] + odd[i];
}

/* The cache of one layer and what its rows share. */
struct cache {
    float *keys, *values;          /* (places, blocks, kv, HEAD, LANE) and (places, blocks, kv, LANE, HEAD) */
    const float *cosines, *sines;  /* (positions, HALF) */
    const int64_t *place, *first;  /* (rows): where a row is, so that nothing moves when others end; its first column
                                      that is no padding */
    int64_t heads, kv, blocks, column; /* column: where the token goes */
    float scale;
};

/* Floats of working space that attend_row needs. */
static int64_t room(const struct cache *c) { return c->heads * (HEAD + LANE * (c->column / LANE + 1)); }

/* Append one token of row r to the cache and attend to all of the row. qkv (heads + 2 kv, HEAD); out (heads, HEAD). */
static void attend_row(const struct cache *c, int64_t r, const float *qkv, float *work, float *out) {
    const int64_t group = c->heads / c->kv, begin = c->first[r], from = begin / LANE, now = c->column / LANE;
    const int64_t columns = (now - from + 1) * LANE, skip = begin % LANE, end = c->column + 1 - from * LANE;
    const float *cosine = c->cosines + (c->column - begin) * HALF, *sine = c->sines + (c->column - begin) * HALF;
    float *keys = c->keys + c->place[r] * c->blocks * c->kv * SIZE;
    float *values = c->values + c->place[r] * c->blocks * c->kv * SIZE;
    float *query = work, *score = work + c->heads * HEAD, turned[HEAD];
    for (int64_t g = 0; g < c->kv; g++) {
        float *key = keys + (now * c->kv + g) * SIZE, *value = values + (now * c->kv + g) * SIZE;
        turn(qkv + (c->heads + g) * HEAD, cosine, sine, 1.0f, turned);
        for (int i = 0; i < HEAD; i++) key[i * LANE + c->column % LANE] = turned[i];
        memcpy(value + c->column % LANE * HEAD, qkv + (c->heads + c->kv + g) * HEAD, sizeof(turned));
    }
    for (int64_t h = 0; h < c->heads; h++) turn(qkv + h * HEAD, cosine, sine, c->scale, query + h * HEAD);
    for (int64_t b = from; b <= now; b++)
        for (int64_t h = 0; h < c->heads; h++)
            products(query + h * HEAD, keys + (b * c->kv + h / group) * SIZE, score + h * columns + (b - from) * LANE);
    for (int64_t h = 0; h < c->heads; h++) softmax(score + h * columns, skip, end, columns);
    memset(out, 0, sizeof(float) * c->heads * HEAD);
    for (int64_t b = from; b <= now; b++) {
        const int64_t before = (b - from) * LANE, least = b == from ? skip : 0;
        const int64_t most = end - before < LANE ? end - before : LANE;
        for (int64_t h = 0; h < c->heads; h++) {
            const float *value = values + (b * c->kv + h / group) * SIZE;
            weighted(score + h * columns + before, value, least, most, out + h * HEAD);
        }
    }
}

/* attend_row for all rows: qkv (rows, heads + 2 kv, HEAD); out (rows, heads, HEAD). Returns 0, or 1: memory ran out. */
int attend(const struct cache *c, const float *qkv, float *out, int64_t rows) {
    int failed = 0;
#pragma omp parallel
    {
        float *work = malloc(sizeof(float) * room(c));
        if (work == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            if (work != NULL)
                attend_row(c, r, qkv + r * (c->heads + 2 * c->kv) * HEAD, work, out + r * c->heads * HEAD);
        free(work);
    }
    return failed;
}

static void norm_row(const float *row, int64_t width, float eps, float *out) {
    float sum = 0.0f;
    for (int64_t i = 0; i < width; i++) sum += row[i] * row[i];
    const float scale = 1.0f / sqrtf(sum / (float)width + eps);
    for (int64_t i = 0; i < width; i++) out[i] = scale * row[i];
}

/* The exponent is bounded: compiled for speed, a division by infinity may give NaN. */
static void gate_row(const float *gate, const float *up, int64_t width, float *out) {
    for (int64_t i = 0; i < width; i++) {
        const float power = -gate[i] < 80.0f ? -gate[i] : 80.0f;
        out[i] = gate[i] / (1.0f + expf(power)) * up[i];
    }
}

/* Root-mean-square norm without weights: x, out (rows, width). */
void rms_norm(const float *x, float *out, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) norm_row(x + r * width, width, eps, out + r * width);
}

/* SwiGLU: gate_up (rows, 2 width), gate first; out (rows, width) = silu(gate) * up. */
void swiglu(const float *gate_up, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        gate_row(gate_up + 2 * r * width, gate_up + (2 * r + 1) * width, width, out + r * width);
}

/* Columns and rows of a tile: a matrix is filled up with zeros to whole panels. */
int64_t panel(void) { return PANEL; }
int64_t tile(void) { return TALL; }

static int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* out (rows, stride) = x (rows, x_stride) times a matrix in panels (columns / PANEL, depth, PANEL), on top of what is
 * there where `add`. Rows are whole tiles. A row's sums run in one order, whatever the tile. */
static void multiply(const float *x, int64_t x_stride, const float *panels, int64_t depth, int64_t columns, float *out,
                     int64_t stride, int64_t rows, int add) {
    for (int64_t n = 0; n < columns; n += PANEL, panels += depth * PANEL)
        for (int64_t r = 0; r < rows; r += TALL) {
            vector sum[TALL][2];
            memset(sum, 0, sizeof(sum));
            for (int64_t k = 0; k < depth; k++) {
                const vector left = *(const vector *)(panels + k * PANEL);
                const vector right = *(const vector *)(panels + k * PANEL + WIDE);
                for (int i = 0; i < TALL; i++) {
                    sum[i][0] += x[(r + i) * x_stride + k] * left;
                    sum[i][1] += x[(r + i) * x_stride + k] * right;
                }
            }
            for (int i = 0; i < TALL; i++)
                for (int side = 0; side < 2; side++) {
                    vector *to = (vector *)(out + (r + i) * stride + n + side * WIDE);
                    *to = add ? *to + sum[i][side] : sum[i][side];
                }
        }
}

/* A layer's matrices in panels; norms' weights are multiplied into them. */
struct layer {
    const float *qkv, *bias, *out, *gate_up, *down; /* bias: (heads + 2 kv) * HEAD, or NULL */
    float *keys, *values;
};

struct model {
    const struct layer *layers;
    const float *embedding, *head; /* (vocabulary, width), and the output layer in panels */
    int64_t depth, width, inner, vocabulary, embedded; /* embedded: rows of the embedding */
    float eps;
};

/* The whole step of some rows, all layers. token (rows); logits (rows, vocabulary up to PANEL). work: see `step`. */
static void step_rows(const struct model *m, struct cache c, const int64_t *token, int64_t begin, int64_t rows,
                      float *work, float *logits) {
    const int64_t tall = up_to(rows, TALL), heads = c.heads * HEAD, wide = up_to(m->width, PANEL);
    const int64_t qkv_wide = up_to(heads + 2 * c.kv * HEAD, PANEL), gates = up_to(2 * m->inner, PANEL);
    float *x = work, *normed = x + tall * wide, *qkv = normed + tall * wide, *attended = qkv + tall * qkv_wide;
    float *gate_up = attended + tall * heads, *gated = gate_up + tall * gates, *rest = gated + tall * m->inner;
    memset(work, 0, sizeof(float) * (rest - work));
    for (int64_t r = 0; r < rows; r++)
        memcpy(x + r * wide, m->embedding + token[begin + r] * m->width, sizeof(float) * m->width);
    for (int64_t l = 0; l < m->depth; l++) {
        const struct layer *now = m->layers + l;
        c.keys = now->keys;
        c.values = now->values;
        for (int64_t r = 0; r < rows; r++) norm_row(x + r * wide, m->width, m->eps, normed + r * wide);
        multiply(normed, wide, now->qkv, m->width, qkv_wide, qkv, qkv_wide, tall, 0);
        for (int64_t r = 0; r < rows; r++) {
            float *row = qkv + r * qkv_wide;
            if (now->bias != NULL)
                for (int64_t i = 0; i < heads + 2 * c.kv * HEAD; i++) row[i] += now->bias[i];
            attend_row(&c, begin + r, row, rest, attended + r * heads);
        }
        multiply(attended, heads, now->out, heads, wide, x, wide, tall, 1);
        for (int64_t r = 0; r < rows; r++) norm_row(x + r * wide, m->width, m->eps, normed + r * wide);
        multiply(normed, wide, now->gate_up, m->width, gates, gate_up, gates, tall, 0);
        for (int64_t r = 0; r < rows; r++)
            gate_row(gate_up + r * gates, gate_up + r * gates + m->inner, m->inner, gated + r * m->inner);
        multiply(gated, m->inner, now->down, m->inner, wide, x, wide, tall, 1);
    }
    for (int64_t r = 0; r < rows; r++) norm_row(x + r * wide, m->width, m->eps, normed + r * wide);
    multiply(normed, wide, m->head, m->width, up_to(m->vocabulary, PANEL), logits, up_to(m->vocabulary, PANEL), tall, 0);
}

/* One token for every row through all layers. A thread takes `block` rows at a time, whole tiles, so that one whose core
 * is busy takes fewer. logits (rows + TALL, vocabulary up to PANEL). Returns 0, or 1: memory ran out, 2: a token has
 * no embedding. */
int step(const struct model *m, const struct cache *c, const int64_t *token, float *logits, int64_t rows, int64_t block) {
    const int64_t wide = up_to(m->width, PANEL), heads = c->heads * HEAD, tall = up_to(block, TALL);
    const int64_t each = 2 * wide + up_to(heads + 2 * c->kv * HEAD, PANEL) + heads + up_to(2 * m->inner, PANEL) + m->inner;
    int failed = 0;
    for (int64_t r = 0; r < rows; r++)
        if (token[r] < 0 || token[r] >= m->embedded) return 2;
#pragma omp parallel
    {
        float *work = malloc(sizeof(float) * (tall * each + room(c)));
        if (work == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t begin = 0; begin < rows; begin += block)
            if (work != NULL) {
                const int64_t these = rows - begin < block ? rows - begin : block;
                step_rows(m, *c, token, begin, these, work, logits + begin * up_to(m->vocabulary, PANEL));
            }
        free(work);
    }
    return failed;
}
