/* What a decoding step of a Llama-like model does besides matrix products, for float32 on a CPU.
 *
 * Compiled when first used, for this processor and one head size (HEAD). Keys are cached transposed, so that scores of
 * neighbouring positions lie side by side and need no sums across a vector. Rows are independent of each other: a row's
 * result does not depend on how many there are.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define HALF (HEAD / 2)

/* Turn one head by its position's angles (rotary embedding), scaled. */
static void turn(const float *x, const float *cosine, const float *sine, float scale, float *out) {
    for (int i = 0; i < HALF; i++) {
        out[i] = scale * (x[i] * cosine[i] - x[i + HALF] * sine[i]);
        out[i + HALF] = scale * (x[i + HALF] * cosine[i] + x[i] * sine[i]);
    }
}

/* Append one token a row to the cache and attend to all of the row's tokens.
 *
 * qkv (rows, heads + 2 kv, HEAD); keys (places, kv, HEAD, capacity); values (places, kv, capacity, HEAD);
 * place (rows): where in the cache each row is, so that a row that ended is passed over and nothing is moved;
 * cosines, sines (positions, HALF); first (rows): the first column that is no padding; column: where the token goes;
 * out (rows, heads, HEAD). Returns 0, or 1 where memory ran out: scores of long rows do not fit on a thread's stack.
 */
int attend(const float *qkv, float *keys, float *values, const float *cosines, const float *sines,
            const int64_t *place, const int64_t *first, float *out, int64_t rows, int64_t heads, int64_t kv, int64_t capacity,
            int64_t column, float scale) {
    const int64_t group = heads / kv;
    int failed = 0;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const int64_t begin = first[r], length = column + 1 - begin, own = place[r];
        const float *cosine = cosines + (column - begin) * HALF, *sine = sines + (column - begin) * HALF;
        const float *row = qkv + r * (heads + 2 * kv) * HEAD;
        float query[HEAD], turned[HEAD], *score = malloc(sizeof(float) * length);
        if (score == NULL) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        for (int64_t h = 0; h < kv; h++) {
            float *key = keys + (own * kv + h) * HEAD * capacity + column;
            float *value = values + ((own * kv + h) * capacity + column) * HEAD;
            turn(row + (heads + h) * HEAD, cosine, sine, 1.0f, turned);
            for (int i = 0; i < HEAD; i++) {
                key[i * capacity] = turned[i];
                value[i] = row[(heads + kv + h) * HEAD + i];
            }
        }
        for (int64_t h = 0; h < heads; h++) {
            const float *key = keys + (own * kv + h / group) * HEAD * capacity + begin;
            const float *value = values + ((own * kv + h / group) * capacity + begin) * HEAD;
            turn(row + h * HEAD, cosine, sine, scale, query);
            for (int64_t j = 0; j < length; j++) score[j] = query[0] * key[j];
            for (int i = 1; i < HEAD; i++)
                for (int64_t j = 0; j < length; j++) score[j] += query[i] * key[i * capacity + j];
            float highest = -FLT_MAX, total = 0.0f, sum[HEAD];
            for (int64_t j = 0; j < length; j++) highest = score[j] > highest ? score[j] : highest;
            for (int64_t j = 0; j < length; j++) {
                score[j] = expf(score[j] - highest);
                total += score[j];
            }
            for (int i = 0; i < HEAD; i++) sum[i] = 0.0f;
            for (int64_t j = 0; j < length; j++)
                for (int i = 0; i < HEAD; i++) sum[i] += score[j] * value[j * HEAD + i];
            for (int i = 0; i < HEAD; i++) out[(r * heads + h) * HEAD + i] = sum[i] / total;
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
