/* The step of `directions.Adam` and `directions.Momentum` on the CPU: one pass to measure, one to update.

   Tensors are cut into pieces of `PIECE` entries, counted through all of them. `run` works on the pieces [begin, end), so that
   threads can share the work, and sums do not depend on how many there are: in float over `BLOCK` entries, in double beyond. */
#include <math.h>
#include <stdint.h>

#define PIECE 65536
#define BLOCK 1024
#define PRODUCTS 5 /* gg, gm, gs, mm, ss */

/* One pointer a tensor; those to a state that is not kept are null. */
typedef struct {
    int64_t count;
    const int64_t *sizes;
    float *const *p, *const *g, *const *way, *const *mean, *const *variance;
} Tensors;

typedef struct {
    float sign; /* of the gradient: -1 to ascend */
    float beta1, beta2, eps;
    float fresh; /* what G² weighs in v */
    float first; /* 1: m = G beforehand */
    float rate, decay, share;
} Numbers;

/* One piece of n entries. */
typedef void Work(int64_t n, float *restrict p, const float *restrict g, float *restrict way, float *restrict m,
                  float *restrict v, const Numbers *c, double *restrict sums);

static Work adam_measure, adam_update, momentum_measure, momentum_update;
static Work *const works[] = {adam_measure, adam_update, momentum_measure, momentum_update};

void run(int op, const Tensors *t, const Numbers *c, int64_t begin, int64_t end, double *sums) {
    int64_t piece = 0;
    for (int64_t k = 0; k < t->count && piece < end; k++) {
        for (int64_t i = 0; i < t->sizes[k] && piece < end; i += PIECE, piece++) {
            if (piece < begin) continue;
            const int64_t n = t->sizes[k] - i < PIECE ? t->sizes[k] - i : PIECE;
            works[op](n, t->p[k] + i, t->g[k] + i, t->way[k] + i, t->mean[k] ? t->mean[k] + i : 0,
                      t->variance[k] ? t->variance[k] + i : 0, c, sums + piece * PRODUCTS);
        }
    }
}

static void adam_measure(int64_t n, float *restrict p, const float *restrict g, float *restrict way, float *restrict m,
                         float *restrict v, const Numbers *c, double *restrict sums) {
    const float fresh = c->fresh, eps = c->eps;
    for (int64_t from = 0; from < n; from += BLOCK) {
        const int64_t to = from + BLOCK < n ? from + BLOCK : n;
        float gg = 0, gm = 0, gs = 0, mm = 0, ss = 0;
#pragma omp simd reduction(+ : gg, gm, gs, mm, ss)
        for (int64_t i = from; i < to; i++) {
            const float metric = sqrtf(v[i] * (1 - fresh) + fresh * g[i] * g[i]) + eps;
            const float inverse = 1 / metric;
            gg += g[i] * g[i] * inverse;
            gm += g[i] * m[i] * inverse;
            gs += g[i] * way[i];
            mm += m[i] * m[i] * inverse;
            ss += way[i] * way[i] * metric;
        }
        sums[0] += gg, sums[1] += c->sign * gm, sums[2] += c->sign * gs, sums[3] += mm, sums[4] += ss;
    }
}

static void adam_update(int64_t n, float *restrict p, const float *restrict g, float *restrict way, float *restrict m,
                        float *restrict v, const Numbers *c, double *restrict sums) {
    const float sign = c->sign, new = 1 - c->beta1, fresh = c->fresh, eps = c->eps;
    const float rate = c->rate, decay = c->decay, keep = 1 - c->share;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        m[i] += new * (sign * g[i] - m[i]);
        v[i] = v[i] * (1 - fresh) + fresh * g[i] * g[i];
        const float lost = decay * p[i] + rate * m[i] / (sqrtf(v[i]) + eps);
        p[i] -= lost;
        way[i] = (way[i] + lost) * keep;
    }
}

static void momentum_measure(int64_t n, float *restrict p, const float *restrict g, float *restrict way, float *restrict m,
                             float *restrict v, const Numbers *c, double *restrict sums) {
    for (int64_t from = 0; from < n; from += BLOCK) {
        const int64_t to = from + BLOCK < n ? from + BLOCK : n;
        float gg = 0, gm = 0, gs = 0, mm = 0, ss = 0;
#pragma omp simd reduction(+ : gg, gs, ss)
        for (int64_t i = from; i < to; i++) {
            gg += g[i] * g[i];
            gs += g[i] * way[i];
            ss += way[i] * way[i];
        }
        if (m) {
#pragma omp simd reduction(+ : gm, mm)
            for (int64_t i = from; i < to; i++) {
                gm += g[i] * m[i];
                mm += m[i] * m[i];
            }
        }
        sums[0] += gg, sums[1] += c->sign * gm, sums[2] += c->sign * gs, sums[3] += mm, sums[4] += ss;
    }
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
            const float lost = decay * p[i] + old * past + now * g[i];
            m[i] = past + new * (sign * g[i] - past);
            p[i] -= lost;
            way[i] = (way[i] + lost) * keep;
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float lost = decay * p[i] + now * g[i];
            p[i] -= lost;
            way[i] = (way[i] + lost) * keep;
        }
    }
}
