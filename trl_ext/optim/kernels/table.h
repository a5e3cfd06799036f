/* The table of table.py as the kernels in C read it, and what they make of an item in it. */
#include <math.h>
#include <stdint.h>

/* Levels, as table.py numbers them */
enum { NONE, TEST, CHANNEL, LAYER };

/* The options of a group, as table.py's `options_row` has them */
typedef struct {
    double lr, weight_decay, wd_ratio, beta1, rest1, beta2, rest2, eps, delta, sign, nesterov, log_beta1, log_beta2;
    double projects_momentum, stochastic_rounding, unused;
} Group;

/* An item of the table, in the order of table.py's `Column`: elements of a weight, the first of which is in the place
 * `offset` of the weight, and how many lie at each pointer. What other back ends have in it is not read here. */
typedef struct {
    void *weight;
    const void *grad;
    float *first, *second;
    const float *step, *lr;
    int64_t group, level;
    int64_t first_chunk, num_chunks, num_head, num_tail, num_parts, row_size, num_rows, row_values;
    int64_t sums, num_cut, head_cut, tail_cut;
    int64_t numel, counts, width, seed;
    int64_t weight_length, grad_length, first_length, second_length;
    int64_t size, offset, dtype;
} Item;

/* Of a group at one step, for the random numbers of one weight */
typedef struct {
    double norm_eps, delta;
    float beta1, beta2, rest1, rest2, eps, inverse_root_correction2, inverse_correction1, sign, lr;
    float keep, keep_projected; /* What decay leaves of a weight */
    int nesterov, rounds_at_random;
    uint32_t seed;
} Options;

/* Elements [start, start + size) of an item, the first of which is in column `column` of its row; element 0 is in the
 * place `offset` of the weight */
typedef struct {
    void *weight;
    const void *grad;
    float *exp_avg, *exp_avg_sq;
    int64_t start, size, row_size, column, offset;
    int is_half;
} Part;

static int fits(const Item *item)
{
    const void *memory[] = {item->weight, item->grad, item->first, item->second};
    const int64_t lengths[] = {item->weight_length, item->grad_length, item->first_length, item->second_length};
    for (int place = 0; place < 4; ++place) {
        uintptr_t alignment = place < 2 && item->dtype == 1 ? 2 : 4;
        if (!memory[place] || (uintptr_t)memory[place] % alignment || item->size > lengths[place]) return 0;
    }
    return item->size > 0 && item->row_size > 0 && item->offset >= 0 && (item->dtype == 0 || item->dtype == 1);
}

static Part part_of(const Item *item)
{
    Part found = {item->weight, item->grad, item->first, item->second, 0, item->size, item->row_size,
                  item->offset % item->row_size, item->offset, item->dtype == 1};
    return found;
}

static int has_options(const Item *item, int64_t num_groups)
{
    return item->group >= 0 && item->group < num_groups && item->step && (uintptr_t)item->step % 4 == 0;
}

static Options options_of(const Item *item, const Group *groups)
{
    const Group *g = groups + item->group;
    double step = *item->step, decay = g->lr * g->weight_decay;
    /* Another seed for each weight and step */
    uint32_t seed = (uint32_t)item->seed + (uint32_t)step * 0x9E3779B1u;
    seed = (seed ^ (seed >> 16)) * 0x21F0AAADu;
    seed = (seed ^ (seed >> 15)) * 0x735A2D97u;
    Options found = {
        .norm_eps = g->eps, .delta = g->delta, .beta1 = (float)g->beta1, .beta2 = (float)g->beta2,
        .rest1 = (float)g->rest1, .rest2 = (float)g->rest2, .eps = (float)g->eps,
        .inverse_root_correction2 = (float)pow(1.0 - pow(g->beta2, step), -0.5),
        .inverse_correction1 = (float)(1.0 / (1.0 - pow(g->beta1, step))), .sign = (float)g->sign, .lr = (float)g->lr,
        .keep = (float)(1.0 - decay), .keep_projected = (float)(1.0 - decay * g->wd_ratio),
        .nesterov = g->nesterov != 0, .rounds_at_random = g->stochastic_rounding != 0, .seed = seed ^ (seed >> 15),
    };
    return found;
}
