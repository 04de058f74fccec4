/* What a decoding step of a Llama-like model does besides matrix products, for float32 on a CPU.
 *
 * Compiled when first used, for this processor and one head size (HEAD). Keys are cached transposed, in blocks
 * of LANE, so that scores of neighbouring positions lie side by side and need no sums across a vector. Rows are independent of each other: a row's
 * result does not depend on how many there are.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define HALF (HEAD / 2)
#define LANE 16

/* Turn one head by its position's angles (rotary embedding), scaled. */
static void turn(const float *x, const float *cosine, const float *sine, float scale, float *out) {
    for (int i = 0; i < HALF; i++) {
        out[i] = scale * (x[i] * cosine[i] - x[i + HALF] * sine[i]);
        out[i + HALF] = scale * (x[i + HALF] * cosine[i] + x[i] * sine[i]);
    }
}

/* score[j] = query . key j for blocks of LANE keys; key (blocks, HEAD, LANE). */
static void products(const float *query, const float *key, int64_t blocks, float *score) {
    for (int64_t b = 0; b < blocks; b++, key += HEAD * LANE) {
        float sum[LANE] = {0};
        for (int i = 0; i < HEAD; i++)
            for (int l = 0; l < LANE; l++) sum[l] += query[i] * key[i * LANE + l];
        for (int l = 0; l < LANE; l++) score[b * LANE + l] = sum[l];
    }
}

/* Ask for n floats that are read soon: the cache of many rows is larger than the processor's. */
static void fetch(const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

/* out = sum over j < length of share[j] * value[j], over total; even and odd j apart, so that sums need not wait. */
static void weighted(const float *share, const float *value, int64_t length, float total, float *out) {
    float even[HEAD] = {0}, odd[HEAD] = {0};
    for (int64_t j = 0; j + 1 < length; j += 2)
        for (int i = 0; i < HEAD; i++) {
            even[i] += share[j] * value[j * HEAD + i];
            odd[i] += share[j + 1] * value[(j + 1) * HEAD + i];
        }
    if (length % 2)
        for (int i = 0; i < HEAD; i++) even[i] += share[length - 1] * value[(length - 1) * HEAD + i];
    for (int i = 0; i < HEAD; i++) out[i] = (even[i] + odd[i]) / total;
}

/* Append one token a row to the cache and attend to all of the row's tokens.
 *
 * qkv (rows, heads + 2 kv, HEAD); keys (places, kv, blocks, HEAD, LANE): columns in blocks of LANE, transposed;
 * values (places, kv, blocks * LANE, HEAD); place (rows): where in the cache each row is, so that a row that ended is
 * passed over and nothing is moved; cosines, sines (positions, HALF); first (rows): the first column that is no padding;
 * column: where the token goes; out (rows, heads, HEAD). Returns 0, or 1 where memory ran out: scores of long rows do not
 * fit on a thread's stack.
 */
int attend(const float *qkv, float *keys, float *values, const float *cosines, const float *sines,
            const int64_t *place, const int64_t *first, float *out, int64_t rows, int64_t heads, int64_t kv,
            int64_t blocks, int64_t column, float scale) {
    const int64_t group = heads / kv, size = blocks * LANE * HEAD, now = column / LANE;
    int failed = 0;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const int64_t begin = first[r], length = column + 1 - begin, skip = begin % LANE, from = begin / LANE;
        const int64_t next = place[r + 1 < rows ? r + 1 : r] * kv;
        const float *cosine = cosines + (column - begin) * HALF, *sine = sines + (column - begin) * HALF;
        const float *row = qkv + r * (heads + 2 * kv) * HEAD;
        float query[HEAD], turned[HEAD], *score = malloc(sizeof(float) * LANE * (now - from + 1));
        if (score == NULL) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        for (int64_t g = 0; g < kv; g++) {
            float *key = keys + (place[r] * kv + g) * size, *value = values + (place[r] * kv + g) * size;
            const int64_t after = (g + 1 < kv ? place[r] * kv + g + 1 : next) * size;
            fetch(keys + after + from * HEAD * LANE, (now - from + 1) * HEAD * LANE);
            fetch(values + after + begin * HEAD, length * HEAD);
            turn(row + (heads + g) * HEAD, cosine, sine, 1.0f, turned);
            for (int i = 0; i < HEAD; i++) {
                key[(now * HEAD + i) * LANE + column % LANE] = turned[i];
                value[column * HEAD + i] = row[(heads + kv + g) * HEAD + i];
            }
            for (int64_t h = g * group; h < (g + 1) * group; h++) {
                float highest = -FLT_MAX, total = 0.0f, *seen = score + skip;
                turn(row + h * HEAD, cosine, sine, scale, query);
                products(query, key + from * HEAD * LANE, now - from + 1, score);
                for (int64_t j = 0; j < length; j++) highest = seen[j] > highest ? seen[j] : highest;
                for (int64_t j = 0; j < length; j++) {
                    seen[j] = expf(seen[j] - highest);
                    total += seen[j];
                }
                weighted(seen, value + begin * HEAD, length, total, out + (r * heads + h) * HEAD);
            }
        }
        free(score);
    }
    return failed;
}

/* Root-mean-square norm without weights: x, out (rows, width). */
void rms_norm(const float *x, float *out, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * width;
        float sum = 0.0f;
        for (int64_t i = 0; i < width; i++) sum += row[i] * row[i];
        const float scale = 1.0f / sqrtf(sum / (float)width + eps);
        for (int64_t i = 0; i < width; i++) out[r * width + i] = scale * row[i];
    }
}

/* SwiGLU: gate_up (rows, 2 width), gate first; out (rows, width) = silu(gate) * up.
 * The exponent is bounded: compiled for speed, a division by infinity may give NaN. */
void swiglu(const float *gate_up, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = gate_up + 2 * r * width, *up = gate + width;
        for (int64_t i = 0; i < width; i++) {
            const float power = -gate[i] < 80.0f ? -gate[i] : 80.0f;
            out[r * width + i] = gate[i] / (1.0f + expf(power)) * up[i];
        }
    }
}
