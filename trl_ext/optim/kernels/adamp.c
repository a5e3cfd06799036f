/* AdamP's passes over float32 tensors in a CPU's memory. Where a projection is expected: `measure`, `apply`. Elsewhere:
 * `move`, which also takes AdamW's step and keeps the old weights, and `apply_to` where the test passes after all. Both
 * ways round alike, so that the expectation has no influence on the result.
 *
 * Sums run over stretches of STRETCH elements in float32, lane by lane, whose results are added in float64: in the same
 * order whatever the compiler makes of it.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define STRETCH 16384
#define NUM_LANES 16

typedef float Lanes __attribute__((vector_size(4 * NUM_LANES), aligned(4), may_alias));

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

/* One stretch within a row: updates the moments, and adds <g, w>, <g, g>, <w, w> and <u, w> to `dots`, with the weights
 * before this step. With `old`, keeps these weights there and takes the step of AdamW: w = keep * w - lr * u. */
static inline __attribute__((always_inline)) void first_pass_of_stretch(
    int64_t size, float *restrict weight, const float *restrict grad, float *restrict exp_avg,
    float *restrict exp_avg_sq, Options o, double *dots, float keep, float *restrict old)
{
    Lanes gw = {0}, gg = {0}, ww = {0}, uw = {0};
    for (int64_t start = 0; start < size; start += NUM_LANES) {
        float g_lanes[NUM_LANES] = {0}, w_lanes[NUM_LANES] = {0}, u_lanes[NUM_LANES] = {0};
        int64_t left = size - start;
        int num_lanes = left < NUM_LANES ? (int)left : NUM_LANES;
#define EACH_LANE(n)                                                                    \
        for (int lane = 0; lane < (n); ++lane) {                                        \
            int64_t i = start + lane;                                                   \
            float w = weight[i], g = o.sign * grad[i];                                  \
            float first = exp_avg[i] + o.rest1 * (g - exp_avg[i]);                      \
            float second = o.beta2 * exp_avg_sq[i] + o.rest2 * g * g;                   \
            float u = update_of(g, first, second, o);                                   \
            exp_avg[i] = first;                                                         \
            exp_avg_sq[i] = second;                                                     \
            if (old) {                                                                  \
                old[i] = w;                                                             \
                weight[i] = keep * w - o.lr * u;                                        \
            }                                                                           \
            g_lanes[lane] = g;                                                          \
            w_lanes[lane] = w;                                                          \
            u_lanes[lane] = u;                                                          \
        }
        if (num_lanes == NUM_LANES) {
            EACH_LANE(NUM_LANES)
        } else {
            EACH_LANE(num_lanes)
        }
        Lanes g = *(Lanes *)g_lanes, w = *(Lanes *)w_lanes, u = *(Lanes *)u_lanes;
        gw += g * w;
        gg += g * g;
        ww += w * w;
        uw += u * w;
    }
    for (int lane = 0; lane < NUM_LANES; ++lane) {
        dots[0] += gw[lane];
        dots[1] += gg[lane];
        dots[2] += ww[lane];
        dots[3] += uw[lane];
    }
}

/* The first element is in column `column` of its row, and `dots` of shape (num_rows, 4). */
static inline __attribute__((always_inline)) void first_pass(
    int64_t size, int64_t row_size, int64_t column, float *restrict weight, const float *restrict grad,
    float *restrict exp_avg, float *restrict exp_avg_sq, Options o, double *dots, float keep, float *restrict old)
{
    int64_t start = 0;
    while (start < size) {
        int64_t stop = smaller(smaller(start + STRETCH, size), start + row_size - column);
        first_pass_of_stretch(stop - start, weight + start, grad + start, exp_avg + start, exp_avg_sq + start, o, dots,
                              keep, old ? old + start : NULL);
        column += stop - start;
        if (column == row_size) {
            column = 0;
            dots += 4;
        }
        start = stop;
    }
}

void measure(int64_t size, int64_t row_size, int64_t column, float *restrict weight, const float *restrict grad,
             float *restrict exp_avg, float *restrict exp_avg_sq, Options o, double *dots)
{
    first_pass(size, row_size, column, weight, grad, exp_avg, exp_avg_sq, o, dots, 1.0f, NULL);
}

void move(int64_t size, int64_t row_size, int64_t column, float *restrict weight, const float *restrict grad,
          float *restrict exp_avg, float *restrict exp_avg_sq, Options o, double *dots, float keep,
          float *restrict old)
{
    first_pass(size, row_size, column, weight, grad, exp_avg, exp_avg_sq, o, dots, keep, old);
}

/* Adds up the dot products of rows in `totals`. Returns 1 where all rows pass the test for scale invariance,
 * |<g, w>| < limit |g| |w|, otherwise 2 where the whole weight does, otherwise 0. */
int test(int64_t num_rows, const double *dots, double row_limit, double whole_limit, double eps, double *totals)
{
    int rows_pass = 1;
    for (int64_t row = 0; row < num_rows; ++row, dots += 4) {
        rows_pass &= fabs(dots[0]) < row_limit * fmax(sqrt(dots[1]), eps) * fmax(sqrt(dots[2]), eps);
        for (int place = 0; place < 4; ++place) totals[place] += dots[place];
    }
    if (rows_pass) return 1;
    return fabs(totals[0]) < whole_limit * fmax(sqrt(totals[1]), eps) * fmax(sqrt(totals[2]), eps) ? 2 : 0;
}

/* w = keep * old - lr * (u - coefficient * old), with one coefficient for each row */
static inline __attribute__((always_inline)) void second_pass(
    int64_t size, int64_t row_size, int64_t column, float *weight, const float *old, const float *restrict grad,
    const float *restrict exp_avg, const float *restrict exp_avg_sq, Options o, float keep, const float *coefficient)
{
    int64_t start = 0;
    while (start < size) {
        int64_t stop = smaller(size, start + row_size - column);
        float radial = *coefficient;
        for (int64_t i = start; i < stop; ++i) {
            float g = o.nesterov ? o.sign * grad[i] : 0.0f, w = old[i];
            float update = update_of(g, exp_avg[i], exp_avg_sq[i], o) - radial * w;
            weight[i] = keep * w - o.lr * update;
        }
        column = 0;
        ++coefficient;
        start = stop;
    }
}

void apply(int64_t size, int64_t row_size, int64_t column, float *restrict weight, const float *restrict grad,
           const float *restrict exp_avg, const float *restrict exp_avg_sq, Options o, float keep,
           const float *coefficient)
{
    second_pass(size, row_size, column, weight, weight, grad, exp_avg, exp_avg_sq, o, keep, coefficient);
}

void apply_to(int64_t size, int64_t row_size, int64_t column, float *restrict weight, const float *restrict grad,
              const float *restrict exp_avg, const float *restrict exp_avg_sq, Options o, float keep,
              const float *restrict old, const float *coefficient)
{
    second_pass(size, row_size, column, weight, old, grad, exp_avg, exp_avg_sq, o, keep, coefficient);
}
