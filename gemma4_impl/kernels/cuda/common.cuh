// PTX that CUDA C++ has no word for: asynchronous copies, barriers, tensor cores, clusters. No other header is needed.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;
using bf16 = unsigned short;  // the bits

#define DEVICE static __device__ __forceinline__

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
DEVICE u32 lane_id() { return threadIdx.x & 31; }

// bfloat16

DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
DEVICE float low_float(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_float(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
// Round to nearest even; `low` goes to the lower half.
DEVICE u32 to_bf16x2(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float round_bf16(float x) { return to_float(to_bf16(x)); }
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <int lut>
DEVICE u32 lop3(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(lut));
  return d;
}

// Four-bit codes as numbers. An integer below 2^8 is, bit for bit, a bfloat16 number, 2^-133 times it. What it is
// multiplied with is multiplied with 2^96 before, so that a code of 1 times an x of 1 comes out as ONE.

constexpr u32 RAISED = 0x6f806f80u, SIXTEEN = 0x41804180u;  // 2^96 and 16, twice
constexpr float ONE = 0x1p-37f, LOWERED = 0x1p37f;
// Eight codes as the tensor cores take them: pairs (k, k + 1) of rows g and g + 8, then (k + 2, k + 3). A byte has a code
// of row g and, 16 times, one of row g + 8; for row g it stays whole, which is cheaper, and the sums are subtracted.
DEVICE void widen(u32 word, u32 (&a)[4]) {
  a[0] = word & 0x00ff00ffu, a[1] = word & 0x00f000f0u;
  a[2] = __byte_perm(word, 0, 0x4341), a[3] = a[2] & 0x00f000f0u;
}
// -0 is added, which changes no sign.
DEVICE u32 times(u32 pair, u32 by) { return fma_bf16x2(pair, by, 0x80008000u); }
DEVICE uint4 times(const uint4& v, u32 by) { return {times(v.x, by), times(v.y, by), times(v.z, by), times(v.w, by)}; }

// Sums over the lanes of a warp

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// Flags in global memory, by which blocks of threads tell each other what they have written

DEVICE u32 load_acquire(const u32* p) {
  u32 x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
DEVICE void store_release(u32* p, u32 x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// Without an order to what else is read and written
template <class T>
DEVICE T load_volatile(const T* p) { return *static_cast<const volatile T*>(p); }
template <class T>
DEVICE void store_volatile(T* p, T x) { *static_cast<volatile T*>(p) = x; }

// Programmatic dependent launch: what the previous kernel wrote may be read after `grid_wait`; after `grid_trigger` in
// all blocks of this kernel the next one may start (it still waits for this one's end before it reads).

DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void grid_trigger() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Shared memory

// What was there.
DEVICE u32 shared_add(u32* p, u32 x) {
  u32 before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(shared_address(p)), "r"(x) : "memory");
  return before;
}
// `v` stays as it is where not `mine`, in its register: an `if` may go by way of local memory.
DEVICE void load_if(bool mine, uint4& v, const void* shared) {
  asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %5, 0;\n @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "r"(shared_address(shared)), "r"(static_cast<u32>(mine)));
}

// Barriers in shared memory

DEVICE void barrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialized barriers visible to the copy engine and the cluster.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE bool barrier_try(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}
DEVICE void barrier_wait(u64* barrier, u32 parity) {
  while (!barrier_try(barrier, parity)) {
  }
}

// Asynchronous copies

// `bytes` (a multiple of 16) from global to shared memory, both aligned to 16; counted by `barrier`.
DEVICE void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// A TMA descriptor
struct alignas(64) TensorMap {
  u8 bytes[128];
};
// A box [1, 1, chunks, rows, 64] of a tensor [B, heads, H / 64, rows, 64] of bfloat16
DEVICE void copy_box(u32 shared, const TensorMap& map, int row, int chunk, int head, int b, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], "
      "[%7];" ::"r"(shared),
      "l"(&map), "r"(0), "r"(row), "r"(chunk), "r"(head), "r"(b), "r"(shared_address(barrier))
      : "memory");
}
DEVICE void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// A line, to the L2 only
DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory"); }
// 16 bytes, of which `copy_wait`, by the same thread, knows.
DEVICE void copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// `barrier` waits for what this thread has asked for by copy16, too.
DEVICE void barrier_await_copies(u64* barrier) {
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// What this thread has written to shared memory is seen by bulk copies and `wgmma` that are started later.
DEVICE void fence_for_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Tensor cores

// d[16, 8] += a[16, 16] b[16, 8] in float32; the layout of the registers is that of PTX's mma.m16n8k16.
DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d = a b + c, likewise
DEVICE void mma_from(float (&d)[4], const float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
DEVICE void load_matrix(u32 (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
DEVICE void load_matrix_transposed(u32 (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
// Row i of the 8 x 8 whose column i this was; a word is two neighbours in a row.
DEVICE u32 transposed(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// A warpgroup's products, which are waited for; of those committed the last `pending` may still run.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from using accumulators before this point.
template <int n>
DEVICE void settle(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// A matrix [16, n] in shared memory, as [2][n] vectors of 8: `wgmma`'s b. Vectors are added like whole numbers.
template <int n>
DEVICE u64 matrix_of(const void* shared) {
  return u64{8} << 32 | n << 16 | __shfl_sync(0xffffffffu, shared_address(shared) / 16, 0);  // the same in all lanes
}
// d[64, n] += a[64, 16] b[16, n], n 8 or 16; each warp has 16 rows of d and a, in registers as for `mma`.
template <int n>
DEVICE void wgmma(float (&d)[n / 2], const u32 (&a)[4], u64 b) {
  if constexpr (n == 8)
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, p, 1, 1, 0;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, "
                 "1, 1, 0;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Clusters

DEVICE u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The address of another block's copy of a shared variable, for ld.shared::cluster and st.shared::cluster.
DEVICE u32 cluster_address(const void* shared, u32 rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
}
DEVICE float cluster_load(u32 address) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
