/* C interface of the fdk CPU library: multiplication by 1-, 2-, 4- and 8-bit codebook weights.
 *
 *   y[m, n] = sum_k x[m, k] * scales[n, k / group_size] * codebook[codes[n, k]] + bias[n]
 *
 * Rules of the interface:
 *   - every function checks its arguments before it touches a buffer and returns an fdk_status;
 *     fdk_last_error() then describes the failure (one message a thread);
 *   - buffers come with their size in bytes; a size other than the one documented is refused;
 *   - no exception leaves the library, nothing keeps a pointer after the call returns;
 *   - all functions may be called from several threads at once.
 *
 * Structures start with struct_size = sizeof(the structure), so that fields can be added later.
 */
#ifndef FDK_H
#define FDK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define FDK_API __attribute__((visibility("default")))
#else
#define FDK_API
#endif

/* Raised when a structure or a function changes in a way that breaks a compiled caller. */
#define FDK_ABI_VERSION 1

typedef enum fdk_status {
  FDK_OK = 0,
  FDK_INVALID_ARGUMENT = 1, /* the caller's mistake */
  FDK_UNSUPPORTED = 2,      /* valid, but not by this build or machine */
  FDK_OUT_OF_MEMORY = 3,
  FDK_INTERNAL = 4
} fdk_status;

typedef enum fdk_dtype { FDK_F32 = 0, FDK_F16 = 1, FDK_BF16 = 2 } fdk_dtype;

/* How activations enter the products.
 *   EXACT  in their own precision: float32 and float16 by float32 products, bfloat16 by bfloat16
 *          products, both with float32 sums;
 *   INT16  quantised to int16, one scale for each block of at most 64 within a group;
 *   INT8   quantised to int8, likewise. */
typedef enum fdk_arithmetic { FDK_EXACT = 0, FDK_INT16 = 1, FDK_INT8 = 2 } fdk_arithmetic;

/* A weight in the tiled layout (see src/layout.h; made by fdk_to_tiled). */
typedef struct fdk_weight {
  size_t struct_size;
  int64_t out_features; /* N >= 1 */
  int64_t in_features;  /* K >= 1 */
  int32_t bits;         /* 1, 2, 4 or 8 */
  int32_t uniform;    /* 1: codebook[q] = codebook[0] + q * step, may be decoded without a table */
  int64_t group_size; /* weights along K that share a scale: a multiple of 8 */
  const uint8_t *packed; /* fdk_tiled_packed_bytes bytes */
  size_t packed_bytes;
  const void *scales; /* fdk_tiled_scales_count elements of scales_dtype */
  size_t scales_bytes;
  fdk_dtype scales_dtype;
  int32_t reserved;
  const float *codebook; /* [num_codebooks, 2**bits]; row n uses n / (N / num_codebooks) */
  size_t codebook_bytes;
  int64_t num_codebooks; /* divides N */
} fdk_weight;

typedef struct fdk_matmul_args {
  size_t struct_size;
  int64_t m;     /* rows of x and y, >= 1 */
  const void *x; /* [m, K] */
  size_t x_bytes;
  fdk_dtype x_dtype;
  fdk_dtype y_dtype;
  void *y; /* [m, N] */
  size_t y_bytes;
  const void *bias; /* [N] or NULL */
  size_t bias_bytes;
  fdk_dtype bias_dtype;
  fdk_arithmetic arithmetic;
  int32_t num_threads; /* 0: FDK_NUM_THREADS, else the processors this process may use */
  int32_t reserved;
} fdk_matmul_args;

/* A dense bfloat16 weight [N, K], row-major: the baseline at the same arithmetic. */
typedef struct fdk_dense_args {
  size_t struct_size;
  int64_t m, out_features, in_features;
  const uint16_t *x; /* [m, K] bfloat16 */
  size_t x_bytes;
  const uint16_t *weight; /* [N, K] bfloat16 */
  size_t weight_bytes;
  uint16_t *y; /* [m, N] bfloat16 */
  size_t y_bytes;
  int32_t num_threads;
  int32_t reserved;
} fdk_dense_args;

/* The shape shared by the functions that convert. */
typedef struct fdk_layout {
  size_t struct_size;
  int64_t out_features, in_features;
  int64_t group_size;
  int32_t bits;
  fdk_dtype scales_dtype;
  int32_t num_threads;
  int32_t reserved;
} fdk_layout;

FDK_API int32_t fdk_abi_version(void);

/* The message of this thread's last failure, "" when there was none. Valid until the next call. */
FDK_API const char *fdk_last_error(void);

/* y = x W^T + bias. */
FDK_API fdk_status fdk_matmul(const fdk_weight *weight, const fdk_matmul_args *args);

/* Name of the kernel that fdk_matmul would run, e.g. "avx512vnni.matvec_int8". */
FDK_API fdk_status fdk_kernel_name(const fdk_weight *weight, const fdk_matmul_args *args,
                                   const char **name);

FDK_API fdk_status fdk_dense_matmul(const fdk_dense_args *args);

/* Sizes of the tiled layout. */
FDK_API fdk_status fdk_tiled_packed_bytes(int64_t out_features, int64_t in_features, int32_t bits,
                                          size_t *bytes);
FDK_API fdk_status fdk_tiled_scales_count(int64_t out_features, int64_t in_features,
                                          int64_t group_size, size_t *count);

/* Exact conversion between the interchange layout (packed [N, ceil(K / E)] with the first code in
 * the highest bits, scales [N, ceil(K / G)]) and the tiled layout. Buffers must not overlap. */
FDK_API fdk_status fdk_to_tiled(const fdk_layout *layout, const uint8_t *packed,
                                size_t packed_bytes, const void *scales, size_t scales_bytes,
                                uint8_t *tiled_packed, size_t tiled_packed_bytes,
                                void *tiled_scales, size_t tiled_scales_bytes);
FDK_API fdk_status fdk_from_tiled(const fdk_layout *layout, const uint8_t *tiled_packed,
                                  size_t tiled_packed_bytes, const void *tiled_scales,
                                  size_t tiled_scales_bytes, uint8_t *packed, size_t packed_bytes,
                                  void *scales, size_t scales_bytes);

/* Bandwidth probes: the bounds that a mat-vec is compared with. */
FDK_API fdk_status fdk_probe_copy(const void *source, void *target, size_t bytes,
                                  int32_t num_threads);
FDK_API fdk_status fdk_probe_reduce_sum(const int32_t *source, size_t bytes, int32_t num_threads,
                                        int64_t *sum);

/* The ISA in use, e.g. "avx512bf16"; ISAs from the best to "scalar". */
FDK_API const char *fdk_isa(void);
/* Number of ISAs in this build; fdk_isa_at(i) is a name, NULL when i is out of range. */
FDK_API int32_t fdk_num_isas(void);
FDK_API const char *fdk_isa_at(int32_t index);
/* 1 when this machine can run the ISA. */
FDK_API int32_t fdk_isa_available(const char *name);
/* Forces an ISA (tests, measurements); NULL returns to FDK_CPU_ISA or the best one. */
FDK_API fdk_status fdk_set_isa(const char *name);

/* Threads that num_threads = 0 means now: FDK_NUM_THREADS, bounded by the process' affinity. */
FDK_API int32_t fdk_default_num_threads(void);

#ifdef __cplusplus
}
#endif
#endif
