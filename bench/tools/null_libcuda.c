/* A libcuda that agrees to everything and runs nothing: it lets Triton's own launcher work without a GPU.
 *
 * Built and loaded by null_gpu.py. It has what Triton's driver.c asks of the CUDA driver, counts launches, and keeps
 * what the last one was given.
 */

#include <cuda.h>
#include <stdint.h>
#include <string.h>

enum { MOST_PARAMETERS = 64 };

static long launches = 0;
static int context;
static int sizes[MOST_PARAMETERS], count = 0;
static CUlaunchConfig last_config;
static CUfunction last_function;
static uint64_t last_parameters[MOST_PARAMETERS];

long null_launches(void) { return launches; }

/* Say how many bytes each parameter of the next launches has, at most 8. */
void null_expect(int parameters, const int *bytes) {
  count = parameters;
  for (int i = 0; i < count; i++) sizes[i] = bytes[i];
}

/* What the last launch was given: programs, threads, shared memory, stream, function; then each parameter. */
void null_last(uint64_t *launch) {
  launch[0] = last_config.gridDimX;
  launch[1] = last_config.blockDimX;
  launch[2] = last_config.sharedMemBytes;
  launch[3] = (uint64_t)last_config.hStream;
  launch[4] = (uint64_t)last_function;
  for (int i = 0; i < count; i++) launch[5 + i] = last_parameters[i];
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  launches++;
  last_config = *config;
  last_function = function;
  for (int i = 0; i < count; i++) {
    last_parameters[i] = 0;
    memcpy(&last_parameters[i], parameters[i], sizes[i]);
  }
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  /* What an H100 has. */
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

/* Every address is one of this device's. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "the null libcuda";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *current, CUdevice device) { return cuCtxGetCurrent(current); }

CUresult cuDeviceGet(CUdevice *device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
