/* Integers by their width, and where a function may run. */
#ifndef TYPES_H
#define TYPES_H

#ifdef __CUDACC_RTC__
#define ANYWHERE __device__
#else
#define ANYWHERE static
#endif

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#endif
