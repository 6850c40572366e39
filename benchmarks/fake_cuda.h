/* A GPU that computes nothing, for benchmarks/fake_cuda.py: memory is the host's, copies are made,
   kernels are counted. It tells torch that it is an H100. Functions that are not here return 0. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define EXPORT __attribute__((visibility("default")))
#include <driver_types.h>
#define HIT(x) static long n; hit(&n, x)
int hit(long *n, const char *name);
static struct {const char *name; long *n;} table[600]; static int used;
int hit(long *n, const char *name){ if(!(*n)++ && used<600){table[used].name=name; table[used++].n=n;} return 0; }
EXPORT int fake_cuda_report(char *out, int size){ int w=0; for(int i=0;i<used;i++){ if(*table[i].n>0) w+=snprintf(out+w,size-w,"%s %ld\n",table[i].name,*table[i].n);} return w; }
EXPORT void fake_cuda_reset(void){ for(int i=0;i<used;i++) *table[i].n=0; used=0; }
EXPORT int cudaGetDeviceCount(int *c){ *c=1; return 0; }
EXPORT int cudaGetDevice(int *d){ *d=0; return 0; }
EXPORT int cudaSetDevice(int d){ return 0; }
EXPORT int cudaDriverGetVersion(int *v){ *v=13000; return 0; }
EXPORT int cudaRuntimeGetVersion(int *v){ *v=13000; return 0; }
EXPORT int cudaGetLastError(void){ return 0; }
EXPORT int cudaPeekAtLastError(void){ return 0; }
EXPORT const char* cudaGetErrorString(int e){ return "fake CUDA error"; }
EXPORT const char* cudaGetErrorName(int e){ return "fakeError"; }
EXPORT int cudaGetDeviceProperties(struct cudaDeviceProp *p, int d){
  memset(p,0,sizeof *p); strcpy(p->name,"NVIDIA H100 80GB HBM3 (imitation)");
  p->totalGlobalMem=80ul<<30; p->sharedMemPerBlock=49152; p->regsPerBlock=65536; p->warpSize=32;
  p->maxThreadsPerBlock=1024; p->maxThreadsDim[0]=p->maxThreadsDim[1]=1024; p->maxThreadsDim[2]=64;
  p->maxGridSize[0]=2147483647; p->maxGridSize[1]=p->maxGridSize[2]=65535; p->totalConstMem=65536;
  p->major=9; p->minor=0; p->multiProcessorCount=132; p->l2CacheSize=52428800; p->maxThreadsPerMultiProcessor=2048;
  p->sharedMemPerMultiprocessor=233472; p->regsPerMultiprocessor=65536; p->sharedMemPerBlockOptin=232448; p->maxBlocksPerMultiProcessor=32;
  p->textureAlignment=512; p->unifiedAddressing=1; p->memoryBusWidth=5120; return 0; }
EXPORT int cudaDeviceGetAttribute(int *v, int a, int d){ struct cudaDeviceProp p; cudaGetDeviceProperties(&p,0);
  switch(a){case cudaDevAttrMultiProcessorCount:*v=132;break; case cudaDevAttrMaxSharedMemoryPerBlockOptin:*v=232448;break; case cudaDevAttrComputeCapabilityMajor:*v=9;break; case cudaDevAttrComputeCapabilityMinor:*v=0;break; case cudaDevAttrMaxThreadsPerBlock:*v=1024;break; case cudaDevAttrMaxSharedMemoryPerBlock:*v=49152;break; case cudaDevAttrWarpSize:*v=32;break; case cudaDevAttrMaxSharedMemoryPerMultiprocessor:*v=233472;break; default:*v=0;} return 0; }
EXPORT int cudaMalloc(void **p, size_t s){ HIT("cudaMalloc"); *p=aligned_alloc(2097152,(s+2097151)/2097152*2097152); if(!*p) return 2; memset(*p,0,s); return 0; }
EXPORT int cudaFree(void *p){ HIT("cudaFree"); free(p); return 0; }
EXPORT int cudaHostAlloc(void **p, size_t s, unsigned f){ HIT("cudaHostAlloc"); *p=aligned_alloc(4096,(s+4095)/4096*4096); return 0; }
EXPORT int cudaFreeHost(void *p){ free(p); return 0; }
EXPORT int cudaMemcpyAsync(void *d,const void *s,size_t c,int k,void *st){ if(k==1){HIT("memcpy HtoD");} else if(k==2){HIT("memcpy DtoH");} else {HIT("memcpy DtoD");} memcpy(d,s,c); return 0; }
EXPORT int cudaMemcpy(void *d,const void *s,size_t c,int k){ HIT("cudaMemcpy (sync)"); memcpy(d,s,c); return 0; }
EXPORT int cudaMemsetAsync(void *d,int v,size_t c,void *st){ HIT("cudaMemsetAsync"); memset(d,v,c); return 0; }
EXPORT int cudaMemset(void *d,int v,size_t c){ memset(d,v,c); return 0; }
EXPORT int cudaMemGetInfo(size_t *f,size_t *t){ *f=*t=80ul<<30; return 0; }
EXPORT int cudaDeviceGetStreamPriorityRange(int *l,int *g){ *l=0; *g=-5; return 0; }
EXPORT int cudaStreamCreateWithPriority(void **s,unsigned f,int p){ *s=malloc(16); return 0; }
EXPORT int cudaStreamCreateWithFlags(void **s,unsigned f){ *s=malloc(16); return 0; }
EXPORT int cudaStreamCreate(void **s){ *s=malloc(16); return 0; }
EXPORT int cudaStreamIsCapturing(void *s,int *st){ *st=0; return 0; }
EXPORT int cudaStreamGetCaptureInfo(void *s,int *st,unsigned long long *id,void*a,void*b,void*c,void*e){ *st=0; if(id)*id=0; return 0; }
EXPORT int cudaStreamGetPriority(void *s,int *p){ *p=0; return 0; }
EXPORT int cudaEventCreateWithFlags(void **e,unsigned f){ *e=malloc(16); return 0; }
EXPORT int cudaEventCreate(void **e){ *e=malloc(16); return 0; }
EXPORT int cudaEventElapsedTime(float *t,void *a,void *b){ *t=1; return 0; }
EXPORT int cudaDeviceCanAccessPeer(int *c,int a,int b){ *c=0; return 0; }
EXPORT int cudaPointerGetAttributes(struct cudaPointerAttributes *a,const void *p){ memset(a,0,sizeof *a); a->type=cudaMemoryTypeUnregistered; return 0; }
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n_,const void *f,int b,size_t s,unsigned fl){ *n_=2; return 0; }
EXPORT int cudaFuncGetAttributes(struct cudaFuncAttributes *a,const void *f){ memset(a,0,sizeof *a); a->maxThreadsPerBlock=1024; a->numRegs=32; a->binaryVersion=a->ptxVersion=90; a->maxDynamicSharedSizeBytes=232448; return 0; }
EXPORT int cudaDeviceGetPCIBusId(char *s,int l,int d){ snprintf(s,l,"0000:00:00.0"); return 0; }
static int zero(void){ return 0; }
EXPORT int cuDevicePrimaryCtxGetState(int d,unsigned *f,int *a){ *f=0; *a=1; return 0; }
EXPORT int cuCtxGetCurrent(void **c){ *c=(void*)64; return 0; }
EXPORT int cuCtxGetDevice(int *d){ *d=0; return 0; }
EXPORT int cuDeviceGet(int *d,int o){ *d=0; return 0; }
EXPORT int cuDeviceGetAttribute(int *v,int a,int d){ switch(a){case 97:*v=232448;break;case 16:*v=132;break;case 10:*v=32;break;case 75:*v=9;break;case 76:*v=0;break;case 12:*v=65536;break;case 1:*v=1024;break;default:*v=1000;} return 0; }
EXPORT int cuFuncGetAttribute(int *v,int a,void *f){ *v = a==4?32:0; if(a==0)*v=1024; return 0; }
EXPORT int cuModuleLoadData(void **m,const void *i){ HIT("cuModuleLoadData"); *m=malloc(8); return 0; }
EXPORT int cuModuleGetFunction(void **f,void *m,const char *n_){ *f=malloc(8); return 0; }
EXPORT int cuGetErrorString(int e,const char **s){ *s="fake driver error"; return 0; }
EXPORT int cuLaunchKernelEx(void *c,void *f,void **a,void **b){ HIT("cuLaunchKernelEx (triton)"); return 0; }
EXPORT int cuLaunchKernel(void *f){ HIT("cuLaunchKernel (triton)"); return 0; }
EXPORT int cuDriverGetVersion(int *v){ *v=13000; return 0; }
EXPORT int cuDeviceGetCount(int *v){ *v=1; return 0; }
EXPORT int cuInit(unsigned f){ return 0; }
EXPORT int cudaGetDriverEntryPointByVersion(const char *s,void **f,unsigned v,unsigned long long fl,int *st){
  *f = strcmp(s,"cuDevicePrimaryCtxGetState")?(void*)zero:(void*)cuDevicePrimaryCtxGetState; if(st)*st=0; return 0; }
EXPORT int cublasCreate_v2(void **h){ *h=malloc(64); return 0; }
EXPORT int cublasLtCreate(void **h){ *h=malloc(64); return 0; }
EXPORT int cublasGetMathMode(void *h,int *m){ *m=0; return 0; }
EXPORT int cublasGetPointerMode_v2(void *h,int *m){ *m=0; return 0; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*a,void*b,void*c,void*d,void*e,void*f,void*g,int n_,void*r,int *found){ memset(r,0,96*n_); *found=1; return 0; }
EXPORT const char* cublasGetStatusString(int s){ return "fake"; }
EXPORT const char* cublasLtGetStatusString(int s){ return "fake"; }
EXPORT unsigned long cudnnGetVersion(void){ const char *v=getenv("FAKE_CUDNN"); return v?atol(v):92000; }
EXPORT unsigned long cudnnGetCudartVersion(void){ return 13000; }
EXPORT int cudnnCreate(void **h){ *h=malloc(64); return 0; }
EXPORT const char* cudnnGetErrorString(int s){ return "fake cudnn"; }
EXPORT int cudnnBackendCreateDescriptor(int t,void **d){ *d=malloc(64); return 0; }
EXPORT int cudnnBackendGetAttribute(void *d,int name,int type,long req,long *count,void *arr){
  if(name==202){ *count=1; return 0; }
  if(count) *count = req==1 && type==3;
  if(req==1 && arr && type==3) *(long*)arr=0;
  return 0; }
EXPORT int cudnnBackendExecute(void *h,void *p,void *v){ HIT("cudnnBackendExecute"); return 0; }
EXPORT int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*a,int b,int c,void*d,void*e,void*f,void*g,void*h,size_t*s){ *s=0; return 0; }
EXPORT int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*a,int b,int c,void*d,void*e,void*f,void*g,void*h,void*i,void*j,size_t*s){ *s=0; return 0; }
EXPORT int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*a,int b,int c,void*d,void*e,size_t*s){ *s=0; return 0; }
