/* The step of `directions.Adam` and `directions.Momentum` on the CPU: one pass to measure, one to update. That of Adam takes
   the products, and what it measures is the gradient's square.

   Tensors are cut into pieces of `PIECE` entries, counted through all of them. `run` works on the pieces [begin, end), so that
   threads can share the work, and sums do not depend on how many there are: in float over `BLOCK` entries, in double beyond.
   All arithmetic is in float; what is in bfloat16 is copied to and fro, block by block. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PIECE 65536
#define BLOCK 1024
#define PRODUCTS 5 /* gg, gm, gs, mm, ss */

/* One pointer a tensor; those to a state that is not kept are null. */
typedef struct {
    int64_t count;
    const int64_t *sizes;
    void *const *p, *const *g, *const *way, *const *mean, *const *variance;
    int bf16, bf16_grads, bf16_way; /* p and mean; g; way. All others are in float */
    int chance;           /* how bfloat16 is rounded */
    uint32_t seed;
} Tensors;

typedef struct {
    float sign; /* of the gradient: -1 to ascend */
    float beta1, beta2, eps;
    float fresh; /* what G² weighs in v */
    float first; /* 1: m = G beforehand */
    float rate, decay, share;
} Numbers;

/* One block of n entries. */
typedef void Work(int64_t n, float *restrict p, const float *restrict g, float *restrict way, float *restrict m,
                  float *restrict v, const Numbers *c, double *restrict sums);

static Work adam_measure, adam_update, momentum_measure, momentum_update;
static Work *const works[] = {adam_measure, adam_update, momentum_measure, momentum_update};

/* n entries from the i-th on as floats: where they lie, or copied to `room`. */
static float *opened(const void *tensor, int64_t i, int64_t n, int bf16, float *restrict room) {
    if (!tensor || !bf16) return tensor ? (float *)tensor + i : 0;
    const uint16_t *from = (const uint16_t *)tensor + i;
    for (int64_t j = 0; j < n; j++) {
        const uint32_t bits = (uint32_t)from[j] << 16;
        memcpy(room + j, &bits, sizeof bits);
    }
    return room;
}

static inline int finite_bits(uint32_t bits) { return (bits & 0x7F800000) != 0x7F800000; }

/* Round n floats to bfloat16; see `pieces.rounded`. */
static void closed(void *tensor, int64_t i, int64_t n, const float *restrict room, int chance, uint32_t seed, uint32_t salt) {
    uint16_t *restrict to = (uint16_t *)tensor + i;
    const uint32_t start = seed * 668265263u + salt * 374761393u;
    for (int32_t j = 0; j < (int32_t)n; j++) {
        uint32_t bits, h = ((uint32_t)i + j) * 2654435761u + start;
        memcpy(&bits, room + j, sizeof bits);
        h = (h ^ h >> 16) * 2246822507u;
        h = (h ^ h >> 13) * 3266489909u;
        const uint32_t up = bits + ((h ^ h >> 16) & 0xFFFF);
        const uint32_t nearest = bits + 0x7FFF + (bits >> 16 & 1);
        const uint32_t other = (bits & 0x7FFFFFFF) > 0x7F800000 ? bits | 0x400000 : nearest; /* not a number stays so */
        to[j] = (chance & finite_bits(bits) & finite_bits(up) ? up : other) >> 16;
    }
}

static void block(int op, const Tensors *t, int64_t k, int64_t i, int64_t n, const Numbers *c, double *sums) {
    float room[4][BLOCK];
    const int updates = op % 2;
    float *p = updates ? opened(t->p[k], i, n, t->bf16, room[0]) : 0;
    float *g = opened(t->g[k], i, n, t->bf16_grads, room[1]);
    const int state = works[op] != adam_measure; /* which looks at nothing else */
    float *way = state ? opened(t->way[k], i, n, t->bf16_way, room[2]) : 0;
    float *m = state ? opened(t->mean[k], i, n, t->bf16, room[3]) : 0;
    works[op](n, p, g, way, m, opened(t->variance[k], i, n, 0, 0), c, sums);
    if (updates && t->bf16) {
        closed(t->p[k], i, n, p, t->chance, t->seed, 0);
        if (m) closed(t->mean[k], i, n, m, t->chance, t->seed, 2);
    }
    if (updates && t->bf16_way) closed(t->way[k], i, n, way, t->chance, t->seed, 1);
}

void run(int op, const Tensors *t, const Numbers *c, int64_t begin, int64_t end, double *sums) {
    int64_t piece = 0;
    for (int64_t k = 0; k < t->count && piece < end; k++) {
        for (int64_t from = 0; from < t->sizes[k] && piece < end; from += PIECE, piece++) {
            if (piece < begin) continue;
            const int64_t to = from + PIECE < t->sizes[k] ? from + PIECE : t->sizes[k];
            for (int64_t i = from; i < to; i += BLOCK) {
                block(op, t, k, i, to - i < BLOCK ? to - i : BLOCK, c, sums + piece * PRODUCTS);
            }
        }
    }
}

static void adam_measure(int64_t n, float *restrict p, const float *restrict g, float *restrict way, float *restrict m,
                         float *restrict v, const Numbers *c, double *restrict sums) {
    float gg = 0;
#pragma omp simd reduction(+ : gg)
    for (int64_t i = 0; i < n; i++) gg += g[i] * g[i];
    sums[0] += gg;
}

// What a decay takes; nothing of what is forbidden by -inf, of which 0 * p is no number.
static inline float decayed(float decay, float p) { return fabsf(p) <= FLT_MAX ? decay * p : 0; }

static void adam_update(int64_t n, float *restrict p, const float *restrict g, float *restrict way, float *restrict m,
                        float *restrict v, const Numbers *c, double *restrict sums) {
    const float sign = c->sign, new = 1 - c->beta1, fresh = c->fresh, eps = c->eps;
    const float rate = c->rate, decay = c->decay, keep = 1 - c->share;
    float gg = 0, gm = 0, gs = 0, mm = 0, ss = 0;
#pragma omp simd reduction(+ : gg, gm, gs, mm, ss)
    for (int64_t i = 0; i < n; i++) {
        const float now = sign * g[i], past = m[i], back = way[i];
        const float square = v[i] * (1 - fresh) + fresh * now * now;
        const float metric = sqrtf(square) + eps, inverse = 1 / metric;
        gg += now * now * inverse;
        gm += now * past * inverse;
        gs += now * back;
        mm += past * past * inverse;
        ss += back * back * metric;
        const float mean = past + new * (now - past);
        const float lost = decayed(decay, p[i]) + rate * mean * inverse;
        v[i] = square;
        m[i] = mean;
        p[i] -= lost;
        way[i] = (back + lost) * keep;
    }
    sums[0] += gg, sums[1] += gm, sums[2] += gs, sums[3] += mm, sums[4] += ss;
}

static void momentum_measure(int64_t n, float *restrict p, const float *restrict g, float *restrict way, float *restrict m,
                             float *restrict v, const Numbers *c, double *restrict sums) {
    float gg = 0, gm = 0, gs = 0, mm = 0, ss = 0;
#pragma omp simd reduction(+ : gg, gs, ss)
    for (int64_t i = 0; i < n; i++) {
        gg += g[i] * g[i];
        gs += g[i] * way[i];
        ss += way[i] * way[i];
    }
    if (m) {
#pragma omp simd reduction(+ : gm, mm)
        for (int64_t i = 0; i < n; i++) {
            gm += g[i] * m[i];
            mm += m[i] * m[i];
        }
    }
    sums[0] += gg, sums[1] += c->sign * gm, sums[2] += c->sign * gs, sums[3] += mm, sums[4] += ss;
}

static void momentum_update(int64_t n, float *restrict p, const float *restrict g, float *restrict way, float *restrict m,
                            float *restrict v, const Numbers *c, double *restrict sums) {
    const float sign = c->sign, first = c->first, new = 1 - c->beta1;
    const float rate = c->rate, decay = c->decay, keep = 1 - c->share;
    const float old = m ? c->rate * c->beta2 : 0, now = sign * (rate - old);
    if (m) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float past = m[i] + first * (sign * g[i] - m[i]);
            const float lost = decayed(decay, p[i]) + old * past + now * g[i];
            m[i] = past + new * (sign * g[i] - past);
            p[i] -= lost;
            way[i] = (way[i] + lost) * keep;
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float lost = decayed(decay, p[i]) + now * g[i];
            p[i] -= lost;
            way[i] = (way[i] + lost) * keep;
        }
    }
}
