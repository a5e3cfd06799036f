/* The two passes of a projected AdamP step, and the dot products of its test, on float32 tensors in a CPU's memory.
 *
 * Sums run over stretches of STRETCH elements in float32, whose results are added in float64.
 */
#include <math.h>
#include <stdint.h>

#define STRETCH 4096

typedef struct {
    float beta1, beta2, rest1, rest2, eps, inverse_root_correction2, inverse_correction1, sign, lr;
    int32_t nesterov;
} Options;

static inline float update_of(float grad, float first, float second, Options o)
{
    float momentum = o.nesterov ? o.beta1 * first + o.rest1 * grad : first;
    return momentum / (sqrtf(second) * o.inverse_root_correction2 + o.eps) * o.inverse_correction1;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* <g, w>, <g, g>, <w, w> */
void test_dots(int64_t size, const float *restrict weight, const float *restrict grad, double *dots)
{
    for (int64_t start = 0; start < size; start += STRETCH) {
        int64_t stop = smaller(start + STRETCH, size);
        float gw = 0, gg = 0, ww = 0;
        for (int64_t i = start; i < stop; ++i) {
            float w = weight[i], g = grad[i];
            gw += g * w;
            gg += g * g;
            ww += w * w;
        }
        dots[0] += gw;
        dots[1] += gg;
        dots[2] += ww;
    }
}

/* Updates the moments, and adds to `dots`, of shape (num_rows, 4), each row's <g, w>, <g, g>, <w, w> and <u, w>.
 * The first element is in column `column` of its row. */
void measure(int64_t size, int64_t row_size, int64_t column, const float *restrict weight, const float *restrict grad,
             float *restrict exp_avg, float *restrict exp_avg_sq, Options o, double *dots)
{
    int64_t start = 0;
    while (start < size) {
        int64_t stop = smaller(smaller(start + STRETCH, size), start + row_size - column);
        float gw = 0, gg = 0, ww = 0, uw = 0;
        for (int64_t i = start; i < stop; ++i) {
            float w = weight[i], g = o.sign * grad[i];
            float first = exp_avg[i] + o.rest1 * (g - exp_avg[i]);
            float second = o.beta2 * exp_avg_sq[i] + o.rest2 * g * g;
            exp_avg[i] = first;
            exp_avg_sq[i] = second;
            gw += g * w;
            gg += g * g;
            ww += w * w;
            uw += update_of(g, first, second, o) * w;
        }
        dots[0] += gw;
        dots[1] += gg;
        dots[2] += ww;
        dots[3] += uw;
        column += stop - start;
        if (column == row_size) {
            column = 0;
            dots += 4;
        }
        start = stop;
    }
}

/* w = scale * w - lr * (u - coefficient * w), with one coefficient for each row */
void apply(int64_t size, int64_t row_size, int64_t column, float *restrict weight, const float *restrict grad,
           const float *restrict exp_avg, const float *restrict exp_avg_sq, Options o, const float *scale,
           const float *coefficient)
{
    int64_t start = 0;
    while (start < size) {
        int64_t stop = smaller(size, start + row_size - column);
        float keep = *scale, radial = *coefficient;
        for (int64_t i = start; i < stop; ++i) {
            float g = o.nesterov ? o.sign * grad[i] : 0.0f;
            float update = update_of(g, exp_avg[i], exp_avg_sq[i], o) - radial * weight[i];
            float kept = keep * weight[i];
            weight[i] = kept - o.lr * update;
        }
        column = 0;
        ++coefficient;
        start = stop;
    }
}
