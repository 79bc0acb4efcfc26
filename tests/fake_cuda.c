/* A stand-in for NVIDIA's driver library, as far as Triton calls it: one sm_90 GPU that computes nothing.

   It takes every pointer for one of the GPU's, counts what is loaded, and hands each launch to fake_launched. */

#include "cuda.h"

typedef unsigned long long Number;

/* how: grid x, y, z; block x, y, z; bytes of shared memory; stream; number of attributes; whether the launch may start
   before its predecessor ends. arguments: where each is; only the kernel knows how many there are, and how wide. */
void (*fake_launched)(CUfunction kernel, const Number *how, void **arguments);
int fake_loads, fake_unloads, fake_capturing;

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction kernel, void **arguments, void **extra) {
  int overlaps = 0;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      overlaps = config->attrs[i].value.programmaticStreamSerializationAllowed;
  Number how[] = {config->gridDimX,  config->gridDimY,  config->gridDimZ,       config->blockDimX,
                  config->blockDimY, config->blockDimZ, config->sharedMemBytes, (Number)config->hStream,
                  config->numAttrs,  overlaps};
  fake_launched(kernel, how, arguments);
  return CUDA_SUCCESS;
}

/* A module is its number, and so is its only kernel. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (fake_capturing)
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *module = (CUmodule)(Number)__sync_add_and_fetch(&fake_loads, 1);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *kernel, CUmodule module, const char *name) {
  *kernel = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  __sync_add_and_fetch(&fake_unloads, 1);
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing" : "other";
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 227 * 1024; /* of shared memory */
  if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    *value = 9;
  if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction kernel) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

/* Every thread has one from the start. */
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

/* Triton's modules do not load without these, which have nothing to do. */
#define NOTHING(name, ...) CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
NOTHING(cuCtxGetDevice, CUdevice *device)
NOTHING(cuCtxGetLimit, size_t *value, CUlimit limit)
NOTHING(cuCtxSetCurrent, CUcontext context)
NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
NOTHING(cuDeviceGet, CUdevice *device, int ordinal)
NOTHING(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device)
NOTHING(cuDriverGetVersion, int *version)
NOTHING(cuFuncSetAttribute, CUfunction kernel, CUfunction_attribute attribute, int value)
NOTHING(cuFuncSetCacheConfig, CUfunction kernel, CUfunc_cache config)
NOTHING(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *status)
