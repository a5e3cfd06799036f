/* AdamP's passes over tensors in a CPU's memory: weights and gradients in float32 or bfloat16, running averages and
 * arithmetic in float32. `adamp_update_weights` takes the whole step of weights that one process holds whole; the other
 * functions of that name are its parts, for weights that threads or processes share.
 *
 * A weight that the last step did not project is tested first, from gradient and weight alone, and takes AdamW's step
 * if the test fails. Elsewhere the first pass updates the moments and adds up the dot products, and the second applies
 * decay and the projected update. All ways round alike, so that the guess has no influence on the result.
 *
 * Sums run over stretches of STRETCH elements of a row in float32, lane by lane (lanes.h), whose results are added in
 * float64: in the same order whatever the compiler makes of it. What does not lie within the lengths that the table
 * gives is refused before anything is read or written.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"
#include "table.h"

#define STRETCH 16384
/* Rows shorter than this are worked on together, BLOCK elements at a time */
#define SHORT_ROW 128
#define BLOCK 1024

enum { DONE, DOES_NOT_FIT = -1 };

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int is_whole(const Part *p) { return p->column == 0 && p->size % p->row_size == 0; }

static int64_t num_rows_of(const Part *p) { return (p->column + p->size - 1) / p->row_size + 1; }

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
        sum_short_rows(element(p->weight, start, is_half), element(p->grad, start, is_half), NULL,
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
            add_stretch(p->weight, p->grad, start, smaller(start + BLOCK, end), end, sums, is_half);
    }
    while (start < end) {
        int64_t stop = smaller(smaller(start + STRETCH, end), start + row_size - column);
        add_stretch(p->weight, p->grad, start, stop, end, sums, is_half);
        column = (column + stop - start) % row_size;
        start = stop;
    }
    for (int place = 0; place < 3; ++place) totals[place] += sum_of(sums[place]);
}

static void sum_up(const Part *p, double *totals)
{
    if (p->is_half) sum_up_part(p, totals, 1);
    else sum_up_part(p, totals, 0);
}

/* Adds <g, w>, <g, g> and <w, w> over an item to `totals` */
int adamp_sum_up(const Item *item, double *totals)
{
    if (!fits(item) || !totals) return DOES_NOT_FIT;
    Part p = part_of(item);
    sum_up(&p, totals);
    return DONE;
}

/* Whether each row of a whole weight passes; most are given up in their first row */
static int test_rows(const Part *p, const Options *o)
{
    Part row = *p;
    double limit = limit_of(o, p->row_size);
    if (p->row_size < SHORT_ROW) return p->is_half ? test_short_rows(p, o, limit, 1) : test_short_rows(p, o, limit, 0);
    row.size = p->row_size;
    for (; row.start < p->start + p->size; row.start += p->row_size) {
        double dots[3] = {0};
        sum_up(&row, dots);
        if (!passes(dots[0], dots[1], dots[2], limit, o->norm_eps)) return 0;
    }
    return 1;
}

/* Whether each row of an item passes that is a whole weight */
int adamp_test_rows(const Item *item, const Group *groups, int64_t num_groups)
{
    if (!fits(item) || !has_options(item, num_groups)) return DOES_NOT_FIT;
    Part p = part_of(item);
    Options o = options_of(item, groups);
    return is_whole(&p) ? test_rows(&p, &o) : DOES_NOT_FIT;
}

/* The level at which a whole weight passes */
static int find_level(const Part *p, const Options *o)
{
    double totals[3] = {0};
    if (test_rows(p, o)) return CHANNEL;
    sum_up(p, totals);
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
    void *restrict weight = p->weight;
    const void *restrict grad = p->grad;
    float *restrict exp_avg = p->exp_avg, *restrict exp_avg_sq = p->exp_avg_sq;
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
static void take_step(const Part *p, const Options *o)
{
    if (!p->is_half) step_part(p, o, 0, 0);
    else if (o->rounds_at_random) step_part(p, o, 1, 1);
    else step_part(p, o, 1, 0);
}

int adamp_step(const Item *item, const Group *groups, int64_t num_groups)
{
    if (!fits(item) || !has_options(item, num_groups)) return DOES_NOT_FIT;
    Part p = part_of(item);
    Options o = options_of(item, groups);
    take_step(&p, &o);
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
        const void *weight = element(p->weight, start, is_half), *grad = element(p->grad, start, is_half);
        int64_t count = smaller(BLOCK, begin + size - start);
        advance(grad, p->exp_avg + start, p->exp_avg_sq + start, count, o, updates,
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
    const void *weight = element(p->weight, begin, is_half), *grad = element(p->grad, begin, is_half);
    int64_t num_rows = size / p->row_size;
    advance(grad, p->exp_avg + begin, p->exp_avg_sq + begin, size, o, updates,
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
int adamp_measure(const Item *item, const Group *groups, int64_t num_groups, double *dots, int64_t num_rows)
{
    if (!fits(item) || !has_options(item, num_groups) || !dots) return DOES_NOT_FIT;
    Part p = part_of(item);
    if (num_rows != num_rows_of(&p)) return DOES_NOT_FIT;
    Options o = options_of(item, groups);
    Rows rows = {.dots = dots};
    measure_rows(&p, &o, &rows);
    return DONE;
}

/* ------------------------------------------------------------------ the second pass */

/* w = keep * w - lr * (u - radial * w) */
INLINE void apply_stretch(const Part *p, const Options *o, float keep, int64_t start, int64_t stop, const float *radial,
                          float whole_radial, int is_half, int rounds_at_random)
{
    void *restrict weight = p->weight;
    const void *restrict grad = p->grad;
    const float *restrict exp_avg = p->exp_avg, *restrict exp_avg_sq = p->exp_avg_sq;
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
static void apply_update(const Part *p, const Options *o, float keep, const float *coefficients)
{
    if (!p->is_half) apply_part(p, o, keep, coefficients, 0, 0);
    else if (o->rounds_at_random) apply_part(p, o, keep, coefficients, 1, 1);
    else apply_part(p, o, keep, coefficients, 1, 0);
}

int adamp_apply(const Item *item, const Group *groups, int64_t num_groups, float keep, const float *coefficients,
                int64_t num_rows)
{
    if (!fits(item) || !has_options(item, num_groups) || !coefficients) return DOES_NOT_FIT;
    Part p = part_of(item);
    if (num_rows != num_rows_of(&p)) return DOES_NOT_FIT;
    Options o = options_of(item, groups);
    apply_update(&p, &o, keep, coefficients);
    return DONE;
}

/* ------------------------------------------------------------------ whole weights */

static int update_weight(const Part *p, const Options *o, int known_level, int was_projected, float *coefficients)
{
    int level = known_level;
    Part whole = *p;
    whole.row_size = p->size;
    /* Of short rows the sums of the test are others than those of the first pass: always the former decide */
    if (level == TEST && (!was_projected || p->row_size < SHORT_ROW)) {
        level = find_level(p, o);
        if (level == NONE) return take_step(p, o), NONE;
    }
    Rows rows = {.limit = limit_of(o, p->row_size), .eps = o->norm_eps, .rows_pass = 1};
    /* A test that has come first leaves nothing to do in rows where the whole weight passes */
    int by_rows = known_level != LAYER && !(level == LAYER && p->row_size < SHORT_ROW);
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
        apply_update(p, o, o->keep_projected, coefficients);
        return CHANNEL;
    }
    float radial = level == LAYER ? (float)radial_coefficient(rows.totals, o->norm_eps) : 0.0f;
    apply_update(&whole, o, level == LAYER ? o->keep_projected : o->keep, &radial);
    return level;
}

/* Whether an item can be updated on its own, with room for a coefficient of each row */
static int is_whole_weight(const Item *item, int64_t num_groups, int64_t num_coefficients)
{
    if (!fits(item) || !has_options(item, num_groups) || item->level < TEST || item->level > LAYER) return 0;
    return item->offset == 0 && item->size == item->numel && item->size % item->row_size == 0 &&
           (item->level == LAYER || item->size / item->row_size <= num_coefficients);
}

/* The step of items [first, last) of a table, each a whole weight. Writes for the next step whether each was projected,
 * and counts the level in `hits` of shape (number of items, 2). Those without a gradient are passed over. Returns the
 * number of weights that were updated, or DOES_NOT_FIT before anything is changed. */
int64_t adamp_update_weights(const Item *items, int64_t first, int64_t last, const Group *groups, int64_t num_groups,
                             int32_t *was_projected, float *coefficients, int64_t num_coefficients, float *hits)
{
    int64_t count = 0;
    for (int64_t place = first; place < last; ++place)
        if (items[place].grad && !is_whole_weight(items + place, num_groups, num_coefficients)) return DOES_NOT_FIT;
    for (int64_t place = first; place < last; ++place) {
        if (!items[place].grad) continue;
        Part p = part_of(items + place);
        Options o = options_of(items + place, groups);
        int level = update_weight(&p, &o, (int)items[place].level, was_projected[place], coefficients);
        was_projected[place] = level != NONE;
        if (level == CHANNEL) hits[2 * place] += 1.0f;
        if (level == LAYER) hits[2 * place + 1] += 1.0f;
        ++count;
    }
    return count;
}
