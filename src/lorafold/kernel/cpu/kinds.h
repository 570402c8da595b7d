/* All kinds of jobs of one HOW (float, double, fast, fast_double, and each of them _stochastic), with EXACT (1, 0), STOCHASTIC (1, 0), WIDE
 * (float, double) and LANES set: a function for each dtype of the weight and of the result. Sums in float are not enough for an exact result
 * in float32, nor for numbers of float64; `fast` keeps those of others in float. What is wider than 16 bits is rounded to nearest always.
 */
#if EXACT || JOIN(WIDE, _is_float)
#define FROM bf16
#define TO bf16
#include "tile.h"
#define FROM f16
#define TO f16
#include "tile.h"
#define FROM bf16
#define TO f16
#include "tile.h"
#define FROM f16
#define TO bf16
#include "tile.h"
#define FROM f32
#define TO bf16
#include "tile.h"
#define FROM f32
#define TO f16
#include "tile.h"
#endif
#if !STOCHASTIC && EXACT == JOIN(WIDE, _is_double)
#define FROM bf16
#define TO f32
#include "tile.h"
#define FROM f16
#define TO f32
#include "tile.h"
#define FROM f32
#define TO f32
#include "tile.h"
#endif
#if JOIN(WIDE, _is_double)
#define FROM f64
#define TO bf16
#include "tile.h"
#define FROM f64
#define TO f16
#include "tile.h"
#if !STOCHASTIC
#define FROM f64
#define TO f32
#include "tile.h"
#define FROM bf16
#define TO f64
#include "tile.h"
#define FROM f16
#define TO f64
#include "tile.h"
#define FROM f32
#define TO f64
#include "tile.h"
#define FROM f64
#define TO f64
#include "tile.h"
#endif
#endif
#undef HOW
#undef EXACT
#undef WIDE
#undef LANES
