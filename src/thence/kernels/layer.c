/* What a layer of a Llama-like model does besides matrix products and attention, forward and backward, float32 on a CPU.
 *
 * torch makes five to ten passes over memory for each of these; here it is one. Compiled for one head size (HEAD).
 */
#include <math.h>
#include <stdint.h>

#define HALF (HEAD / 2)

/* The logistic function. Its exponent is bounded: compiled for speed, a division by infinity may give NaN. */
static inline float logistic(float x) {
    const float y = -x < 80.0f ? -x : 80.0f;
    return 1.0f / (1.0f + expf(y));
}

/* Root-mean-square norm: x, y (rows, width); weight (width); inverse (rows): one over each row's root mean square. */
void norm_forward(const float *x, const float *weight, float *y, float *inverse, int64_t rows, int64_t width,
                  float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * width;
        float *out = y + r * width, sum = 0.0f;
        for (int64_t i = 0; i < width; i++) sum += row[i] * row[i];
        const float scale = 1.0f / sqrtf(sum / (float)width + eps);
        for (int64_t i = 0; i < width; i++) out[i] = weight[i] * (scale * row[i]);
        inverse[r] = scale;
    }
}

/* Its gradient: dx (rows, width); dweight (parts, width), zeros at first, to be added up over parts: each part has its
 * own rows, so that the sum does not depend on the number of threads. */
void norm_backward(const float *x, const float *weight, const float *inverse, const float *grad, float *dx,
                   float *dweight, int64_t rows, int64_t width, int64_t parts) {
    const int64_t size = (rows + parts - 1) / parts;
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        float *dw = dweight + part * width;
        const int64_t stop = (part + 1) * size < rows ? (part + 1) * size : rows;
        for (int64_t r = part * size; r < stop; r++) {
            const float *row = x + r * width, *g = grad + r * width, scale = inverse[r];
            float *d = dx + r * width, dot = 0.0f;
            for (int64_t i = 0; i < width; i++) dot += weight[i] * g[i] * row[i];
            const float pull = dot * scale * scale * scale / (float)width;
            for (int64_t i = 0; i < width; i++) {
                d[i] = scale * weight[i] * g[i] - pull * row[i];
                dw[i] += scale * g[i] * row[i];
            }
        }
    }
}

/* silu(gate) * up, of n numbers each. */
void gate_forward(const float *gate, const float *up, float *out, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) out[i] = gate[i] * logistic(gate[i]) * up[i];
}

/* Its gradient. */
void gate_backward(const float *gate, const float *up, const float *grad, float *dgate, float *dup, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float share = logistic(gate[i]);
        dgate[i] = grad[i] * up[i] * (share * (1.0f + gate[i] * (1.0f - share)));
        dup[i] = grad[i] * (gate[i] * share);
    }
}

/* Rotary embedding: x, out (tokens, heads, HEAD) turned by cosine, sine (tokens, HEAD), whose halves are equal.
 * way 1 turns, -1 turns back, which is the gradient. */
void turn_heads(const float *x, const float *cosine, const float *sine, float *out, int64_t tokens, int64_t heads,
                float way) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cosine + t * HEAD, *s = sine + t * HEAD;
        for (int64_t h = 0; h < heads; h++) {
            const float *from = x + (t * heads + h) * HEAD;
            float *to = out + (t * heads + h) * HEAD;
            for (int i = 0; i < HALF; i++) {
                to[i] = from[i] * c[i] - way * s[i] * from[i + HALF];
                to[i + HALF] = from[i + HALF] * c[i] + way * s[i] * from[i];
            }
        }
    }
}
