/* Value and gradient of the alpha-beta-divergence for rows of logits, in one visit of each row; docs/kernels.md, (K1)-(K3).
 *
 * p is the teacher, q the student, s = alpha + beta; everything is in logarithms of base 2 until the last step.
 *     w_k = q^beta (p^alpha - q^alpha) / alpha,   v_k = p^alpha (p^beta - q^beta) / beta
 *     D = sum_k (v_k - w_k) / s,   dD/dz_k = (q_k sum_j w_j - w_k) / T
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

static const float LN2 = 0.69314718056f, LOG2E = 1.44269504089f;

/* 2^x for |x| < 2^31, any number for NaN; relative error below 2.5e-7; held at 2^-126 below and at 2^127 above. The polynomial is a least-squares
 * fit on [-1/2, 1/2]; the whole part goes into the exponent's bits, held there because integers have a minimum in vectors. */
static inline float exp2_fast(float x) {
    float n = rintf(x), r = x - n, power, y = 0.001326697038665406f;
    y = y * r + 0.009675459745527012f;
    y = y * r + 0.05550742616001791f;
    y = y * r + 0.24022121753561543f;
    y = y * r + 0.693146949161063f;
    y = y * r + 1.000000071029699f;
    int32_t exponent = (int32_t)n, bits;
    exponent = exponent < -126 ? -126 : exponent;
    exponent = exponent > 127 ? 127 : exponent;
    memcpy(&bits, &y, 4);
    bits += exponent << 23;
    memcpy(&power, &bits, 4);
    return power;
}

/* (e^t - 1) / t for |t| <= 1/2, where the difference of two powers would cancel. */
static inline float expm1_ratio(float t) {
    float y = 1.f / 5040;
    y = y * t + 1.f / 720;
    y = y * t + 1.f / 120;
    y = y * t + 1.f / 24;
    y = y * t + 1.f / 6;
    y = y * t + 1.f / 2;
    return y * t + 1.f;
}

/* The largest of sign x. In lanes of 16, which a compiler turns into vectors. */
static float largest(const float *x, int64_t n, float sign) {
    float high[16];
    for (int j = 0; j < 16; j++) high[j] = -INFINITY;
    int64_t k = 0;
    for (; k + 16 <= n; k += 16)
        for (int j = 0; j < 16; j++) high[j] = sign * x[k + j] > high[j] ? sign * x[k + j] : high[j];
    for (; k < n; k++) high[0] = sign * x[k] > high[0] ? sign * x[k] : high[0];
    for (int j = 0; j < 16; j++) high[0] = high[j] > high[0] ? high[j] : high[0];
    return high[0];
}

/* Student and teacher `[rows, vocab]`, on num_threads threads. Writes weight * dD/dz (and, where ce_weight is given, ce_weight
 * times the gradient of the cross-entropy with label) over student; uses teacher as scratch. Returns the number of rows
 * that it leaves out: with a logit at -inf or NaN, or a power too large. alpha and beta may be 0, alpha + beta may not. */
int64_t alpha_beta_rows(float *student, float *teacher, const float *weight, const float *ce_weight, const int64_t *label,
                        float *divergence, float *entropy, float *cross_entropy, int64_t rows, int64_t vocab,
                        int64_t num_threads, float alpha, float beta, float student_scale, float teacher_scale) {
    const float s = alpha + beta, per_alpha = alpha == 0 ? 0 : 1 / alpha, per_beta = beta == 0 ? 0 : 1 / beta;
    const float scale_s = student_scale * LOG2E, scale_t = teacher_scale * LOG2E;
    const float rising = alpha < 0 || beta < 0 || s < 0 ? fabsf(alpha) + fabsf(beta) : 0;
    int64_t skipped = 0;
#pragma omp parallel for num_threads(num_threads) reduction(+ : skipped)
    for (int64_t row = 0; row < rows; row++) {
        float *x = student + row * vocab, *y = teacher + row * vocab;
        float sum_x = 0, sum_y = 0;
        const float max_x = largest(x, vocab, 1), max_y = largest(y, vocab, 1);
        if (rising > 0) { /* a power with a negative exponent grows towards the lowest logits */
            const float range_x = max_x + largest(x, vocab, -1), range_y = max_y + largest(y, vocab, -1);
            if (!(rising * (range_x * scale_s + range_y * scale_t) < 1e9f)) {
                skipped++;
                continue;
            }
        }
        for (int64_t k = 0; k < vocab; k++) {
            sum_x += exp2_fast((x[k] - max_x) * scale_s);
            sum_y += exp2_fast((y[k] - max_y) * scale_t);
        }
        const float log_x = log2f(sum_x), log_y = log2f(sum_y);
        float sum_w = 0, sum_d = 0, sum_h = 0;
        float ce = ce_weight ? LN2 * (log_x - (x[label[row]] - max_x) * scale_s) : 0;
        for (int64_t k = 0; k < vocab; k++) {
            float log_q = (x[k] - max_x) * scale_s - log_x, log_p = (y[k] - max_y) * scale_t - log_y;
            float u = (log_p - log_q) * LN2, au = alpha * u, bu = -beta * u;
            float q_s = exp2_fast(s * log_q), p_s = exp2_fast(s * log_p);
            float mixed = exp2_fast(alpha * log_p + beta * log_q), q = exp2_fast(log_q);
            float w = fabsf(au) < 0.5f ? q_s * u * expm1_ratio(au) : (mixed - q_s) * per_alpha;
            float v = fabsf(bu) < 0.5f ? p_s * u * expm1_ratio(bu) : (p_s - mixed) * per_beta;
            sum_w += w;
            sum_d += v - w + 0 * u; /* NaN where u is not finite, which the powers do not show */
            sum_h -= q * log_q;
            x[k] = q;
            y[k] = w;
        }
        if (!(fabsf(sum_d) < 1e36f)) {
            skipped++;
            continue;
        }
        const float c = ce_weight ? ce_weight[row] : 0, scale = weight[row] * student_scale, on_q = scale * sum_w + c;
        for (int64_t k = 0; k < vocab; k++) x[k] = on_q * x[k] - scale * y[k];
        if (ce_weight) {
            x[label[row]] -= c;
            cross_entropy[row] = ce;
        }
        divergence[row] = sum_d / s;
        entropy[row] = LN2 * sum_h;
    }
    return skipped;
}
