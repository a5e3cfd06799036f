/* Elements in float32 or bfloat16, one at a time or NUM_LANES side by side, and sums of them lane by lane: the same
 * whatever the compiler makes of it, and however long the processor's vectors are. */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define NUM_LANES 16

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
