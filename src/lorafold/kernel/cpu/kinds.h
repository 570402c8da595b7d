/* All kinds of jobs of one HOW (float, double, fast), with EXACT (1, 0), WIDE (float, double) and LANES set: a function for each dtype of
 * the weight and of the result. Sums in float are not enough for an exact result in float32.
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
#if !(EXACT && JOIN(HOW, _is_float))
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
