/* All kinds of jobs of one HOW (float, double, fast, and each of them _stochastic), with EXACT (1, 0), STOCHASTIC (1, 0), WIDE (float,
 * double) and LANES set: a function for each dtype of the weight and of the result. Sums in float are not enough for an exact result in
 * float32, which is rounded to nearest always.
 */
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
#if !(EXACT && JOIN(WIDE, _is_float)) && !STOCHASTIC
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
#undef HOW
#undef EXACT
#undef WIDE
#undef LANES
