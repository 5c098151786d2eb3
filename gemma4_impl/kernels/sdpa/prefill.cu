// Attention of many queries on Hopper's tensor cores: one warpgroup copies, one computes scores and probabilities, two
// accumulate the output. Defines: HEAD_DIM 64, 128, 256 or 512; POSITIONS 1 when the mask comes from position vectors, 0
// when query i of T sits at position S - T + i.
#include "common.cuh"

#define MEMBER __device__ __forceinline__
#define INF __int_as_float(0x7f800000)

constexpr int H = HEAD_DIM;
constexpr int KEYS = 64;                          // keys of a tile
constexpr int PARTS = H == 512 ? 1 : 2;           // groups of 64 query rows in a block
constexpr int COLUMNS = H == 512 ? 256 : H;       // of the output, in one accumulating warpgroup
constexpr int CHUNK = 64 * 64 * 2;                // bytes of 64 rows x 64 columns, the width of the 128-byte swizzle
constexpr int CHUNKS = H / 64;
constexpr int K_DIMS = H < 128 ? H : 128;         // a slot of K: 64 keys x 128 dims
constexpr int V_KEYS = H < 128 ? 64 : 8192 / H;   // a slot of V: as many keys, all dims, as fill the same bytes
constexpr int SLOT = KEYS * K_DIMS * 2;
constexpr int K_STEPS = H / K_DIMS, V_STEPS = KEYS / V_KEYS;  // slots of a tile
constexpr int K_SLOTS = H == 512 ? 5 : 4, V_SLOTS = 4;
constexpr float RESCALE = 8;  // the row maximum follows only when it grew by more than a factor 2^8
constexpr int END = -1;

struct Shared {
  u8 q[PARTS * CHUNKS * CHUNK];  // later the output
  u8 k[K_SLOTS][SLOT];
  u8 v[V_SLOTS][SLOT];
  u8 p[PARTS * 2][CHUNK];          // probabilities, two buffers for each part
  float factor[PARTS * 2][64];     // what the output so far is multiplied by; at the end 1 / sum
  u64 q_full;
  u64 k_full[K_SLOTS], k_empty[K_SLOTS], v_full[V_SLOTS], v_empty[V_SLOTS];
  u64 p_full[PARTS * 2], p_empty[PARTS * 2];
  int k_tile[K_SLOTS];      // in the first slot of a tile: 2 * tile + masked, or END
  int p_end[PARTS * 2];     // whether `factor` is the last
};

struct Arguments {
  const i64* q_positions;  // [B, T], row stride below
  const i64* ends;
  const i32* k_positions;  // [B, tiles * 64], -1 where there is no key
  const i32* ranges;       // [B, tiles, 3]: smallest, largest position of the keys, and whether all 64 are there
  i64 q_stride, end_stride;
  float scale;             // log2(e) included
  int batch, heads, kv_heads, queries, keys, tiles, window;
  int head_step, row_step;  // between the parts of a block; one of them is 0
};

// What a block works on.
struct Work {
  int b, head, kv_head, row;
};

DEVICE Work work_of(const Arguments& a) {
  const int together = a.head_step ? PARTS : 1, rows = a.row_step ? 64 * PARTS : 64, unit = blockIdx.x;
  const int groups = a.heads / together, blocks = (a.queries + rows - 1) / rows;
  const int block = blocks - 1 - unit / (groups * a.batch), rest = unit % (groups * a.batch);
  Work w;
  w.b = rest / groups;
  w.head = rest % groups * together;
  w.kv_head = w.head / (a.heads / a.kv_heads);
  w.row = block * rows;
  return w;
}

// Tensor cores: a warpgroup's products, operands in shared memory with the 128-byte swizzle

// The lower half of a matrix descriptor; the upper one is always MATRIX: 1024 bytes between groups of 8 rows.
// `across`: bytes between groups of 64 elements along the row, for an operand whose rows run along k.
DEVICE u32 matrix(u32 address, u32 across = 16) { return across << 12 | (address & 0x3ffff) >> 4; }
#define MATRIX "0x40000040"
// The descriptors are put together here, offsets in bytes, lest the compiler keeps dozens of them in registers.
#define DESCRIPTORS(a, a_offset, b, b_offset)                                       \
  ".reg .b32 x, y;\n.reg .b64 a, b;\nadd.u32 x, " a ", " a_offset ";\nadd.u32 y, " b ", " b_offset ";\n" \
  "mov.b64 a, {x, " MATRIX "};\nmov.b64 b, {y, " MATRIX "};\n"

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F64(d, i) F16(d, i), F16(d, i + 16), F16(d, i + 32), F16(d, i + 48)

// d[64, 64] (+)= a[64, 16] b[64, 16]^T
DEVICE void multiply_keys(float (&d)[32], u32 a, int a_offset, u32 b, int b_offset, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %36, 0;\n" DESCRIPTORS("%32", "%33", "%34", "%35")
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
      "%23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, a, b, p, 1, 1, 0, 0;\n}"
      : F16(d, 0), F16(d, 16)
      : "r"(a), "r"(a_offset / 16), "r"(b), "r"(b_offset / 16), "r"(accumulate));
}
// d[64, n] += a[64, 16] b[16, n], n = 128 or what the head has if that is less: an n of 256 needs more registers than a
// kernel of 512 threads starts with.
template <int columns>
DEVICE void multiply_values(float* d, u32 a, int a_offset, u32 b, int b_offset) {
  if (columns == 64)
    asm volatile(
        "{\n" DESCRIPTORS("%32", "%33", "%34", "%35")
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, a, b, 1, 1, 1, 0, 1;\n}"
        : F16(d, 0), F16(d, 16)
        : "r"(a), "r"(a_offset / 16), "r"(b), "r"(b_offset / 16));
  else
    asm volatile(
        "{\n" DESCRIPTORS("%64", "%65", "%66", "%67")
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
        "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, a, b, 1, 1, 1, 0, 1;\n}"
        : F64(d, 0)
        : "r"(a), "r"(a_offset / 16), "r"(b), "r"(b_offset / 16));
}

// Boxes, as copy_box has them, back to global memory

DEVICE void store_box(const TensorMap& map, u32 shared, int row, int chunk, int head, int b) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4, %5}], [%6];\n"
      "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::"l"(&map),
      "r"(0), "r"(row), "r"(chunk), "r"(head), "r"(b), "r"(shared)
      : "memory");
}
DEVICE void store_matrix(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
// One arrival for this warp.
DEVICE void release(u64* barrier) {
  if (lane_id() == 0) barrier_arrive(barrier);
}

DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A place in a ring of slots, and the parity of the round.
template <int slots>
struct Ring {
  int slot = 0;
  u32 parity = 0;
  MEMBER void next() {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

template <bool inc, int registers>
DEVICE void set_registers() {
  if (inc)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// The warp that copies. It also decides which tiles of keys are looked at, and which of them need a mask.
struct Producer {
  Shared& s;
  const Arguments& a;
  const TensorMap &k_map, &v_map;
  Work w;
  Ring<K_SLOTS> k;
  Ring<V_SLOTS> v;
  int values = -1;  // the tile whose values are still to be copied

  MEMBER void tile(int tile, bool masked) {
    for (int step = 0; step < K_STEPS; ++step) {
      keys(tile, step, 2 * tile + masked);
      if (values >= 0) value(values, step);
    }
    values = tile;
  }
  MEMBER void end() {
    if (values >= 0)
      for (int step = 0; step < V_STEPS; ++step) value(values, step);
    barrier_wait(&s.k_empty[k.slot], k.parity ^ 1);
    s.k_tile[k.slot] = END;
    barrier_arrive(&s.k_full[k.slot]);
  }
  MEMBER void keys(int tile, int step, int info) {
    barrier_wait(&s.k_empty[k.slot], k.parity ^ 1);
    s.k_tile[k.slot] = info;
    barrier_expect(&s.k_full[k.slot], SLOT);
    copy_box(shared_address(s.k[k.slot]), k_map, tile * KEYS, step * (K_DIMS / 64), w.kv_head, w.b, &s.k_full[k.slot]);
    k.next();
  }
  MEMBER void value(int tile, int step) {
    barrier_wait(&s.v_empty[v.slot], v.parity ^ 1);
    barrier_expect(&s.v_full[v.slot], SLOT);
    copy_box(shared_address(s.v[v.slot]), v_map, tile * KEYS + step * V_KEYS, 0, w.kv_head, w.b, &s.v_full[v.slot]);
    v.next();
  }
};

DEVICE void produce(Producer& to) {
  const Arguments& a = to.a;
  const int rows = a.row_step ? 64 * PARTS : 64;
  const int lane = lane_id();
#if POSITIONS
  int first = 0x7fffffff, last = -1, first_end = 0x7fffffff, last_end = -1;
  for (int row = to.w.row + lane; row < min(to.w.row + rows, a.queries); row += 32) {
    const int q = a.q_positions[to.w.b * a.q_stride + row];
    const int end = a.ends ? static_cast<int>(a.ends[to.w.b * a.end_stride + row]) : q;
    if (q < 0) continue;
    first = min(first, q), last = max(last, q), first_end = min(first_end, end), last_end = max(last_end, end);
  }
  first = __reduce_min_sync(0xffffffffu, first), last = __reduce_max_sync(0xffffffffu, last);
  first_end = __reduce_min_sync(0xffffffffu, first_end), last_end = __reduce_max_sync(0xffffffffu, last_end);
  for (int base = 0; base < a.tiles; base += 32) {
    bool seen = false, masked = false;
    if (base + lane < a.tiles) {
      const i32* range = a.ranges + (static_cast<i64>(to.w.b) * a.tiles + base + lane) * 3;
      const int low = range[0], high = range[1];
      seen = high >= 0 && low <= last_end && high > first - a.window;
      masked = !range[2] || high > first_end || low <= last - a.window;
    }
    u32 left = __ballot_sync(0xffffffffu, seen);
    const u32 masks = __ballot_sync(0xffffffffu, masked);
    for (; left; left &= left - 1) {
      const int i = __ffs(left) - 1;
      if (lane == 0) to.tile(base + i, masks >> i & 1);
      __syncwarp();
    }
  }
#else
  const int first = a.keys - a.queries + to.w.row, last = min(first + rows, a.keys) - 1;
  if (lane == 0)
    for (int tile = max(first - a.window + 1, 0) / KEYS; tile * KEYS <= last; ++tile)
      to.tile(tile, tile * KEYS + KEYS - 1 > first || tile * KEYS <= last - a.window);
#endif
  if (lane == 0) to.end();
  __syncwarp();
}

// The warpgroup of scores. A row's 64 scores of a tile are spread over 4 lanes, which hold two rows each: columns
// 8 i + 2 (lane % 4) + {0, 1} of row lane / 4 in [4 i + {0, 1}], of row lane / 4 + 8 in [4 i + {2, 3}].
struct Scores {
  Shared& s;
  const Arguments& a;
  Work w;
  Ring<K_SLOTS> k;
  float top[PARTS][2], sum[PARTS][2];  // in units of log2; the sum is this lane's own
  int q[PARTS][2], end[PARTS][2];
  u32 buffer = 0, buffer_parity = 1;   // of the probabilities

  // Starts the product of one part with the tile in the ring; the last part to do so gives the slots back.
  MEMBER void multiply(float (&x)[32], int part, Ring<K_SLOTS>& k) {
    const bool last = part == PARTS - 1;
    const u32 q = matrix(shared_address(s.q));
    int before = 0;
#pragma unroll
    for (int step = 0; step < K_STEPS; ++step) {
      if (step) barrier_wait(&s.k_full[k.slot], k.parity);
      wgmma_fence();
      const u32 keys = matrix(shared_address(s.k[k.slot]));
#pragma unroll
      for (int i = 0; i < K_DIMS / 16; ++i) {
        const int at = i / 4 * CHUNK + i % 4 * 32;
        multiply_keys(x, q, (part * CHUNKS + step * (K_DIMS / 64)) * CHUNK + at, keys, at, step + i > 0);
      }
      wgmma_commit();
      if (last && step) {
        wgmma_wait<1>();
        release(&s.k_empty[before]);
      }
      before = k.slot;
      k.next();
    }
    held = before;
  }
  int held;  // the slot that the last product still reads
  MEMBER void wait(float (&x)[32], int part) {
    wgmma_wait<0>();
    settle(x);
    if (part == PARTS - 1) release(&s.k_empty[held]);
  }

  MEMBER void mask(float (&x)[32], int part, int tile) {
    const int column = 2 * (lane_id() & 3);
#if POSITIONS
    const i32* keys = a.k_positions + (static_cast<i64>(w.b) * a.tiles + tile) * KEYS + column;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int2 pair = *reinterpret_cast<const int2*>(keys + 8 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = j & 1 ? pair.y : pair.x, r = j / 2;
        if (key < 0 || key > end[part][r] || key <= q[part][r] - a.window) x[4 * i + j] = -INF;
      }
    }
#else
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int high = q[part][r] - tile * KEYS - column, low = high - a.window;
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (8 * i + j > high || 8 * i + j <= low) x[4 * i + 2 * r + j] = -INF;
    }
#endif
  }

  // Scores -> probabilities relative to 2^top, as the operand of the next product.
  MEMBER void softmax(float (&x)[32], int part, int info) {
    if (info & 1) mask(x, part, info >> 1);
    float high[2] = {x[0], x[2]}, factor[2];
#pragma unroll
    for (int i = 0; i < 32; ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], x[i]);
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float& t = top[part][r];
      high[r] = fmaxf(high[r], __shfl_xor_sync(0xffffffffu, high[r], 1));
      high[r] = fmaxf(high[r], __shfl_xor_sync(0xffffffffu, high[r], 2)) * a.scale;
      factor[r] = 1;
      if (high[r] > t + RESCALE) {
        if (t != -INF) factor[r] = exp2_of(t - high[r]);
        sum[part][r] *= factor[r];
        t = high[r];
      }
      base[r] = t == -INF ? 0 : -t;
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] = exp2_of(fmaf(x[i], a.scale, base[i / 2 % 2]));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) total += x[4 * i + 2 * r] + x[4 * i + 2 * r + 1];
      sum[part][r] += total;
    }
    const int lane = lane_id(), row = threadIdx.x / 32 % 4 * 16 + (lane & 15);
    const u32 at = 2 * part + buffer;
    barrier_wait(&s.p_empty[at], buffer_parity);
    const u32 p = shared_address(s.p[at]) + row * 128;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_matrix(p + (((2 * i + lane / 16) ^ (lane & 7)) << 4), to_bf16x2(x[8 * i], x[8 * i + 1]),
                   to_bf16x2(x[8 * i + 2], x[8 * i + 3]), to_bf16x2(x[8 * i + 4], x[8 * i + 5]),
                   to_bf16x2(x[8 * i + 6], x[8 * i + 7]));
    fence_for_engines();
    publish(part, factor, 0);
  }
  MEMBER void publish(int part, const float (&factor)[2], int last) {
    const int lane = lane_id(), row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const u32 at = 2 * part + buffer;
    if (lane % 4 == 0) s.factor[at][row] = factor[0], s.factor[at][row + 8] = factor[1];
    s.p_end[at] = last;
    __syncwarp();
    if (lane == 0) barrier_arrive(&s.p_full[at]);
    if (part == PARTS - 1 && (buffer ^= 1) == 0) buffer_parity ^= 1;
  }

  MEMBER int next_tile() {
    barrier_wait(&s.k_full[k.slot], k.parity);
    return s.k_tile[k.slot];
  }

  MEMBER void run() {
    const int lane = lane_id(), warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = w.row + part * a.row_step + warp * 16 + lane / 4 + 8 * r;
#if POSITIONS
        const bool inside = row < a.queries;
        q[part][r] = inside ? static_cast<int>(a.q_positions[w.b * a.q_stride + row]) : -1;
        end[part][r] = inside && a.ends && q[part][r] >= 0 ? static_cast<int>(a.ends[w.b * a.end_stride + row])
                                                           : q[part][r];
#else
        q[part][r] = end[part][r] = a.keys - a.queries + row;
#endif
        top[part][r] = -INF, sum[part][r] = 0;
      }
    barrier_wait(&s.q_full, 0);
    int info = next_tile();
    float x[32], y[32];
    if (info != END) {
      // While one product runs, the probabilities of the one before are computed.
      Ring<K_SLOTS> at = k;
      multiply(x, 0, at);
      wait(x, 0);
      if (PARTS == 1) k = at;
      while (true) {
        if (PARTS == 2) {
          multiply(y, 1, k);
          softmax(x, 0, info);
          wait(y, 1);
          const int next = next_tile();
          if (next == END) {
            softmax(y, 1, info);
            break;
          }
          at = k;
          multiply(x, 0, at);
          softmax(y, PARTS - 1, info);
          wait(x, 0);
          info = next;
        } else {
          int next = next_tile();
          if (next == END) {
            softmax(x, 0, info);
            break;
          }
          multiply(y, 0, k);
          softmax(x, 0, info);
          wait(y, 0);
          info = next;
          next = next_tile();
          if (next == END) {
            softmax(y, 0, info);
            break;
          }
          multiply(x, 0, k);
          softmax(y, 0, info);
          wait(x, 0);
          info = next;
        }
      }
    }
    const u32 parity = buffer_parity;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      float inverse[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = sum[part][r];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        inverse[r] = total > 0 && q[part][r] >= 0 ? 1 / total : 0;
      }
      barrier_wait(&s.p_empty[2 * part + buffer], parity);
      publish(part, inverse, 1);
    }
  }
};

// A warpgroup of the output: 64 rows x COLUMNS, of its own part or, with one part, of its half of the columns.
DEVICE void accumulate(Shared& s, const Arguments& a, const Work& w, const TensorMap& out_map, int group) {
  const int part = PARTS == 1 ? 0 : group, chunk = PARTS == 1 ? group * (COLUMNS / 64) : 0;
  const int lane = lane_id(), warp = threadIdx.x / 32 % 4, row = warp * 16 + lane / 4;
  float out[COLUMNS / 2];
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) out[i] = 0;
  Ring<V_SLOTS> v;
  Ring<2> buffer;
  float factor[2];
  while (true) {
    const int at = 2 * part + buffer.slot;
    barrier_wait(&s.p_full[at], buffer.parity);
    factor[0] = s.factor[at][row], factor[1] = s.factor[at][row + 8];
    if (s.p_end[at]) break;
    if (__any_sync(0xffffffffu, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; ++i) out[i] *= factor[i / 2 % 2];
    }
    const u32 p = matrix(shared_address(s.p[at]));
    settle(out);
    int before = 0;
#pragma unroll
    for (int step = 0; step < V_STEPS; ++step) {
      barrier_wait(&s.v_full[v.slot], v.parity);
      wgmma_fence();
      const u32 values = matrix(shared_address(s.v[v.slot]) + chunk * V_KEYS * 128, V_KEYS * 128);
#pragma unroll
      for (int i = 0; i < V_KEYS / 16; ++i)
#pragma unroll
        for (int half = 0; half < (COLUMNS + 127) / 128; ++half)
          multiply_values<COLUMNS>(out + 64 * half, p, (step * V_KEYS + 16 * i) * 2, values,
                                   i * 2048 + half * V_KEYS * 256);
      wgmma_commit();
      if (step) {
        wgmma_wait<1>();
        release(&s.v_empty[before]);
      }
      before = v.slot;
      v.next();
    }
    wgmma_wait<0>();
    settle(out);
    release(&s.v_empty[before]);
    if (lane == 0) barrier_arrive(&s.p_empty[at]);
    buffer.next();
  }
  // No score is left to compute: the queries' memory takes the output.
  const u32 to = shared_address(s.q) + (part * CHUNKS + chunk) * CHUNK, line = to + (warp * 16 + (lane & 15)) * 128;
#pragma unroll
  for (int i = 0; i < COLUMNS / 16; ++i) {
    const float* x = out + 8 * i;
    store_matrix(line + i / 4 * CHUNK + (((2 * i % 8 + lane / 16) ^ (lane & 7)) << 4),
                 to_bf16x2(x[0] * factor[0], x[1] * factor[0]), to_bf16x2(x[2] * factor[1], x[3] * factor[1]),
                 to_bf16x2(x[4] * factor[0], x[5] * factor[0]), to_bf16x2(x[6] * factor[1], x[7] * factor[1]));
  }
  fence_for_engines();
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
  if (warp == 0 && lane == 0)
    store_box(out_map, to, w.row + part * a.row_step, chunk, w.head + part * a.head_step, w.b);
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(512, 1)
    attend(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
           const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap out_map,
           const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const Work w = work_of(a);
  const int group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    barrier_init(&s.q_full, 1);
    for (int i = 0; i < K_SLOTS; ++i) barrier_init(&s.k_full[i], 1), barrier_init(&s.k_empty[i], 4);
    for (int i = 0; i < V_SLOTS; ++i) barrier_init(&s.v_full[i], 1), barrier_init(&s.v_empty[i], 8);
    for (int i = 0; i < 2 * PARTS; ++i) barrier_init(&s.p_full[i], 4), barrier_init(&s.p_empty[i], 8 / PARTS);
    barrier_init_fence();
  }
  __syncthreads();
  if (group == 0) {
    set_registers<false, 40>();
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) {
        barrier_expect(&s.q_full, PARTS * CHUNKS * CHUNK);
        for (int part = 0; part < PARTS; ++part)
          copy_box(shared_address(s.q) + part * CHUNKS * CHUNK, q_map, w.row + part * a.row_step, 0,
                   w.head + part * a.head_step, w.b, &s.q_full);
      }
      __syncwarp();
      Producer to{s, a, k_map, v_map, w, {}, {}};
      produce(to);
    }
  } else if (group == 1) {
    set_registers<true, 152>();
    Scores scores{s, a, w};
    scores.run();
  } else {
    set_registers<true, 160>();
    accumulate(s, a, w, out_map, group - 2);
  }
}

// Positions of keys as int32, padded to whole tiles, and each tile's range of them: one warp a tile.
extern "C" __global__ void __launch_bounds__(128)
    key_ranges(const i64* positions, i64 stride, int keys, int tiles, i32* padded, i32* ranges) {
  const int tile = blockIdx.x * 4 + threadIdx.x / 32, b = blockIdx.y, lane = lane_id();
  if (tile >= tiles) return;
  int low = 0x7fffffff, high = -1, all = 1;
  for (int key = tile * KEYS + lane; key < (tile + 1) * KEYS; key += 32) {
    const int x = key < keys ? static_cast<int>(positions[b * stride + key]) : -1;
    padded[static_cast<i64>(b) * tiles * KEYS + key] = x;
    if (x < 0) {
      all = 0;
    } else {
      low = min(low, x), high = max(high, x);
    }
  }
  low = __reduce_min_sync(0xffffffffu, low), high = __reduce_max_sync(0xffffffffu, high);
  all = __all_sync(0xffffffffu, all);
  if (lane == 0) {
    i32* range = ranges + (static_cast<i64>(b) * tiles + tile) * 3;
    range[0] = low, range[1] = high, range[2] = all;
  }
}
