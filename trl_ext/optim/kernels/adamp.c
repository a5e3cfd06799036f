/* AdamP's passes over tensors in a CPU's memory: weights and gradients in float32 or bfloat16, running averages and
 * arithmetic in float32. `adamp_update_weights` takes the whole step of weights that one process holds whole; the other
 * functions of that name are its parts, for weights that threads or processes share.
 *
 * A weight that the last step did not project is tested first, from gradient and weight alone, and takes AdamW's step
 * if the test fails. Elsewhere the first pass updates the moments and adds up the dot products, and the second applies
 * decay and the projected update. All ways round alike, so that the guess has no influence on the result.
 *
 * Sums run over stretches of STRETCH elements of a row in float32, lane by lane, whose results are added in float64: in
 * the same order whatever the compiler makes of it, and however long the processor's vectors are. What does not lie within the lengths that a caller gives is refused
 * before anything is read or written.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define STRETCH 16384
#define NUM_LANES 16
/* Rows shorter than this are worked on together, BLOCK elements at a time */
#define SHORT_ROW 128
#define BLOCK 1024

enum { NONE, CHANNEL, LAYER, TEST };
enum { DONE, DOES_NOT_FIT = -1 };

/* Vectors no longer than the processor's: of longer ones compilers keep the pieces in memory */
#if defined(__AVX512F__)
#define VECTOR 16
#elif defined(__AVX__)
#define VECTOR 8
#else
#define VECTOR 4
#endif
#define NUM_VECTORS (NUM_LANES / VECTOR)

typedef float Vector __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef uint16_t HalfWords __attribute__((vector_size(2 * VECTOR), aligned(2), may_alias));
typedef struct {
    Vector of[NUM_VECTORS];
} Lanes;
typedef struct {
    double of[NUM_LANES];
} Sums;

typedef struct {
    double norm_eps, delta;
    float beta1, beta2, rest1, rest2, eps, inverse_root_correction2, inverse_correction1, sign, lr;
    float keep, keep_projected; /* What decay leaves of a weight */
    int32_t nesterov, rounds_at_random;
    uint32_t seed;
} Options;

typedef struct {
    void *memory;
    int64_t length; /* Elements that lie there */
} Span;

/* Elements [start, start + size) of a tensor, the first of which is in column `column` of its row, and in the place
 * `offset` of its weight */
typedef struct {
    Span weight, grad, exp_avg, exp_avg_sq;
    int64_t start, size, row_size, column, offset;
    int64_t level, expected, is_half, options;
} Part;

static int fits(const Part *p)
{
    const Span *spans = &p->weight;
    for (int place = 0; place < 4; ++place) {
        uintptr_t alignment = place < 2 && p->is_half ? 2 : 4;
        if (!spans[place].memory || (uintptr_t)spans[place].memory % alignment) return 0;
        if (p->size > spans[place].length || p->start > spans[place].length - p->size) return 0;
    }
    return p->start >= 0 && p->size > 0 && p->row_size > 0 && p->column >= 0 && p->column < p->row_size;
}

static int is_whole(const Part *p) { return p->column == 0 && p->size % p->row_size == 0; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ------------------------------------------------------------------ values */

#define INLINE static inline __attribute__((always_inline))

INLINE const void *element(const void *memory, int64_t i, int is_half)
{
    return (const char *)memory + i * (is_half ? 2 : 4);
}

INLINE float value_at(const void *memory, int64_t i, int is_half)
{
    if (!is_half) return ((const float *)memory)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)memory)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* A random number for each element of a weight and each step */
INLINE uint32_t noise_at(uint32_t seed, int64_t offset)
{
    uint32_t x = (uint32_t)offset * 0x9E3779B1u + (uint32_t)(offset >> 32) * 0x85EBCA77u + seed;
    x = (x ^ (x >> 15)) * 0x2C1B3C6Du + seed;
    x = (x ^ (x >> 12)) * 0x297A2D39u;
    return x ^ (x >> 15);
}

/* Rounds to the nearest; or up or down, with odds that make the mean right */
INLINE void put(void *memory, int64_t i, float value, int is_half, int rounds_at_random, uint32_t seed, int64_t offset)
{
    if (!is_half) {
        ((float *)memory)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t added = rounds_at_random ? noise_at(seed, offset) & 0xFFFF : 0x7FFF + ((bits >> 16) & 1);
    uint32_t size = bits & 0x7FFFFFFF;
    uint32_t rounded = size < 0x7F800000 ? (bits + added) >> 16 : size > 0x7F800000 ? 0x7FC0 : bits >> 16;
    ((uint16_t *)memory)[i] = (uint16_t)rounded;
}

#define EACH_VECTOR for (int n = 0; n < NUM_VECTORS; ++n)

INLINE Lanes lanes_at(const void *memory, int64_t i, int is_half)
{
    Lanes found;
    EACH_VECTOR {
        if (!is_half) {
            found.of[n] = *(const Vector *)((const float *)memory + i + n * VECTOR);
        } else {
            HalfWords half = *(const HalfWords *)((const uint16_t *)memory + i + n * VECTOR);
            found.of[n] = (Vector)(__builtin_convertvector(half, Words) << 16);
        }
    }
    return found;
}

static const uint32_t MASKS[2 * NUM_LANES] = {[0 ... NUM_LANES - 1] = 0xFFFFFFFFu};

/* The first `count` elements, zeros behind; elements up to `end` may be read */
INLINE Lanes some_lanes_at(const void *memory, int64_t i, int count, int64_t end, int is_half)
{
    if (i + NUM_LANES <= end) {
        const uint32_t *mask = MASKS + NUM_LANES - count;
        Lanes found = lanes_at(memory, i, is_half);
        EACH_VECTOR found.of[n] = (Vector)((Words)found.of[n] & *(const Words *)(mask + n * VECTOR));
        return found;
    }
    float found[NUM_LANES] = {0};
    for (int lane = 0; lane < count; ++lane) found[lane] = value_at(memory, i + lane, is_half);
    return lanes_at(found, 0, 0);
}

/* sums += a * b, rounded twice */
INLINE void add_product(Lanes *sums, Lanes a, Lanes b)
{
    EACH_VECTOR sums->of[n] += a.of[n] * b.of[n];
}

INLINE void add_lanes(Sums *sums, Lanes lanes)
{
    float found[NUM_LANES];
    EACH_VECTOR *(Vector *)(found + n * VECTOR) = lanes.of[n];
    for (int lane = 0; lane < NUM_LANES; ++lane) sums->of[lane] += found[lane];
}

INLINE double sum_of(Sums sums)
{
    double total = 0.0;
    for (int lane = 0; lane < NUM_LANES; ++lane) total += sums.of[lane];
    return total;
}

INLINE float update_of(float grad, float first, float second, const Options *o)
{
    float momentum = o->nesterov ? o->beta1 * first + o->rest1 * grad : first;
    return momentum / (sqrtf(second) * o->inverse_root_correction2 + o->eps) * o->inverse_correction1;
}

/* ------------------------------------------------------------------ the test */

typedef float FourFloats __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t FourWords __attribute__((vector_size(16)));
typedef uint16_t FourHalves __attribute__((vector_size(8), aligned(2), may_alias));
typedef double Four __attribute__((vector_size(32), aligned(8), may_alias));

#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (FourWords){__VA_ARGS__})
#endif

/* |<g, w>| < limit |g| |w| */
static inline int passes(double gw, double gg, double ww, double limit, double eps)
{
    double g = sqrt(gg), w = sqrt(ww);
    return fabs(gw) < limit * (g > eps ? g : eps) * (w > eps ? w : eps);
}

INLINE int all_pass(int64_t num_rows, const double (*dots)[4], double limit, double eps)
{
    int found = 1;
    for (int64_t row = 0; row < num_rows; ++row) found &= passes(dots[row][0], dots[row][1], dots[row][2], limit, eps);
    return found;
}

static double limit_of(const Options *o, int64_t size) { return o->delta / sqrt((double)size); }

/* How much of the weight the projection takes off: <u, w> / (|w| + eps)^2 */
static inline double radial_coefficient(const double *dots, double eps)
{
    double norm = sqrt(dots[2]) + eps;
    return dots[3] / (norm * norm);
}

INLINE FourFloats four_at(const void *memory, int64_t i, int is_half)
{
    if (!is_half) return *(const FourFloats *)((const float *)memory + i);
    FourHalves half = *(const FourHalves *)((const uint16_t *)memory + i);
    return (FourFloats)(__builtin_convertvector(half, FourWords) << 16);
}

/* Four values of four kinds: those of one place side by side */
INLINE void transpose(FourFloats a, FourFloats b, FourFloats c, FourFloats d, FourFloats *to)
{
    FourFloats low = SHUFFLED(a, b, 0, 4, 1, 5), other_low = SHUFFLED(c, d, 0, 4, 1, 5);
    FourFloats high = SHUFFLED(a, b, 2, 6, 3, 7), other_high = SHUFFLED(c, d, 2, 6, 3, 7);
    to[0] = SHUFFLED(low, other_low, 0, 1, 4, 5);
    to[1] = SHUFFLED(low, other_low, 2, 3, 6, 7);
    to[2] = SHUFFLED(high, other_high, 0, 1, 4, 5);
    to[3] = SHUFFLED(high, other_high, 2, 3, 6, 7);
}

/* Adds the lanes of four sums to `dots`, one after the other */
INLINE void add_up(const Lanes *sums, double *dots)
{
    Four total = *(const Four *)dots;
    for (int lane = 0; lane < NUM_LANES; lane += 4) {
        FourFloats found[4];
        transpose(four_at(sums, lane, 0), four_at(sums + 1, lane, 0), four_at(sums + 2, lane, 0),
                  four_at(sums + 3, lane, 0), found);
        for (int place = 0; place < 4; ++place) total += __builtin_convertvector(found[place], Four);
    }
    *(Four *)dots = total;
}

/* Adds the products of some elements lane by lane to <g, w>, <g, g>, <w, w> and, given updates, <u, w>. The sign of the
 * first is that of the gradient as it lies there, since the test asks for its size. Elements up to `end` may be read. */
INLINE void add_products(const void *weight, const void *grad, const float *updates, int64_t start, int64_t stop,
                         int64_t end, Lanes *sums, int is_half)
{
    int64_t i = start;
    for (; i + NUM_LANES <= stop; i += NUM_LANES) {
        Lanes g = lanes_at(grad, i, is_half), w = lanes_at(weight, i, is_half);
        add_product(sums, g, w);
        add_product(sums + 1, g, g);
        add_product(sums + 2, w, w);
        if (updates) add_product(sums + 3, lanes_at(updates, i, 0), w);
    }
    if (i == stop) return;
    Lanes g = some_lanes_at(grad, i, (int)(stop - i), end, is_half);
    Lanes w = some_lanes_at(weight, i, (int)(stop - i), end, is_half);
    add_product(sums, g, w);
    add_product(sums + 1, g, g);
    add_product(sums + 2, w, w);
    if (updates) add_product(sums + 3, some_lanes_at(updates, i, (int)(stop - i), end, 0), w);
}

/* Dot products of each of some rows of no more than NUM_LANES elements: all products first, then their sums */
INLINE void sum_narrow_rows(const void *weight, const void *grad, const float *updates, int64_t num_rows,
                            int64_t row_size, double (*dots)[4], int is_half)
{
    float products[BLOCK][4];
    int64_t i = 0, size = num_rows * row_size;
    for (; i + 4 <= size; i += 4) {
        FourFloats g = four_at(grad, i, is_half), w = four_at(weight, i, is_half);
        FourFloats uw = w;
        if (updates) uw *= four_at(updates, i, 0);
        transpose(g * w, g * g, w * w, uw, (FourFloats *)products[i]);
    }
    for (; i < size; ++i) {
        float g = value_at(grad, i, is_half), w = value_at(weight, i, is_half);
        FourFloats found = {g * w, g * g, w * w, updates ? updates[i] * w : w};
        *(FourFloats *)products[i] = found;
    }
    const FourFloats *of_row = (const FourFloats *)products[0];
    for (int64_t row = 0; row < num_rows; ++row, of_row += row_size) {
        Four total = {0};
        for (int64_t column = 0; column < row_size; ++column) total += __builtin_convertvector(of_row[column], Four);
        *(Four *)dots[row] = total;
    }
}

/* Dot products of each of some short rows, no more than BLOCK elements, rounded as those of longer rows are */
INLINE void sum_short_rows(const void *weight, const void *grad, const float *updates, int64_t num_rows,
                           int64_t row_size, double (*dots)[4], int is_half)
{
    if (row_size <= NUM_LANES) {
        sum_narrow_rows(weight, grad, updates, num_rows, row_size, dots, is_half);
        return;
    }
    memset(dots, 0, sizeof(*dots) * num_rows);
    for (int64_t row = 0; row < num_rows; ++row) {
        Lanes sums[4] = {{{{0}}}};
        add_products(weight, grad, updates, row * row_size, (row + 1) * row_size, num_rows * row_size, sums, is_half);
        add_up(sums, dots[row]);
    }
}

/* Whether each of some short rows passes; most weights are given up in their first row */
INLINE int test_short_rows(const Part *p, const Options *o, double limit, int is_half)
{
    double dots[BLOCK][4];
    int64_t row_size = p->row_size, most = BLOCK / row_size, num_rows = 1;
    for (int64_t start = p->start, end = p->start + p->size; start < end; num_rows *= 2) {
        num_rows = smaller(smaller(num_rows, most), (end - start) / row_size);
        sum_short_rows(element(p->weight.memory, start, is_half), element(p->grad.memory, start, is_half), NULL,
                       num_rows, row_size, dots, is_half);
        if (!all_pass(num_rows, dots, limit, o->norm_eps)) return 0;
        start += num_rows * row_size;
    }
    return 1;
}

/* Adds <g, w>, <g, g> and <w, w> of one stretch of a row, lane by lane. Elements up to `end` may be read. */
INLINE void add_stretch(const void *weight, const void *grad, int64_t start, int64_t stop, int64_t end, Sums *sums,
                        int is_half)
{
    Lanes found[4] = {{{{0}}}};
    add_products(weight, grad, NULL, start, stop, end, found, is_half);
    for (int place = 0; place < 3; ++place) add_lanes(sums + place, found[place]);
}

INLINE void sum_up_part(const Part *p, double *totals, int is_half)
{
    Sums sums[3] = {{{0}}, {{0}}, {{0}}};
    int64_t start = p->start, end = p->start + p->size, column = p->column;
    int64_t row_size = p->row_size;
    if (row_size < SHORT_ROW) { /* Whatever the rows */
        for (; start < end; start += BLOCK)
            add_stretch(p->weight.memory, p->grad.memory, start, smaller(start + BLOCK, end), end, sums, is_half);
    }
    while (start < end) {
        int64_t stop = smaller(smaller(start + STRETCH, end), start + row_size - column);
        add_stretch(p->weight.memory, p->grad.memory, start, stop, end, sums, is_half);
        column = (column + stop - start) % row_size;
        start = stop;
    }
    for (int place = 0; place < 3; ++place) totals[place] += sum_of(sums[place]);
}

/* Adds <g, w>, <g, g> and <w, w> over a part to `totals` */
int adamp_sum_up(const Part *p, double *totals)
{
    if (!fits(p)) return DOES_NOT_FIT;
    if (p->is_half) sum_up_part(p, totals, 1);
    else sum_up_part(p, totals, 0);
    return DONE;
}

/* Whether each row of a whole weight passes; most are given up in their first row */
int adamp_test_rows(const Part *p, const Options *o)
{
    if (!fits(p) || !is_whole(p)) return DOES_NOT_FIT;
    Part row = *p;
    double limit = limit_of(o, p->row_size);
    if (p->row_size < SHORT_ROW) return p->is_half ? test_short_rows(p, o, limit, 1) : test_short_rows(p, o, limit, 0);
    row.size = p->row_size;
    for (; row.start < p->start + p->size; row.start += p->row_size) {
        double dots[3] = {0};
        if (p->is_half) sum_up_part(&row, dots, 1);
        else sum_up_part(&row, dots, 0);
        if (!passes(dots[0], dots[1], dots[2], limit, o->norm_eps)) return 0;
    }
    return 1;
}

/* The level at which a whole weight passes */
static int find_level(const Part *p, const Options *o)
{
    double totals[3] = {0};
    if (adamp_test_rows(p, o)) return CHANNEL;
    adamp_sum_up(p, totals);
    return passes(totals[0], totals[1], totals[2], limit_of(o, p->size), o->norm_eps) ? LAYER : NONE;
}

/* The same from dot products of its rows, which are added up in `totals` */
int adamp_test(int64_t num_rows, const double *dots, double row_limit, double whole_limit, double eps, double *totals)
{
    int rows_pass = 1;
    for (int64_t row = 0; row < num_rows; ++row, dots += 4) {
        rows_pass = rows_pass && passes(dots[0], dots[1], dots[2], row_limit, eps);
        for (int place = 0; place < 4; ++place) totals[place] += dots[place];
    }
    if (rows_pass) return CHANNEL;
    return passes(totals[0], totals[1], totals[2], whole_limit, eps) ? LAYER : NONE;
}

/* ------------------------------------------------------------------ AdamW's step */

INLINE void step_part(const Part *p, const Options *o, int is_half, int rounds_at_random)
{
    void *restrict weight = p->weight.memory;
    const void *restrict grad = p->grad.memory;
    float *restrict exp_avg = p->exp_avg.memory, *restrict exp_avg_sq = p->exp_avg_sq.memory;
    Options own = *o;
    int64_t offset = p->offset - p->start;
    for (int64_t i = p->start; i < p->start + p->size; ++i) {
        float w = value_at(weight, i, is_half), g = own.sign * value_at(grad, i, is_half);
        float first = exp_avg[i] + own.rest1 * (g - exp_avg[i]);
        float second = own.beta2 * exp_avg_sq[i] + own.rest2 * g * g;
        float u = update_of(g, first, second, &own);
        exp_avg[i] = first;
        exp_avg_sq[i] = second;
        put(weight, i, own.keep * w - own.lr * u, is_half, rounds_at_random, own.seed, offset + i);
    }
}

/* AdamW's step: moments and w = keep * w - lr * u */
int adamp_step(const Part *p, const Options *o)
{
    if (!fits(p)) return DOES_NOT_FIT;
    if (!p->is_half) step_part(p, o, 0, 0);
    else if (o->rounds_at_random) step_part(p, o, 1, 1);
    else step_part(p, o, 1, 0);
    return DONE;
}

/* ------------------------------------------------------------------ the first pass */

/* Where the dot products of rows go: to `dots` of shape (num_rows, 4), or into the test of a whole weight at once */
typedef struct {
    double *dots;
    double totals[4], limit, eps;
    float *coefficients;
    int rows_pass, is_known; /* All rows passed so far; they are known to */
} Rows;

INLINE void end_rows(Rows *rows, int64_t num_rows, const double (*dots)[4])
{
    if (rows->dots) {
        for (int64_t row = 0; row < num_rows; ++row, rows->dots += 4)
            for (int place = 0; place < 4; ++place) rows->dots[place] += dots[row][place];
        return;
    }
    for (int64_t row = 0; row < num_rows; ++row)
        for (int place = 0; place < 4; ++place) rows->totals[place] += dots[row][place];
    if (!rows->rows_pass) return;
    rows->rows_pass = rows->is_known || all_pass(num_rows, dots, rows->limit, rows->eps);
    if (!rows->coefficients) return;
    for (int64_t row = 0; row < num_rows; ++row) rows->coefficients[row] = (float)radial_coefficient(dots[row], rows->eps);
    rows->coefficients += num_rows;
}

/* Updates the moments of `size` elements, no more than BLOCK, and writes their updates */
INLINE void advance(const void *restrict grad, float *restrict exp_avg, float *restrict exp_avg_sq, int64_t size,
                    const Options *o, float *restrict updates, int is_half)
{
    Options own = *o;
    for (int64_t i = 0; i < size; ++i) {
        float g = own.sign * value_at(grad, i, is_half);
        float first = exp_avg[i] + own.rest1 * (g - exp_avg[i]);
        float second = own.beta2 * exp_avg_sq[i] + own.rest2 * g * g;
        updates[i] = update_of(g, first, second, &own);
        exp_avg[i] = first;
        exp_avg_sq[i] = second;
    }
}

/* One stretch within a row: updates the moments, and adds <g, w>, <g, g>, <w, w> and <u, w> to `dots` */
INLINE void measure_stretch(const Part *p, int64_t begin, int64_t size, const Options *o, double *dots, int is_half)
{
    Lanes sums[4] = {{{{0}}}};
    for (int64_t start = begin; start < begin + size; start += BLOCK) {
        float updates[BLOCK];
        const void *weight = element(p->weight.memory, start, is_half), *grad = element(p->grad.memory, start, is_half);
        int64_t count = smaller(BLOCK, begin + size - start);
        advance(grad, (float *)p->exp_avg.memory + start, (float *)p->exp_avg_sq.memory + start, count, o, updates,
                is_half);
        add_products(weight, grad, updates, 0, count, count, sums, is_half);
    }
    add_up(sums, dots);
}

/* Whole short rows, no more than BLOCK elements */
INLINE void measure_short_rows(const Part *p, int64_t begin, int64_t size, const Options *o, Rows *rows, int is_half)
{
    float updates[BLOCK];
    double dots[BLOCK][4];
    const void *weight = element(p->weight.memory, begin, is_half), *grad = element(p->grad.memory, begin, is_half);
    int64_t num_rows = size / p->row_size;
    advance(grad, (float *)p->exp_avg.memory + begin, (float *)p->exp_avg_sq.memory + begin, size, o, updates,
            is_half);
    sum_short_rows(weight, grad, updates, num_rows, p->row_size, dots, is_half);
    end_rows(rows, num_rows, dots);
}

INLINE void measure_part(const Part *p, const Options *o, Rows *rows, int is_half)
{
    int64_t start = p->start, end = p->start + p->size, row_size = p->row_size, column = p->column;
    double dots[1][4] = {{0}};
    while (start < end) {
        if (column == 0 && row_size < SHORT_ROW && end - start >= row_size) {
            int64_t size = smaller(BLOCK, end - start) / row_size * row_size;
            measure_short_rows(p, start, size, o, rows, is_half);
            start += size;
            continue;
        }
        int64_t stop = smaller(smaller(start + STRETCH, end), start + row_size - column);
        measure_stretch(p, start, stop - start, o, dots[0], is_half);
        column += stop - start;
        start = stop;
        if (column == row_size || start == end) {
            end_rows(rows, 1, dots);
            memset(dots, 0, sizeof dots);
            column = 0;
        }
    }
}

static void measure_rows(const Part *p, const Options *o, Rows *rows)
{
    if (p->is_half) measure_part(p, o, rows, 1);
    else measure_part(p, o, rows, 0);
}

/* Updates the moments, and adds the dot products of each row to `dots` of shape (num_rows, 4) */
int adamp_measure(const Part *p, const Options *o, double *dots, int64_t num_rows)
{
    Rows rows = {.dots = dots};
    if (!fits(p) || !dots || num_rows != (p->column + p->size - 1) / p->row_size + 1) return DOES_NOT_FIT;
    measure_rows(p, o, &rows);
    return DONE;
}

/* ------------------------------------------------------------------ the second pass */

/* w = keep * w - lr * (u - radial * w) */
INLINE void apply_stretch(const Part *p, const Options *o, float keep, int64_t start, int64_t stop, const float *radial,
                          float whole_radial, int is_half, int rounds_at_random)
{
    void *restrict weight = p->weight.memory;
    const void *restrict grad = p->grad.memory;
    const float *restrict exp_avg = p->exp_avg.memory, *restrict exp_avg_sq = p->exp_avg_sq.memory;
    Options own = *o;
    int64_t offset = p->offset - p->start;
    for (int64_t i = start; i < stop; ++i) {
        float g = own.nesterov ? own.sign * value_at(grad, i, is_half) : 0.0f, w = value_at(weight, i, is_half);
        float share = radial ? radial[i - start] : whole_radial;
        float update = update_of(g, exp_avg[i], exp_avg_sq[i], &own) - share * w;
        put(weight, i, keep * w - own.lr * update, is_half, rounds_at_random, own.seed, offset + i);
    }
}

INLINE void apply_part(const Part *p, const Options *o, float keep, const float *coefficients, int is_half,
                       int rounds_at_random)
{
    int64_t start = p->start, end = p->start + p->size, row_size = p->row_size, column = p->column;
    while (start < end) {
        int64_t stop = smaller(end, start + row_size - column);
        if (column == 0 && row_size < SHORT_ROW && end - start >= row_size) {
            float radial[BLOCK + SHORT_ROW];
            stop = start + smaller(BLOCK, end - start) / row_size * row_size;
            for (int64_t place = 0; place < stop - start; place += row_size, ++coefficients)
                for (int64_t i = 0; i < row_size; i += VECTOR) /* Over the next row's, which is written after it */
                    *(Vector *)(radial + place + i) = (Vector){0} + *coefficients;
            apply_stretch(p, o, keep, start, stop, radial, 0.0f, is_half, rounds_at_random);
        } else {
            apply_stretch(p, o, keep, start, stop, NULL, *coefficients++, is_half, rounds_at_random);
        }
        column = 0;
        start = stop;
    }
}

/* Decay and the update without its radial part, with one coefficient for each row */
int adamp_apply(const Part *p, const Options *o, float keep, const float *coefficients, int64_t num_rows)
{
    if (!fits(p) || !coefficients || num_rows != (p->column + p->size - 1) / p->row_size + 1) return DOES_NOT_FIT;
    if (!p->is_half) apply_part(p, o, keep, coefficients, 0, 0);
    else if (o->rounds_at_random) apply_part(p, o, keep, coefficients, 1, 1);
    else apply_part(p, o, keep, coefficients, 1, 0);
    return DONE;
}

/* ------------------------------------------------------------------ whole weights */

static int update_weight(const Part *p, const Options *o, float *coefficients, int64_t num_coefficients)
{
    int level = (int)p->level;
    Part whole = *p;
    whole.row_size = p->size;
    /* Of short rows the sums of the test are others than those of the first pass: always the former decide */
    if (level == TEST && (!p->expected || p->row_size < SHORT_ROW)) {
        level = find_level(p, o);
        if (level == NONE) return adamp_step(p, o), NONE;
    }
    if (level != LAYER && p->size / p->row_size > num_coefficients) return DOES_NOT_FIT;
    Rows rows = {.limit = limit_of(o, p->row_size), .eps = o->norm_eps, .rows_pass = 1};
    /* A test that has come first leaves nothing to do in rows where the whole weight passes */
    int by_rows = p->level != LAYER && !(level == LAYER && p->row_size < SHORT_ROW);
    if (level != LAYER) rows.coefficients = coefficients;
    rows.is_known = level != TEST;
    measure_rows(by_rows ? p : &whole, o, &rows);
    if (level == TEST) {
        level = rows.rows_pass ? CHANNEL : LAYER;
        if (!rows.rows_pass &&
            !passes(rows.totals[0], rows.totals[1], rows.totals[2], limit_of(o, p->size), o->norm_eps))
            level = NONE;
    }
    if (level == CHANNEL) {
        adamp_apply(p, o, o->keep_projected, coefficients, p->size / p->row_size);
        return CHANNEL;
    }
    float radial = level == LAYER ? (float)radial_coefficient(rows.totals, o->norm_eps) : 0.0f;
    adamp_apply(&whole, o, level == LAYER ? o->keep_projected : o->keep, &radial, 1);
    return level;
}

/* The step of weights [first, last) of a table, each held whole. Writes the level at which each was projected where the
 * next step will look for it, and counts it in `hits` of shape (number of weights, 2). Those without a gradient are
 * passed over. Returns the number of weights that were updated, or DOES_NOT_FIT before anything is changed. */
int64_t adamp_update_weights(Part *parts, int64_t first, int64_t last, const Options *options, int64_t num_options,
                       float *coefficients, int64_t num_coefficients, float *hits)
{
    int64_t count = 0;
    for (int64_t place = first; place < last; ++place) {
        const Part *p = parts + place;
        if (!p->grad.memory) continue;
        if (!fits(p) || !is_whole(p) || p->options < 0 || p->options >= num_options) return DOES_NOT_FIT;
        if (p->level < CHANNEL || p->level > TEST) return DOES_NOT_FIT;
        if (p->level != LAYER && p->size / p->row_size > num_coefficients) return DOES_NOT_FIT;
    }
    for (int64_t place = first; place < last; ++place) {
        Part *p = parts + place;
        if (!p->grad.memory) continue;
        int level = update_weight(p, options + p->options, coefficients, num_coefficients);
        p->expected = level;
        if (level == CHANNEL) hits[2 * place] += 1.0f;
        if (level == LAYER) hits[2 * place + 1] += 1.0f;
        ++count;
    }
    return count;
}
