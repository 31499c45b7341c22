/* One pass over memory for each tensor. Compiled at run time, for REAL=float or REAL=double.

   A step is bound by memory: each number of the parameters, gradients and buffers is read once and written once.
   table[k * count + i] is the i-th tensor of the k-th list, h are the scalars of the step. */

#include <math.h>
#include <stddef.h>

#if WIDTH == 32
#define SQRT sqrtf
#else
#define SQRT sqrt
#endif

static void one_real_sgd(size_t n, REAL *restrict w, const REAL *restrict g, REAL *restrict a, REAL sign, REAL decay,
                         REAL c, REAL rate)
{
    for (size_t i = 0; i < n; i++) {
        REAL next = c * a[i] + (sign * g[i] + decay * w[i]);
        a[i] = next;
        w[i] -= rate * next;
    }
}

static void one_complex_sgd(size_t n, REAL *restrict w, const REAL *restrict g, REAL *restrict a, REAL *restrict b,
                            REAL sign, REAL decay, REAL c, REAL s, REAL rate)
{
    for (size_t i = 0; i < n; i++) {
        REAL real = a[i], imag = b[i];
        REAL next = c * real - s * imag + (sign * g[i] + decay * w[i]);
        b[i] = s * real + c * imag;
        a[i] = next;
        w[i] -= rate * next;
    }
}

static void one_complex_adam(size_t n, REAL *restrict w, const REAL *restrict g, REAL *restrict a, REAL *restrict b,
                             REAL *restrict v, REAL sign, REAL decay, REAL c, REAL s, REAL keep, REAL add, REAL eps,
                             REAL rate, REAL imag_rate)
{
    for (size_t i = 0; i < n; i++) {
        REAL real = a[i], imag = b[i], gradient = sign * g[i] + decay * w[i];
        REAL next = c * real - s * imag + gradient, turned = s * real + c * imag;
        REAL square = keep * v[i] + add * gradient * gradient;
        a[i] = next;
        b[i] = turned;
        v[i] = square;
        w[i] -= (rate * next + imag_rate * turned) / (SQRT(square) + eps);
    }
}

void real_sgd(size_t count, const size_t *sizes, REAL **table, const double *h)
{
    for (size_t i = 0; i < count; i++)
        one_real_sgd(sizes[i], table[i], table[count + i], table[2 * count + i], h[0], h[1], h[2], h[3]);
}

void complex_sgd(size_t count, const size_t *sizes, REAL **table, const double *h)
{
    for (size_t i = 0; i < count; i++)
        one_complex_sgd(sizes[i], table[i], table[count + i], table[2 * count + i], table[3 * count + i], h[0], h[1],
                        h[2], h[3], h[4]);
}

void complex_adam(size_t count, const size_t *sizes, REAL **table, const double *h)
{
    for (size_t i = 0; i < count; i++)
        one_complex_adam(sizes[i], table[i], table[count + i], table[2 * count + i], table[3 * count + i],
                         table[4 * count + i], h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], h[8]);
}
