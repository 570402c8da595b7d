/* The kernels of merge.cu as functions of a library: they return a promise that was broken, or null. */

#include "merge.cu"

bool usual;

extern "C" const char *launch_cut(const job *of, unsigned blocks, unsigned threads)
{
    broken = 0;
    launched(cut, of, blocks, threads);
    return broken;
}

extern "C" const char *launch_merge(const job *of, unsigned blocks, unsigned threads)
{
    broken = 0;
    launched(merge, of, blocks, threads);
    return broken;
}

extern "C" void pack(int kind, const float *numbers, u32 *words, int count)
{
    for (int i = 0; i < count; i++)
        words[i] = kind ? packed_f16(numbers[2 * i], numbers[2 * i + 1]) : packed_bf16(numbers[2 * i], numbers[2 * i + 1]);
}

extern "C" float widen(u32 half) { return widened_f16(half); }
