/* Causal attention of packed rows over themselves, forward and backward, float32 on a CPU.
 *
 * Rows are short and many; each (row, key-value head) is one piece of work for one thread. Scores of BLOCK queries are
 * computed at once against transposed keys, so that sums run along vectors. Compiled for one head size (HEAD).
 *
 * q, out (T, heads, HEAD); k, v (T, kv, HEAD); logsum (T, heads): log of each query's softmax denominator;
 * starts (rows + 1): where each row begins along T, and T itself. Both functions return 0, or 1 where memory ran out.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 4
#define LANE 32
#define ROUND(n) (((n) + LANE - 1) / LANE * LANE)

/* Keys or values of one head as (HEAD, width), the columns past the row's end zero. */
static void transpose(const float *x, int64_t stride, int64_t length, int64_t width, float *out) {
    memset(out, 0, sizeof(float) * HEAD * width);
    for (int64_t j = 0; j < length; j++)
        for (int c = 0; c < HEAD; c++) out[c * width + j] = x[j * stride + c];
}

/* out[b][j] = sum_c x[b][c] * yt[c][j] for j < columns (a multiple of LANE). */
static void products(float x[BLOCK][HEAD], const float *yt, int64_t width, int64_t columns, float *out) {
    for (int64_t j = 0; j < columns; j += LANE) {
        float sum[BLOCK][LANE] = {{0}};
        for (int c = 0; c < HEAD; c++) {
            const float *y = yt + c * width + j;
            for (int b = 0; b < BLOCK; b++)
                for (int l = 0; l < LANE; l++) sum[b][l] += x[b][c] * y[l];
        }
        for (int b = 0; b < BLOCK; b++) memcpy(out + b * width + j, sum[b], sizeof sum[b]);
    }
}

/* out[b] = sum_j w[b][j] * y[j] for j < length. */
static void weighted(const float *w, int64_t width, const float *y, int64_t stride, int64_t length,
                     float out[BLOCK][HEAD]) {
    float sum[BLOCK][HEAD] = {{0}};
    for (int64_t j = 0; j < length; j++)
        for (int b = 0; b < BLOCK; b++)
            for (int c = 0; c < HEAD; c++) sum[b][c] += w[b * width + j] * y[j * stride + c];
    memcpy(out, sum, sizeof sum);
}

/* Load BLOCK queries (zeros past the row's end), scaled. */
static void load(const float *x, int64_t stride, int64_t first, int64_t length, float scale, float out[BLOCK][HEAD]) {
    for (int b = 0; b < BLOCK; b++)
        for (int c = 0; c < HEAD; c++) out[b][c] = first + b < length ? scale * x[(first + b) * stride + c] : 0.0f;
}

int attention_forward(const float *q, const float *k, const float *v, const int64_t *starts, float *out,
                       float *logsum, int64_t rows, int64_t heads, int64_t kv, float scale) {
    const int64_t group = heads / kv;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < kv; g++) {
            const int64_t start = starts[r], length = starts[r + 1] - start, width = ROUND(length + BLOCK);
            const float *keys = k + (start * kv + g) * HEAD, *values = v + (start * kv + g) * HEAD;
            float *kt = malloc(sizeof(float) * (HEAD + BLOCK) * width), *p;
            float x[BLOCK][HEAD], o[BLOCK][HEAD];
            if (kt == NULL) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            p = kt + HEAD * width;
            transpose(keys, kv * HEAD, length, width, kt);
            for (int64_t h = g * group; h < (g + 1) * group; h++)
                for (int64_t i = 0; i < length; i += BLOCK) {
                    load(q + (start * heads + h) * HEAD, heads * HEAD, i, length, scale, x);
                    products(x, kt, width, ROUND(i + BLOCK), p);
                    for (int b = 0; b < BLOCK && i + b < length; b++) {
                        float *row = p + b * width, highest = -FLT_MAX, total = 0.0f;
                        const int64_t seen = i + b + 1;
                        for (int64_t j = 0; j < seen; j++) highest = row[j] > highest ? row[j] : highest;
                        for (int64_t j = 0; j < seen; j++) {
                            row[j] = expf(row[j] - highest);
                            total += row[j];
                        }
                        for (int64_t j = 0; j < seen; j++) row[j] /= total;
                        for (int64_t j = seen; j < i + BLOCK; j++) row[j] = 0.0f;
                        logsum[(start + i + b) * heads + h] = highest + logf(total);
                    }
                    weighted(p, width, values, kv * HEAD, i + BLOCK < length ? i + BLOCK : length, o);
                    for (int b = 0; b < BLOCK && i + b < length; b++)
                        memcpy(out + ((start + i + b) * heads + h) * HEAD, o[b], sizeof o[b]);
                }
            free(kt);
        }
    return failed;
}

int attention_backward(const float *q, const float *k, const float *v, const int64_t *starts, const float *out,
                        const float *logsum, const float *grad, float *dq, float *dk, float *dv, int64_t rows,
                        int64_t heads, int64_t kv, float scale) {
    const int64_t group = heads / kv;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < kv; g++) {
            const int64_t start = starts[r], length = starts[r + 1] - start, width = ROUND(length + BLOCK);
            const int64_t step = kv * HEAD, wide = heads * HEAD;
            const float *keys = k + (start * kv + g) * HEAD, *values = v + (start * kv + g) * HEAD;
            float *dkeys = dk + (start * kv + g) * HEAD, *dvalues = dv + (start * kv + g) * HEAD;
            float *kt = malloc(sizeof(float) * 2 * (HEAD + BLOCK) * width), *vt, *p, *ds;
            float x[BLOCK][HEAD], go[BLOCK][HEAD], d[BLOCK][HEAD];
            if (kt == NULL) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            vt = kt + HEAD * width, p = vt + HEAD * width, ds = p + BLOCK * width;
            transpose(keys, step, length, width, kt);
            transpose(values, step, length, width, vt);
            for (int64_t j = 0; j < length; j++)
                for (int c = 0; c < HEAD; c++) dkeys[j * step + c] = dvalues[j * step + c] = 0.0f;
            for (int64_t h = g * group; h < (g + 1) * group; h++)
                for (int64_t i = 0; i < length; i += BLOCK) {
                    const int64_t offset = (start * heads + h) * HEAD;
                    const int64_t last = i + BLOCK < length ? i + BLOCK : length;
                    load(q + offset, wide, i, length, scale, x);
                    load(grad + offset, wide, i, length, 1.0f, go);
                    products(x, kt, width, ROUND(i + BLOCK), p);
                    products(go, vt, width, ROUND(i + BLOCK), ds);
                    for (int b = 0; b < BLOCK; b++) {
                        float *row = p + b * width, *slope = ds + b * width, own = 0.0f;
                        const int64_t seen = i + b < length ? i + b + 1 : 0;
                        const float *o = out + offset + (i + b) * wide;
                        const float log_total = seen ? logsum[(start + i + b) * heads + h] : 0.0f;
                        for (int c = 0; c < HEAD && seen; c++) own += go[b][c] * o[c];
                        for (int64_t j = 0; j < seen; j++) {
                            row[j] = expf(row[j] - log_total);
                            slope[j] = row[j] * (slope[j] - own);
                        }
                        for (int64_t j = seen; j < last; j++) row[j] = slope[j] = 0.0f;
                    }
                    weighted(ds, width, keys, step, last, d);
                    for (int b = 0; b < BLOCK && i + b < length; b++)
                        for (int c = 0; c < HEAD; c++) dq[offset + (i + b) * wide + c] = scale * d[b][c];
                    for (int64_t j = 0; j < last; j++)
                        for (int c = 0; c < HEAD; c++) {
                            float to_key = 0.0f, to_value = 0.0f;
                            for (int b = 0; b < BLOCK; b++) {
                                to_key += ds[b * width + j] * x[b][c];  /* x holds the scale already */
                                to_value += p[b * width + j] * go[b][c];
                            }
                            dkeys[j * step + c] += to_key;
                            dvalues[j * step + c] += to_value;
                        }
                }
            free(kt);
        }
    return failed;
}
