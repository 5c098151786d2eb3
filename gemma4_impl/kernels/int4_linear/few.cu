// 2 to 16 tokens times four-bit weights, and weights back to bfloat16. See matvec.cu for the tiles.
//
// A block of threads takes two tiles each of twelve row blocks at a time, a row block for each of its warps, together with
// the same columns of all tokens, which are the columns of the tensor cores' B. Blocks share the work evenly, so that
// twelve row blocks may be begun by one and ended by others: the one that has the first columns adds up what the others
// leave. Each warp has a ring of its own for tiles; x and its sums go through one that all of them read.
//
// Each group's product is scaled in float32. What the codes are too much, and the zeros, are a small product of their own:
// scales (or zeros) times the sums of x over the groups, which two warps make, as they multiply x with 2^96 where it is.
#include "common.cuh"

// GROUP, ZERO, SPLIT: as in matvec.cu. WIDE: 1 for up to 8 tokens, 2 for up to 16. BLOCKS: row blocks at a time. SPAN:
// columns of tiles in a stage. STAGES, X_STAGES: of the rings. SUMMERS: warps that make sums of x.

constexpr int ROWS = 16, COLUMNS = 256, WARPS = BLOCKS;
constexpr int SCALES = ROWS * COLUMNS / GROUP * 2;
constexpr int TILE = ROWS * COLUMNS / 2 + SCALES * (1 + ZERO);
constexpr int CODES = SPLIT ? COLUMNS / 2 : COLUMNS;  // columns of x in a tile
constexpr int X_ROW = SPAN * CODES + 32;              // padded against bank conflicts
constexpr int TOKENS = 8 * WIDE;
constexpr int SUMS = SPAN * TOKENS * 4 * 8;           // bytes: upper and lower halves for two groups each
constexpr int STAGE = SPAN * TILE;                    // of a warp's ring
constexpr int X_STAGE = TOKENS * X_ROW * 2 + SUMS * (1 + ZERO);
constexpr int LEAD = 4;                               // stages that are not yet asked for when the next kernel may start
constexpr int X_COPIER = WARPS, RELEASER = WARPS + 1, SUMMER = WARPS + 2, THREADS = (WARPS + 2 + SUMMERS) * 32;

struct Arguments {
  const u8* weight;
  const bf16* x;   // [M, K]
  bf16* out;       // [M, N]
  float* partials; // [blocks, BLOCKS * 32, 4 WIDE]
  u32* flags;      // [blocks], zero between launches
  int m, n, k, columns, row_blocks;
  u32 zero;        // 0, which the compiler does not know
  float less;      // minus what the codes are too much
};

// A tile's scales (or zeros) of rows g and g + 8 in a chunk
DEVICE uint2 scales_at(const u8* at, int chunk) {
  const int g = lane_id() / 4;
  if constexpr (GROUP == 32) return reinterpret_cast<const uint2*>(at)[g * 4 + chunk];
  return {reinterpret_cast<const u32*>(at)[GROUP == 64 ? g * 4 + chunk : g * 2 + chunk / 2], 0};
}

// As the tensor cores' A: 16 rows x 8 groups, twice; 16 times those of rows g + 8
DEVICE void scales_as_matrix(uint2 mine, u32 (&a)[4]) {
  if constexpr (GROUP == 32) {
    a[0] = a[2] = mine.x, a[1] = a[3] = times(mine.y, SIXTEEN);
  } else {
    a[0] = a[2] = __byte_perm(mine.x, 0, 0x1010), a[1] = a[3] = times(__byte_perm(mine.x, 0, 0x3232), SIXTEEN);
  }
}

// As factors: [half][row]
DEVICE void scales_of(uint2 both, float (&s)[2][2]) {
  if constexpr (GROUP == 32) {
    s[0][0] = low_float(both.x), s[1][0] = high_float(both.x);
    s[0][1] = low_float(both.y), s[1][1] = high_float(both.y);
  } else {
    s[0][0] = s[1][0] = low_float(both.x), s[0][1] = s[1][1] = high_float(both.x);
  }
}

// Upper and lower half of two numbers as pairs of bfloat16
DEVICE uint2 halves_of(float x, float y) {
  const float high_x = round_bf16(x), high_y = round_bf16(y);
  return {to_bf16x2(high_x, high_y), to_bf16x2(x - high_x, y - high_y)};
}

// Arrives at the barrier when all of this thread's `copy16` so far have.
DEVICE void arrive_when_copied(u64* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

DEVICE void barrier_of(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) few(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
  u8* ring = shared;                            // [STAGES, BLOCKS, STAGE]
  u8* x_ring = ring + STAGES * BLOCKS * STAGE;  // [X_STAGES, X_STAGE]
  u64* filled = reinterpret_cast<u64*>(x_ring + X_STAGES * X_STAGE);
  u64* x_filled = filled + STAGES * BLOCKS;
  u64* summed = x_filled + X_STAGES;
  u64* x_emptied = summed + X_STAGES;
  u64* left = x_emptied + X_STAGES;             // sums that another block of threads adds up
  const int tall = (a.row_blocks + BLOCKS - 1) / BLOCKS;  // groups of row blocks
  const int spans = (a.columns + SPAN - 1) / SPAN;
  const i64 total = i64{tall} * spans;
  const int first = static_cast<int>(total * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);

  if (warp == RELEASER) {
    for (int s = lane; s < STAGES * BLOCKS; s += 32) barrier_init(filled + s, 1);
    if (lane < X_STAGES)
      barrier_init(x_filled + lane, 32), barrier_init(summed + lane, 32 * SUMMERS), barrier_init(x_emptied + lane, WARPS);
    if (lane == 0) barrier_init(left, WARPS);
    barrier_init_fence();
  }
  for (int s = 0; s < X_STAGES; ++s)
    for (int i = threadIdx.x; i < TOKENS * X_ROW / 8; i += blockDim.x)
      reinterpret_cast<uint4*>(x_ring + s * X_STAGE)[i] = {0, 0, 0, 0};
  __syncthreads();

  // Tiles that are asked for next, by lane 0 of each warp.
  int ahead = first, ahead_group = first / spans, ahead_column = first % spans, ahead_stage = 0;
  const auto fetch = [&](u32 none) {
    const int block = ahead_group * BLOCKS + warp, column = ahead_column * SPAN;
    u64* barrier = filled + ahead_stage * BLOCKS + warp;
    if (block < a.row_blocks) {
      const int bytes = min(SPAN, a.columns - column) * TILE;
      barrier_expect(barrier, bytes);
      copy_bulk(ring + (ahead_stage * BLOCKS + warp) * STAGE, a.weight + (i64{block} * a.columns + column) * TILE + none,
                bytes, barrier);
    } else {
      barrier_arrive(barrier);
    }
    if (++ahead == max(first + 1, last - LEAD) && warp == 0) grid_trigger();
    if (++ahead_column == spans) ahead_column = 0, ++ahead_group;
    if (++ahead_stage == STAGES) ahead_stage = 0;
  };
  if (warp < WARPS && lane == 0)
    for (int i = 0; i < min(STAGES, last - first); ++i) fetch(0);
  grid_wait();
  const auto x_of = [&](int stage) { return reinterpret_cast<bf16*>(x_ring + stage * X_STAGE); };
  if (warp == X_COPIER) {
    for (int unit = first, stage = 0, parity = 1; unit < last; ++unit) {
      barrier_wait(x_emptied + stage, parity);
      const int column = unit % spans * SPAN * CODES;
      bf16* to = x_of(stage);
      for (int m = 0; m < a.m; ++m)
#pragma unroll
        for (int i = lane * 8; i < SPAN * CODES; i += 32 * 8) {  // what was there would be multiplied with 2^96 again
          const bool valid = column + i < a.k;
          copy16(to + m * X_ROW + i, valid ? a.x + i64{m} * a.k + column + i : a.x, valid);
        }
      arrive_when_copied(x_filled + stage);
      if (++stage == X_STAGES) stage = 0, parity ^= 1;
    }
    copy_wait();
    return;
  }
  if (warp == RELEASER) {
    // By a warp of its own: with copies under way, this takes microseconds.
    if (lane == 0 && first % spans) {
      barrier_wait(left, 0);
      store_release(a.flags + blockIdx.x, 1);
    }
    return;
  }
  const auto sums_of = [&](int stage) {
    return reinterpret_cast<uint2*>(x_ring + stage * X_STAGE + TOKENS * X_ROW * 2);
  };

  if (warp >= SUMMER) {
    for (int unit = first, stage = 0, parity = 0; unit < last; ++unit) {
      barrier_wait(x_filled + stage, parity);
#pragma unroll
      for (int i = threadIdx.x - SUMMER * 32; i < SPAN * TOKENS * 4; i += 32 * SUMMERS) {
        const int n = i % TOKENS, at = i / TOKENS;  // groups 2 at and 2 at + 1
        constexpr int VECTORS = CODES / 64;         // of 8 in a group
        uint4* x = reinterpret_cast<uint4*>(x_ring + stage * X_STAGE + n * X_ROW * 2) + at * 2 * VECTORS;
        float sum[2] = {};
#pragma unroll
        for (int j = 0; j < VECTORS; ++j)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            uint4& from = x[k * VECTORS + (j + lane / 2) % VECTORS];
            const uint4 v = from;
            from = times(v, RAISED);
            sum[k] += low_float(v.x) + high_float(v.x) + low_float(v.y) + high_float(v.y) + low_float(v.z) +
                      high_float(v.z) + low_float(v.w) + high_float(v.w);
          }
        const int to = (at / 4 * TOKENS + n) * 4 + at % 4;
        sums_of(stage)[to] = halves_of(a.less * ONE * sum[0], a.less * ONE * sum[1]);
        if constexpr (ZERO) sums_of(stage)[SUMS / 8 + to] = halves_of(ONE * sum[0], ONE * sum[1]);
      }
      barrier_arrive(summed + stage);
      if (++stage == X_STAGES) stage = 0, parity ^= 1;
    }
    return;
  }

  // Of eight bits, lanes 0 and 1 have high nibbles, which count 16 times.
  const u32 by = SPLIT && t < 2 ? SIXTEEN : 0x3f803f80u;
  int stage = 0, parity = 0, x_stage = 0, x_parity = 0;
  for (int unit = first; unit < last;) {
    const int group = unit / spans, begin = unit, end = min(last, (group + 1) * spans);
    float c[WIDE][4] = {};
    for (; unit < end; ++unit) {
      barrier_wait(summed + x_stage, x_parity);
      barrier_wait(filled + stage * BLOCKS + warp, parity);
      const int tiles = min(SPAN, a.columns - unit % spans * SPAN);
#pragma unroll
      for (int at = 0; at < SPAN; ++at) {
        if (at >= tiles) break;
        const u8* data = ring + (stage * BLOCKS + warp) * STAGE + at * TILE;
        const bf16* x = x_of(x_stage) + at * CODES;
        uint4 words[4];
        uint2 scales[4], zeros;
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
          words[chunk] = reinterpret_cast<const uint4*>(data + chunk * 512)[lane];
          scales[chunk] = scales_at(data + 2048, chunk);
        }
        if (ZERO) zeros = scales_at(data + 2048 + SCALES, t);
        if (at + 1 == tiles) {
          // The room is given back as soon as all of it is in registers. The ballot, 0, needs every lane's: a load that was
          // only issued could be overtaken by the copy that refills the room.
          u32 loaded = words[0].x | words[1].x | words[2].x | words[3].x;
          loaded |= scales[0].x | scales[1].x | scales[2].x | scales[3].x;
          if (ZERO) loaded |= zeros.x;
          const u32 none = __ballot_sync(0xffffffffu, loaded & a.zero);
          if (lane == 0 && ahead < last) fetch(none);
        }
#pragma unroll
        for (int i = 0; i < 1 + ZERO; ++i) {
          u32 s[4];
          const uint2 low = t & 1 ? scales[1] : scales[0], high = t & 1 ? scales[3] : scales[2];
          scales_as_matrix(i ? zeros : t & 2 ? high : low, s);
#pragma unroll
          for (int n = 0; n < WIDE; ++n) {
            const uint2 sum = sums_of(x_stage)[i * (SUMS / 8) + (at * TOKENS + n * 8) * 4 + lane];
            mma(c[n], s, {sum.x, sum.y});
          }
        }
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
          float s[2][2];
          scales_of(scales[chunk], s);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            u32 w[2][4];
            widen(half ? words[chunk].z : words[chunk].x, w[0]);
            widen(half ? words[chunk].w : words[chunk].y, w[1]);
            const int column = SPLIT ? (chunk * 2 + half) * 16 + t % 2 * 8 : chunk * 64 + half * 32 + t * 8;
#pragma unroll
            for (int n = 0; n < WIDE; ++n) {
              uint4 b = *reinterpret_cast<const uint4*>(x + (n * 8 + g) * X_ROW + column);
              if constexpr (SPLIT) b = times(b, by);
              float d[4];
              mma_first(d, w[0], {b.x, b.y});
              mma(d, w[1], {b.z, b.w});
              c[n][0] += s[half][0] * (d[0] - d[2]), c[n][1] += s[half][0] * (d[1] - d[3]);
              c[n][2] += s[half][1] * d[2], c[n][3] += s[half][1] * d[3];
            }
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(x_emptied + x_stage);
      if (++stage == STAGES) stage = 0, parity ^= 1;
      if (++x_stage == X_STAGES) x_stage = 0, x_parity ^= 1;
    }
    const i64 mine = blockIdx.x * BLOCKS * 32 + threadIdx.x;
    if (begin > group * spans) {  // another block has the first columns
#pragma unroll
      for (int i = 0; i < WIDE; ++i)
        reinterpret_cast<float4*>(a.partials)[mine * WIDE + i] = {c[i][0], c[i][1], c[i][2], c[i][3]};
      __syncwarp();
      if (lane == 0) barrier_arrive(left);
      continue;
    }
    // Those who have the rest are asked all at once, and then read: one by one, each would take two trips to the L2.
    int others = 0;
    for (i64 reached = end; reached < (group + 1) * spans; ++others)
      reached = total * (blockIdx.x + others + 2) / gridDim.x;
    if (threadIdx.x < others) {
      u32* flag = a.flags + blockIdx.x + 1 + threadIdx.x;
      while (!load_acquire(flag)) {
      }
      *flag = 0;
    }
    if (others) barrier_of(2, BLOCKS * 32);
#pragma unroll 4
    for (int other = 0; other < others; ++other)
#pragma unroll
      for (int i = 0; i < WIDE; ++i) {
        const i64 from = mine + (1 + other) * BLOCKS * 32;
        const float4 more = __ldcg(reinterpret_cast<const float4*>(a.partials) + from * WIDE + i);
        c[i][0] += more.x, c[i][1] += more.y, c[i][2] += more.z, c[i][3] += more.w;
      }
#pragma unroll
    for (int i = 0; i < WIDE; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = i * 8 + 2 * t + j % 2, n = (group * BLOCKS + warp) * ROWS + g + j / 2 * 8;
        if (token < a.m && n < a.n) a.out[i64{token} * a.n + n] = to_bf16(c[i][j] * (j < 2 ? LOWERED : LOWERED / 16));
      }
  }
}

// Row blocks from blockIdx.y on, as they are multiplied with: bfloat16 [rows, K], a tile a warp.
extern "C" __global__ void __launch_bounds__(256) dequantize_rows(const u8* tiles, bf16* out, int columns, int rows,
                                                                        int k, int offset) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4, column = blockIdx.x * 8 + threadIdx.x / 32;
  if (column >= columns) return;
  const u8* data = tiles + (i64{blockIdx.y} * columns + column) * TILE;
  const bool high = SPLIT && t < 2;
  const float minus = high ? 136.0f : 128.0f + offset;
  uint4 words[4];
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) words[chunk] = __ldcs(reinterpret_cast<const uint4*>(data + chunk * 512) + lane);
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) {
    float s[2][2], z[2][2] = {};
    scales_of(scales_at(data + 2048, chunk), s);
    if constexpr (ZERO) scales_of(scales_at(data + 2048 + SCALES, chunk), z);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 pairs[2] = {half ? words[chunk].z : words[chunk].x, half ? words[chunk].w : words[chunk].y};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scale = s[half][r], zero = z[half][r];
        float w[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const u32 wide = lop3<(0xf0 & 0xcc) | 0xaa>(pairs[i / 2] >> (4 * (i % 2 * 2 + r)), 0x000f000fu, 0x43004300u);
          w[i * 2] = low_float(wide) - minus, w[i * 2 + 1] = high_float(wide) - minus;
        }
        if constexpr (SPLIT) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float other = __shfl_xor_sync(0xffffffffu, w[i], 2);
            w[i] = high ? 16 * w[i] + other : 16 * other + w[i];
          }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) w[i] = scale * w[i] + zero;
        const int row = blockIdx.y * ROWS + r * 8 + g;
        const int at = SPLIT ? column * CODES + (chunk * 2 + half) * 16 + t % 2 * 8
                             : column * CODES + chunk * 64 + half * 32 + t * 8;
        if (row < rows && at < k && (!SPLIT || t / 2 == r))
          *reinterpret_cast<uint4*>(out + i64{row} * k + at) = {to_bf16x2(w[0], w[1]), to_bf16x2(w[2], w[3]),
                                                               to_bf16x2(w[4], w[5]), to_bf16x2(w[6], w[7])};
      }
    }
  }
}
