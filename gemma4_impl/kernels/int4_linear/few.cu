// 2 to 16 tokens times four-bit weights, and weights back to bfloat16. See matvec.cu for the tiles.
//
// A block of threads takes two tiles each of twelve row blocks at a time, a row block for each of its warps, together with
// the same columns of all tokens, which are the columns of the tensor cores' B. Blocks share the work evenly, so that
// twelve row blocks may be begun by one and ended by others: the one that has the first columns adds up what the others
// leave. Each warp has a ring of its own for tiles; x goes through one that all of them read. Four warps multiply together
// (`wgmma`), each with its own rows in registers; x stays in shared memory.
//
// Weights are bfloat16 when they are multiplied, as `naive.py` has them: a pair of codes, which are subnormal numbers, is
// one `fma` with its scales and offsets. So all of a row is one sum, and eight more tokens cost no instructions.
#include "common.cuh"

// GROUP, ZERO, SPLIT: as in matvec.cu; OFFSET: of the weight. WIDE: 1 for up to 8 tokens, 2 for up to 16. BLOCKS: row blocks
// at a time. SPAN: columns of tiles in a stage. STAGES, X_STAGES: of the rings. COPIERS: warps that fetch x.

constexpr int ROWS = 16, COLUMNS = 256, WARPS = BLOCKS;
constexpr int SCALES = ROWS * COLUMNS / GROUP * 2;
constexpr int TILE = ROWS * COLUMNS / 2 + SCALES * (1 + ZERO);
constexpr int CODES = SPLIT ? COLUMNS / 2 : COLUMNS;  // columns of x in a tile
constexpr int TOKENS = 8 * WIDE;
constexpr int X_STAGE = SPAN * COLUMNS * TOKENS * 2;  // bytes: [32 columns][4][TOKENS] vectors of 8, as `wgmma` takes it
constexpr int STAGE = SPAN * TILE;                    // of a warp's ring
constexpr int LEAD = 2;                               // units of x that are not yet asked for when the next kernel may start
constexpr int RELEASER = WARPS, COPIER = WARPS + 1, THREADS = (WARPS + 1 + COPIERS) * 32;
// Tiles of so many stages are asked for before x, which would wait behind more. Beyond 8 tokens, all: less took longer.
constexpr int BEFORE_X = WIDE == 1 ? 1 : STAGES;
constexpr int ASKED = (WARPS + COPIERS) * 32;         // threads of the barrier between x and the rest
// Whether the offset is subtracted from the codes: else scales times it are added, which must be exact.
constexpr bool SUBTRACT = OFFSET && (SPLIT || ZERO || (OFFSET & (OFFSET - 1)));
static_assert(WARPS % 4 == 0, "four multiply together");
static_assert(COPIERS % WIDE == 0 && SPAN * 8 * WIDE % COPIERS == 0, "copiers have equal shares");

struct Arguments {
  const u8* weight;
  const bf16* x;   // [M, K]
  bf16* out;       // [M, N]
  float* partials; // [blocks, BLOCKS * 32, 4 WIDE]
  u32* flags;      // [blocks], zero between launches
  int m, n, k, columns, row_blocks;
  int share, longer;  // units of a block, of which so many have one more
  u32 zero;        // 0, which the compiler does not know
};

// A tile's scales (or zeros) of rows g and g + 8 in a chunk
DEVICE uint2 scales_at(const u8* at, int chunk) {
  const int g = lane_id() / 4;
  if constexpr (GROUP == 32) return reinterpret_cast<const uint2*>(at)[g * 4 + chunk];
  return {reinterpret_cast<const u32*>(at)[GROUP == 64 ? g * 4 + chunk : g * 2 + chunk / 2], 0};
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

DEVICE u32 pair_of(float x) { return to_bf16x2(x, x); }

// A tile's scales (or zeros) of rows g and g + 8: [chunk][row] pairs in groups of 32, else [group] pairs of both rows
DEVICE void scales_at(const u8* mine, uint4 (&s)[2]) {
  constexpr int BYTES = 4 * 256 / GROUP;  // of a lane
  if constexpr (BYTES >= 16) {
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i) s[i] = reinterpret_cast<const uint4*>(mine)[i];
  } else {
    const uint2 both = *reinterpret_cast<const uint2*>(mine);
    s[0] = {both.x, both.y, 0, 0};
  }
}
// The pair that has a chunk's, and in which half of it they are
DEVICE u32 scale_of(const uint4 (&s)[2], int chunk, int row) {
  const int i = GROUP == 32 ? chunk * 2 + row : chunk * 64 / GROUP;
  return i % 4 == 0 ? s[i / 4].x : i % 4 == 1 ? s[i / 4].y : i % 4 == 2 ? s[i / 4].z : s[i / 4].w;
}
DEVICE bool upper_of(int half, int row) { return GROUP == 32 ? half : row; }

// One half of a pair, twice; the compiler makes it part of the instruction that takes it.
DEVICE u32 twice(u32 pair, bool upper) {
  u32 d;
  if (upper)
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %1;\nmov.b32 %0, {b, b};\n}" : "=r"(d) : "r"(pair));
  else
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %1;\nmov.b32 %0, {a, a};\n}" : "=r"(d) : "r"(pair));
  return d;
}

// Asks for tiles, if `wanted` > 0, by one lane: without a branch, in which the compiler would ask whether addresses are the
// same in all lanes.
DEVICE void ask(u32 shared, const u8* global, u32 bytes, u32 barrier, int wanted) {
  asm volatile(
      "{\n.reg .pred p, q;\nelect.sync _|p, 0xffffffff;\nsetp.gt.and.s32 p, %4, 0, p;\nsetp.ne.and.b32 q, %2, 0, p;\n"
      "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
      "@q cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n}" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "r"(wanted)
      : "memory");
}

DEVICE void barrier_arrive_of(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void barrier_of(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) few(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = lane_id(), g = lane / 4, t = lane % 4;
  u8* ring = shared;                            // [STAGES, BLOCKS, STAGE]
  u8* x_ring = ring + STAGES * BLOCKS * STAGE;  // [X_STAGES, X_STAGE]
  u64* filled = reinterpret_cast<u64*>(x_ring + X_STAGES * X_STAGE);
  u64* x_filled = filled + STAGES * BLOCKS;
  u64* x_emptied = x_filled + X_STAGES;
  u64* left = x_emptied + X_STAGES;             // sums that another block of threads adds up
  const int spans = (a.columns + SPAN - 1) / SPAN;
  const auto start_of = [&](int block) { return block * a.share + min(block, a.longer); };
  const int first = start_of(blockIdx.x), last = start_of(blockIdx.x + 1);

  if (warp == RELEASER) {
    if (lane < X_STAGES) barrier_init(x_filled + lane, COPIERS), barrier_init(x_emptied + lane, WARPS);
    if (lane == 0) barrier_init(left, WARPS);
  } else if (warp < WARPS && lane < STAGES) {
    barrier_init(filled + lane * BLOCKS + warp, 1);
  }
  barrier_init_fence();
  __syncwarp();

  // Tiles that are asked for next: all lanes know of them, one asks.
  int block = first / spans * BLOCKS + warp, rest = a.columns - first % spans * SPAN;
  const u8* from = a.weight + (i64{block} * a.columns + first % spans * SPAN) * TILE;
  const i64 skip = i64{a.columns} * (BLOCKS - 1) * TILE;
  const auto fetch = [&](u8* to, u64* barrier, int wanted) {
    const int bytes = min(SPAN, rest) * TILE;
    ask(shared_address(to), from, block < a.row_blocks ? bytes : 0, shared_address(barrier), wanted);
    from += bytes, rest -= SPAN;
    if (rest <= 0) rest = a.columns, block += BLOCKS, from += skip;
  };
  const auto fetch_first = [&](int from, int to) {
    for (int s = from; s < to; ++s)
      fetch(ring + (s * BLOCKS + warp) * STAGE, filled + s * BLOCKS + warp, last - first - s);
  };
  if (warp < WARPS) fetch_first(0, BEFORE_X);
  __syncthreads();  // a warp's own barriers are all that its first tiles need
  grid_wait();
  if (BEFORE_X < STAGES && warp < WARPS) {
    barrier_of(1, ASKED);
    fetch_first(BEFORE_X, STAGES);
  }
  if (warp == RELEASER) {
    // By a warp of its own: with copies under way, this takes microseconds.
    if (lane == 0 && first % spans) {
      barrier_wait(left, 0);
      store_release(a.flags + blockIdx.x, 1);
    }
    return;
  }
  if (warp >= COPIER) {
    // Of the i-th eight of k, lane t's A has 2 t and 2 t + 1, which are columns 8 t + 2 i and one more: a vector that is
    // loaded is a word each of four that are stored. Tokens that are not there are like the last.
    constexpr int SHARE = SPAN * 8 * WIDE / COPIERS, STEP = COPIERS / WIDE;  // a lane's vectors; how many groups apart
    constexpr int WIDTH = CODES / 8;                                         // columns of a group
    const int n = (warp - COPIER) % WIDE * 8 + g, start = (warp - COPIER) / WIDE;
    const bf16* x = a.x + i64{min(n, a.m - 1)} * a.k;
    u32* to = reinterpret_cast<u32*>(x_ring) + (start * 4 * TOKENS + n) * 4 + t;
    int column = first % spans * SPAN * CODES + start * WIDTH + (SPLIT ? t % 2 : t) * 8;
    for (int unit = first, stage = 0, parity = 1, left = spans - first % spans; unit < last; ++unit) {
      if (unit == max(first, last - LEAD)) grid_trigger();
      uint4 v[SHARE];
      const bf16* from = x + column;
      if (column + (SHARE - 1) * STEP * WIDTH < a.k) {
#pragma unroll
        for (int i = 0; i < SHARE; ++i) v[i] = __ldcg(reinterpret_cast<const uint4*>(from + i * STEP * WIDTH));
      } else {
#pragma unroll
        for (int i = 0; i < SHARE; ++i)
          v[i] = column + i * STEP * WIDTH < a.k ? __ldcg(reinterpret_cast<const uint4*>(from + i * STEP * WIDTH))
                                                 : uint4{0, 0, 0, 0};
      }
      if (BEFORE_X < STAGES && unit == first) barrier_arrive_of(1, ASKED);
      barrier_wait(x_emptied + stage, parity);
#pragma unroll
      for (int i = 0; i < SHARE; ++i) {
        u32* words = to + stage * (X_STAGE / 4) + i * STEP * 16 * TOKENS;
        words[0] = v[i].x, words[4 * TOKENS] = v[i].y, words[8 * TOKENS] = v[i].z, words[12 * TOKENS] = v[i].w;
      }
      fence_for_engines();
      __syncwarp();
      if (lane == 0) barrier_arrive(x_filled + stage);
      column += SPAN * CODES;
      if (--left == 0) left = spans, column -= spans * SPAN * CODES;
      if (++stage == X_STAGES) stage = 0, parity ^= 1;
    }
    return;
  }

  // Of eight bits, lanes 0 and 1 have high nibbles, which count 16 times and have the 128 that was added. Codes of rows
  // g + 8 come 16 times.
  const bool high = SPLIT && t < 2;
  const u32 raise[2] = {high ? RAISED + 0x02000200u : RAISED, high ? RAISED : RAISED - 0x02000200u};
  const u32 shift = SUBTRACT ? 0 : high ? 0xb080b080u : pair_of(-ONE * (SPLIT ? 0 : OFFSET));  // -128 ONE
  const u32 lower = high ? 0 : pair_of(ONE);
  const u32 minus = 0x80008000u | (high ? 8 : OFFSET) * 0x00010001u, less[2] = {minus, times(minus, SIXTEEN)};
  int of_words = lane * 16, of_scales = g * (1024 / GROUP);
  asm volatile("" : "+r"(of_words), "+r"(of_scales));  // else the compiler makes them again each time
  float d[TOKENS / 2];
  int stage = 0, parity = 0, x_stage = 0, x_parity = 0, group = first / spans;
  for (int unit = first; unit < last; ++group) {
    const int begin = unit, end = min(last, (group + 1) * spans);
    int tiles = a.columns - (unit - group * spans) * SPAN;  // that this row still has
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) d[i] = 0;
    for (; unit < end; ++unit, tiles -= SPAN) {
      const u64 x = matrix_of<TOKENS>(x_ring + x_stage * X_STAGE);
      barrier_wait(x_filled + x_stage, x_parity);
      u64* ready = filled + stage * BLOCKS + warp;
      barrier_wait(ready, parity);
      u8* data = ring + (stage * BLOCKS + warp) * STAGE;
#pragma unroll
      for (int at = 0; at < SPAN; ++at) {
        uint4 words[4], scales[2], zeros[2];
        const u8* tile = data + at * TILE;
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) words[chunk] = *reinterpret_cast<const uint4*>(tile + chunk * 512 + of_words);
        scales_at(tile + 2048 + of_scales, scales);
        if constexpr (ZERO) scales_at(tile + 2048 + SCALES + of_scales, zeros);
        if (at + 1 == SPAN || at + 1 == tiles) {
          // The room is given back as soon as all of it is in registers. The ballot, 0, needs every lane's: a load that was
          // only issued could be overtaken by the copy that refills the room.
          u32 loaded = words[0].x | words[1].x | words[2].x | words[3].x | scales[0].x | scales[GROUP == 32].x;
          if constexpr (ZERO) loaded |= zeros[0].x | zeros[GROUP == 32].x;
          const int none = __ballot_sync(0xffffffffu, loaded & a.zero);
          fetch(data, ready, last - unit - STAGES - none);
        }
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
          u32 w[4][4];
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int row = 0; row < 2; ++row) {
              const u32 s = scale_of(scales, chunk, row), scale = times(s, raise[row]);
              const u32 zero = ZERO ? times(scale_of(zeros, chunk, row), lower) : 0;
              const u32 plus = !ZERO ? times(s, shift) : SPLIT && !SUBTRACT ? fma_bf16x2(s, shift, zero) : zero;
              const bool upper = upper_of(half, row);
              const u32 pairs[2] = {half ? words[chunk].z : words[chunk].x, half ? words[chunk].w : words[chunk].y};
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                u32 code = (i % 2 ? pairs[i / 2] >> 8 : pairs[i / 2]) & (row ? 0x00f000f0u : 0x000f000fu);
                if constexpr (SUBTRACT) code = fma_bf16x2(code, 0x3f803f80u, less[row]);
                w[half * 2 + i / 2][i % 2 * 2 + row] = fma_bf16x2(code, twice(scale, upper), twice(plus, upper));
              }
            }
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < 4; ++i) wgmma<TOKENS>(d, w[i], x + ((at * 4 + chunk) * 4 + i) * 2 * TOKENS);
          wgmma_commit();
          wgmma_wait<1>();  // A's registers of the chunk before are free
        }
        if (at + 1 == tiles) break;
      }
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(x_emptied + x_stage);
      if (++stage == STAGES) stage = 0, parity ^= 1;
      if (++x_stage == X_STAGES) x_stage = 0, x_parity ^= 1;
    }
    settle(d);
    const i64 mine = blockIdx.x * BLOCKS * 32 + threadIdx.x;
    if (begin > group * spans) {  // another block has the first columns
#pragma unroll
      for (int i = 0; i < WIDE; ++i)
        reinterpret_cast<float4*>(a.partials)[mine * WIDE + i] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
      __syncwarp();
      if (lane == 0) barrier_arrive(left);
      continue;
    }
    // Those who have the rest are asked all at once, and then read: one by one, each would take two trips to the L2.
    int others = 0;
    for (int reached = end; reached < (group + 1) * spans; ++others)
      reached = start_of(blockIdx.x + others + 2);
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
        d[4 * i] += more.x, d[4 * i + 1] += more.y, d[4 * i + 2] += more.z, d[4 * i + 3] += more.w;
      }
#pragma unroll
    for (int i = 0; i < WIDE; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = i * 8 + 2 * t + j % 2, n = (group * BLOCKS + warp) * ROWS + g + j / 2 * 8;
        if (token < a.m && n < a.n) a.out[i64{token} * a.n + n] = to_bf16(d[4 * i + j] * LOWERED);
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
