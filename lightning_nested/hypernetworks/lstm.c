/* What an LSTM with weights of each example does between its matrix products, one time step per call.
   Compiled at run time, for REAL=float or REAL=double.

   All tensors are contiguous; u is the number of units, and the gates' order is i, f, g, o, as in torch. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if WIDTH == 32
typedef uint32_t BITS;
#define MANTISSA 23
#define EXPONENT 127
#define LIMIT 87
#define LN2_LOW ((REAL)-2.12194440054690583e-4)
#define TERMS 7
#else
typedef uint64_t BITS;
#define MANTISSA 52
#define EXPONENT 1023
#define LIMIT 700
#define LN2_LOW ((REAL)-2.121944400546905827679e-4)
#define TERMS 13
#endif
#define LN2_HIGH ((REAL)0.693359375) /* few digits: n times it is exact */

static const double factorials[] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800, 479001600,
                                    6227020800.0};

/* e^x - 1 = 2^n (e^r - 1) + (2^n - 1) with |r| <= ln(2)/2, where Taylor's terms are below a rounding after TERMS. */
static inline REAL exp_less_one(REAL x)
{
    const REAL magic = (REAL)((BITS)3 << (MANTISSA - 1)); /* added, it leaves an integer in the low bits */
    x = x > LIMIT ? LIMIT : x;
    x = x < -LIMIT ? -LIMIT : x;
    REAL shifted = x * (REAL)1.44269504088896340736 + magic, n = shifted - magic;
    REAL r = (x - n * LN2_HIGH) - n * LN2_LOW, power, sum = (REAL)(1 / factorials[TERMS]);
    BITS bits, zero;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&zero, &magic, sizeof zero);
    bits = (BITS)((bits - zero + EXPONENT) << MANTISSA);
    memcpy(&power, &bits, sizeof power);
    for (int k = TERMS - 1; k > 1; k--)
        sum = sum * r + (REAL)(1 / factorials[k]);
    return power * (sum * r * r + r) + (power - 1);
}

static inline REAL sigmoid(REAL x) { return 1 / (2 + exp_less_one(-x)); }

static inline REAL tangent(REAL x)
{
    REAL e = exp_less_one(2 * x);
    return e / (e + 2);
}

static void one_forward(size_t u, const REAL *restrict x, const REAL *restrict h, const REAL *restrict a,
                        const REAL *restrict b, const REAL *restrict shift, const REAL *restrict before,
                        REAL *restrict turned, REAL *restrict cell, REAL *restrict gates, REAL *restrict squashed,
                        REAL *restrict output)
{
    for (size_t j = 0; j < 4 * u; j++) {
        turned[j] = h[4 * u + j];
        gates[j] += h[j] + a[j] * x[j] + b[j] * h[4 * u + j] + shift[j];
    }
    for (size_t j = 0; j < u; j++) {
        REAL i = sigmoid(gates[j]), f = sigmoid(gates[u + j]);
        REAL g = tangent(gates[2 * u + j]), o = sigmoid(gates[3 * u + j]);
        REAL c = f * before[j] + i * g, s = tangent(c);
        gates[j] = i;
        gates[u + j] = f;
        gates[2 * u + j] = g;
        gates[3 * u + j] = o;
        cell[j] = c;
        squashed[j] = s;
        output[j] = o * s;
    }
}

static void one_backward(size_t u, const REAL *restrict x, const REAL *restrict turned, const REAL *restrict a,
                         const REAL *restrict b, const REAL *restrict before, const REAL *restrict gates,
                         const REAL *restrict squashed, const REAL *restrict given, const REAL *restrict later,
                         REAL *restrict of_cell, REAL *restrict by_a, REAL *restrict d, REAL *restrict by_b,
                         REAL *restrict of_a, REAL *restrict of_b, REAL *restrict of_shift)
{
    for (size_t j = 0; j < u; j++) {
        REAL i = gates[j], f = gates[u + j], g = gates[2 * u + j], o = gates[3 * u + j], s = squashed[j];
        REAL of_output = given[j] + later[j], c = of_cell[j] + of_output * o * (1 - s * s);
        d[j] = c * g * i * (1 - i);
        d[u + j] = c * before[j] * f * (1 - f);
        d[2 * u + j] = c * i * (1 - g * g);
        d[3 * u + j] = of_output * s * o * (1 - o);
        of_cell[j] = c * f;
    }
    for (size_t j = 0; j < 4 * u; j++) {
        by_a[j] = a[j] * d[j];
        by_b[j] = b[j] * d[j];
        of_shift[j] += d[j];
        of_a[j] += d[j] * x[j];
        of_b[j] += d[j] * turned[j];
    }
}

/* Given: X (time, batch, 4u) W1 x; GATES of the same shape W0 x; A, B, SHIFT (batch, 4u); H (batch, 8u) W0 h and W1 h
   of this step; the first of CELLS (time + 1, batch, u). Found: TURNED (time, batch, 4u) W1 h; the gates in GATES;
   SQUASHED, OUTPUTS (time, batch, u). */
enum { X, TURNED, A, B, CELLS, GATES, SQUASHED, H, SHIFT, OUTPUTS };

/* gates = nonlinear(W0 x + W0 h + a (W1 x) + b (W1 h) + shift), cell = f before + i g, output = o tanh(cell). */
void forward(size_t t, size_t batch, size_t u, REAL **table)
{
    for (size_t e = 0; e < batch; e++) {
        size_t now = (t * batch + e) * u, of = e * 4 * u;
        one_forward(u, table[X] + 4 * now, table[H] + 2 * of, table[A] + of, table[B] + of, table[SHIFT] + of,
                    table[CELLS] + now, table[TURNED] + 4 * now, table[CELLS] + now + batch * u,
                    table[GATES] + 4 * now, table[SQUASHED] + now, table[OUTPUTS] + now);
    }
}

/* GIVEN (time, batch, u): derivatives with respect to the outputs; LATER (batch, u): to this output, by way of later
   steps; OF_CELL (batch, u): to this cell, replaced by that to the cell before. Found: FOUND (time, batch, 12u), a d,
   d and b d, with d of what the gates were made of; OF_A, OF_B, OF_SHIFT (batch, 4u) are added to. */
enum { GIVEN = SQUASHED + 1, LATER, OF_CELL, FOUND, OF_A, OF_B, OF_SHIFT };

void backward(size_t t, size_t batch, size_t u, REAL **table)
{
    for (size_t e = 0; e < batch; e++) {
        size_t now = (t * batch + e) * u, of = e * 4 * u;
        REAL *found = table[FOUND] + 12 * now;
        one_backward(u, table[X] + 4 * now, table[TURNED] + 4 * now, table[A] + of, table[B] + of, table[CELLS] + now,
                     table[GATES] + 4 * now, table[SQUASHED] + now, table[GIVEN] + now, table[LATER] + e * u,
                     table[OF_CELL] + e * u, found, found + 4 * u, found + 8 * u, table[OF_A] + of, table[OF_B] + of,
                     table[OF_SHIFT] + of);
    }
}
