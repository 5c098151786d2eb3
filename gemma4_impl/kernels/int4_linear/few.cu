// 2 to 16 tokens times four-bit weights, and weights back to bfloat16. See matvec.cu for the tiles.
//
// A block of threads takes a tile each of twelve row blocks at a time, a row block for each of its warps, together with
// the same columns of all tokens, which are the columns of the tensor cores' B. Blocks share the work evenly, so that
// twelve row blocks may be begun by one and ended by others. Each warp has a ring of its own for tiles; x goes through one
// that all of them read. Four warps multiply together (`wgmma`), each with its own rows in registers; x stays in shared
// memory.
//
// Weights are bfloat16 when they are multiplied, as `naive.py` has them: a pair of codes, which are subnormal numbers, is
// one `fma` with its scales and offsets. So all of a row is one sum, and eight more tokens cost no instructions.
#include "common.cuh"

// GROUP, ZERO, SPLIT: as in matvec.cu; OFFSET: of the weight. WIDE: 1 for up to 8 tokens, 2 for up to 16. BLOCKS: row blocks
// at a time. STAGES, X_STAGES: of the rings. COPIERS: warps that fetch x, in SETS that take turns.

constexpr int ROWS = 16, COLUMNS = 256, WARPS = BLOCKS;
constexpr int SCALES = ROWS * COLUMNS / GROUP * 2;
constexpr int TILE = ROWS * COLUMNS / 2 + SCALES * (1 + ZERO);
constexpr int CODES = SPLIT ? COLUMNS / 2 : COLUMNS;  // columns of x in a tile
constexpr int TOKENS = 8 * WIDE;
constexpr int X_STAGE = COLUMNS * TOKENS * 2;         // bytes: [32 columns][4][TOKENS] vectors of 8, as `wgmma` takes it
constexpr int LEAD = 2;                               // units of x that are not yet asked for when the next kernel may start
constexpr int COPIER = WARPS, THREADS = (WARPS + COPIERS) * 32;
constexpr int TEAM = COPIERS / SETS;                  // warps that fetch the same unit of x
// So many tiles are asked for before x, which would wait behind more. Beyond 8 tokens, all: less took longer.
constexpr int BEFORE_X = WIDE == 1 ? 1 : STAGES;
constexpr int SUMS = WIDE * BLOCKS * 32;              // of a block, in fours
constexpr u32 NOT_YET = 0xffffffff;                   // instead of a partial sum
constexpr int ADDERS = 3;                             // at most, of the blocks that share rows; the others leave at once
static_assert(SUMS <= 2 * BLOCKS * 32, "a thread of each of two adds up one of the sums");
// Whether the offset is subtracted from the codes: else scales times it are added, which must be exact.
constexpr bool SUBTRACT = OFFSET && (SPLIT || ZERO || (OFFSET & (OFFSET - 1)));
static_assert(WARPS % 4 == 0, "four multiply together");
static_assert(TEAM % WIDE == 0 && 8 * WIDE % TEAM == 0 && X_STAGES % SETS == 0, "copiers have equal shares");

struct Arguments {
  const u8* weight;
  const bf16* x;     // [M, K]
  bf16* out;         // [M, N]
  float4* partials;  // [blocks, 2, SUMS], NOT_YET between launches
  int m, n, k, columns, row_blocks;
  int share, longer;  // units of a block, of which so many have one more
  u32 zero;           // 0, which the compiler does not know
  int aligned;        // rows of `out` begin at multiples of 8 bytes
};

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

// Asks for a tile, if `wanted` > 0, by one lane: without a branch, in which the compiler would ask whether addresses are the
// same in all lanes.
DEVICE void ask(u32 shared, const u8* global, u32 bytes, u32 barrier, int wanted) {
  asm volatile(
      "{\n.reg .pred p, q;\nelect.sync _|p, 0xffffffff;\nsetp.gt.and.s32 p, %4, 0, p;\nsetp.ne.and.b32 q, %2, 0, p;\n"
      "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
      "@q cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n}" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "r"(wanted)
      : "memory");
}

// Partial sums say by themselves that they are there: no fence is needed, which takes microseconds with copies under way.
DEVICE float sent(float x) { return __float_as_uint(x) == NOT_YET ? __uint_as_float(0x7fffffff) : x; }
DEVICE void send(float4* to, const float4& x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(sent(x.x)), "f"(sent(x.y)),
               "f"(sent(x.z)), "f"(sent(x.w))
               : "memory");
}
DEVICE float4 look(const float4* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
// Adds what was looked at, once all of it has come, and leaves NOT_YET in its place: each has one reader.
DEVICE void take(float4& sum, float4 part, float4* from) {
  const auto missing = [](float x) { return __float_as_uint(x) == NOT_YET; };
  while (missing(part.x) || missing(part.y) || missing(part.z) || missing(part.w)) part = look(from);
  const float none = __uint_as_float(NOT_YET);
  *from = {none, none, none, none};
  sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
}

DEVICE void barrier_arrive_of(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void barrier_of(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) few(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = lane_id(), g = lane / 4, t = lane % 4;
  u8* ring = shared;                           // [STAGES, BLOCKS, TILE]
  u8* x_ring = ring + STAGES * BLOCKS * TILE;  // [X_STAGES, X_STAGE]
  u64* filled = reinterpret_cast<u64*>(x_ring + X_STAGES * X_STAGE);
  u64* x_filled = filled + STAGES * BLOCKS;
  u64* x_emptied = x_filled + X_STAGES;
  const int columns = a.columns;  // of tiles; a unit of work is one of them, of twelve row blocks
  const auto start_of = [&](int block) { return block * a.share + min(block, a.longer); };
  const int first = start_of(blockIdx.x), last = start_of(blockIdx.x + 1);

  if (warp == COPIER && lane < X_STAGES) barrier_init(x_filled + lane, TEAM), barrier_init(x_emptied + lane, WARPS);
  if (warp < WARPS && lane < STAGES) barrier_init(filled + lane * BLOCKS + warp, 1);
  barrier_init_fence();
  __syncwarp();

  // The tile that is asked for next: all lanes know of it, one asks.
  int block = first / columns * BLOCKS + warp, rest = columns - first % columns;
  const u8* from = a.weight + (i64{block} * columns + first % columns) * TILE;
  const i64 skip = i64{columns} * (BLOCKS - 1) * TILE;
  const auto fetch = [&](u8* to, u64* barrier, int wanted) {
    ask(shared_address(to), from, block < a.row_blocks ? TILE : 0, shared_address(barrier), wanted);
    from += TILE;
    if (--rest == 0) rest = columns, block += BLOCKS, from += skip;
  };
  const auto fetch_first = [&](int from, int to) {
    for (int s = from; s < to; ++s)
      fetch(ring + (s * BLOCKS + warp) * TILE, filled + s * BLOCKS + warp, last - first - s);
  };
  if (warp >= COPIER) {  // meanwhile x may come to the L2, a part by each block
    constexpr int EACH = COPIERS * 32, LINE = 64;
    const int x_size = a.m * a.k;
    for (int i = (blockIdx.x * EACH + threadIdx.x - COPIER * 32) * LINE; i < x_size; i += gridDim.x * EACH * LINE)
      prefetch(a.x + i);
  }
  if (warp < WARPS) fetch_first(0, BEFORE_X);
  __syncthreads();  // a warp's own barriers are all that its first tiles need
  grid_wait();
  if (BEFORE_X < STAGES && warp < WARPS) {
    barrier_of(1, THREADS);
    fetch_first(BEFORE_X, STAGES);
  }
  if (warp >= COPIER) {
    // Of the i-th eight of k, lane t's A has 2 t and 2 t + 1, which are columns 8 t + 2 i and one more: a vector that is
    // loaded is a word each of four that are stored. Tokens that are not there are like the last.
    constexpr int SHARE = 8 * WIDE / TEAM, STEP = TEAM / WIDE;  // a lane's vectors; how many groups apart
    constexpr int WIDTH = CODES / 8;                            // columns of a group
    const int set = (warp - COPIER) / TEAM, member = (warp - COPIER) % TEAM;
    const int n = member % WIDE * 8 + g, start = member / WIDE;
    const int offset = start * WIDTH + (SPLIT ? t % 2 : t) * 8;
    const bf16* x = a.x + i64{min(n, a.m - 1)} * a.k;
    u32* to = reinterpret_cast<u32*>(x_ring) + (start * 4 * TOKENS + n) * 4 + t;
    int stage = set, parity = 1, column = first % columns + set;
    if (first + set >= last && BEFORE_X < STAGES) barrier_arrive_of(1, THREADS);
    for (int unit = first + set; unit < last; unit += SETS) {
      if (unit + LEAD >= last) grid_trigger();
      while (column >= columns) column -= columns;
      const int at = column * CODES + offset;
      uint4 v[SHARE];
#pragma unroll
      for (int i = 0; i < SHARE; ++i)
        v[i] = at + i * STEP * WIDTH < a.k ? __ldcg(reinterpret_cast<const uint4*>(x + at + i * STEP * WIDTH))
                                           : uint4{0, 0, 0, 0};
      if (unit == first + set && BEFORE_X < STAGES) barrier_arrive_of(1, THREADS);
      barrier_wait(x_emptied + stage, parity);
#pragma unroll
      for (int i = 0; i < SHARE; ++i) {
        u32* words = to + stage * (X_STAGE / 4) + i * STEP * 16 * TOKENS;
        words[0] = v[i].x, words[4 * TOKENS] = v[i].y, words[8 * TOKENS] = v[i].z, words[12 * TOKENS] = v[i].w;
      }
      fence_for_engines();
      __syncwarp();
      if (lane == 0) barrier_arrive(x_filled + stage);
      column += SETS;
      if ((stage += SETS) >= X_STAGES) stage -= X_STAGES, parity ^= 1;
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
  const u64 xs = matrix_of<TOKENS>(x_ring);
  float d[TOKENS / 2];
  int stage = 0, parity = 0, x_stage = 0, x_parity = 0, group = first / columns;
  const auto sum_of = [&](int i) { return float4{d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]}; };
  // Sums number e of the group; a warp's 32 are those that a warp has. Four rows of a token by each lane: whole sectors.
  const auto write = [&](int group, int e, const float4& sum) {
    __syncwarp();
    const u32 low = transposed(to_bf16x2(sum.x * LOWERED, sum.y * LOWERED));
    const u32 high = transposed(to_bf16x2(sum.z * LOWERED, sum.w * LOWERED));
    const int token = e / (BLOCKS * 32) * 8 + g, n = (group * BLOCKS + e / 32 % BLOCKS) * ROWS + 4 * t;
    u32 y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = lane / 4 * 4 + t % 2 * 2 + i;
      const u32 of_low = __shfl_sync(0xffffffffu, low, from), of_high = __shfl_sync(0xffffffffu, high, from);
      y[i] = t < 2 ? of_low : of_high;
    }
    bf16* const to = a.out + i64{token} * a.n + n;
    if (token >= a.m || n >= a.n) return;
    if (a.aligned) {
      *reinterpret_cast<uint2*>(to) = {y[0], y[1]};
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n + i < a.n) to[i] = to_bf16(i % 2 ? high_float(y[i / 2]) : low_float(y[i / 2]));
    }
  };
  // A block has a place for what another has begun, and one for what it begins.
  const auto partials_of = [&](int block, bool begun) { return a.partials + (block * 2 + begun) * SUMS; };
  const auto send_all = [&](bool begun) {
#pragma unroll
    for (int i = 0; i < WIDE; ++i)
      send(partials_of(blockIdx.x, begun) + i * BLOCKS * 32 + threadIdx.x, sum_of(i));
  };
  for (int unit = first; unit < last; ++group) {
    const int begin = unit, end = min(last, (group + 1) * columns);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) d[i] = 0;
    u64* used = x_emptied;
    for (; unit < end; ++unit) {
      const u64 x = xs + x_stage * (X_STAGE / 16);
      barrier_wait(x_filled + x_stage, x_parity);
      u64* ready = filled + stage * BLOCKS + warp;
      barrier_wait(ready, parity);
      u8* tile = ring + (stage * BLOCKS + warp) * TILE;
      uint4 words[4], scales[2], zeros[2];
#pragma unroll
      for (int chunk = 0; chunk < 4; ++chunk) words[chunk] = *reinterpret_cast<const uint4*>(tile + chunk * 512 + of_words);
      scales_at(tile + 2048 + of_scales, scales);
      if constexpr (ZERO) scales_at(tile + 2048 + SCALES + of_scales, zeros);
      // The room is given back as soon as all of it is in registers. The ballot, 0, needs every lane's: a load that was only
      // issued could be overtaken by the copy that refills the room.
      u32 loaded = words[0].x | words[1].x | words[2].x | words[3].x | scales[0].x | scales[GROUP == 32].x;
      if constexpr (ZERO) loaded |= zeros[0].x | zeros[GROUP == 32].x;
      const int none = __ballot_sync(0xffffffffu, loaded & a.zero);
      fetch(tile, ready, last - unit - STAGES - none);
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
        for (int i = 0; i < 4; ++i) wgmma<TOKENS>(d, w[i], x + (chunk * 4 + i) * 2 * TOKENS);
        wgmma_commit();
        wgmma_wait<1>();  // A's registers of the chunk before are free, and x of the unit before
        if (chunk == 0 && unit > begin && lane == 0) barrier_arrive(used);
      }
      used = x_emptied + x_stage;
      if (++stage == STAGES) stage = 0, parity ^= 1;
      if (++x_stage == X_STAGES) x_stage = 0, x_parity ^= 1;
    }
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(used);
    settle(d);
    // Nothing is waited for in this loop: the compiler would no longer know that its counters are the same in all lanes.
    if (end < (group + 1) * columns) break;
    if (begin > group * columns) {  // another block has begun it
      send_all(false);
    } else {
#pragma unroll
      for (int i = 0; i < WIDE; ++i) write(group, i * BLOCKS * 32 + threadIdx.x, sum_of(i));
    }
  }

  if (last < (group + 1) * columns && group * columns < last) {  // other blocks end it
    const bool begun = first <= group * columns;
    if (begun && start_of(blockIdx.x + 2) >= (group + 1) * columns) {
      // Only the next block, which has had its part first.
      float4* from = partials_of(blockIdx.x + 1, false) + threadIdx.x;
      float4 part[WIDE];
#pragma unroll
      for (int i = 0; i < WIDE; ++i) part[i] = look(from + i * BLOCKS * 32);
#pragma unroll
      for (int i = 0; i < WIDE; ++i) {
        float4 sum = sum_of(i);
        take(sum, part[i], from + i * BLOCKS * 32);
        write(group, i * BLOCKS * 32 + threadIdx.x, sum);
      }
    } else {
      send_all(begun);
    }
  }
  // Of what more than two blocks have parts, the last of them each add up a share, always in the same order. Only now: by
  // now all have sent theirs, or are about to.
  const auto add_up = [&](int group) {
    const int begin = group * columns, end = begin + columns;
    if (first <= begin && last >= end) return;
    int from = blockIdx.x, to = from + 1;
    while (start_of(from) > begin) --from;
    while (start_of(to) < end) ++to;
    const int n = to - from, adders = min(n - 1, ADDERS), i = blockIdx.x - to + adders;
    const int e = SUMS / 32 * i / adders * 32 + threadIdx.x;
    if (n == 2 || i < 0 || e >= SUMS / 32 * (i + 1) / adders * 32) return;
    float4 sum = {0, 0, 0, 0};
    constexpr int BATCH = 8;  // at once: one by one, each would take a trip to the L2
    for (int other = 0; other < n; other += BATCH) {
      const auto at = [&](int j) { return partials_of(from + other + j, other + j == 0) + e; };
      float4 part[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; ++j)
        if (other + j < n) part[j] = look(at(j));
#pragma unroll
      for (int j = 0; j < BATCH; ++j)
        if (other + j < n) take(sum, part[j], at(j));
    }
    write(group, e, sum);
  };
  const int first_group = first / columns, last_group = (last - 1) / columns;
  add_up(first_group);
  if (last_group > first_group) add_up(last_group);
}

// Row blocks from blockIdx.y on, as they are multiplied with: bfloat16 [rows, K], a tile a warp.
extern "C" __global__ void __launch_bounds__(256) dequantize_rows(const u8* tiles, bf16* out, int columns, int rows,
                                                                        int k) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4, column = blockIdx.x * 8 + threadIdx.x / 32;
  if (column >= columns) return;
  const u8* data = tiles + (i64{blockIdx.y} * columns + column) * TILE;
  const bool high = SPLIT && t < 2;
  const float minus = high ? 136.0f : 128.0f + OFFSET;
  uint4 words[4];
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) words[chunk] = __ldcs(reinterpret_cast<const uint4*>(data + chunk * 512) + lane);
  uint4 scales[2], zeros[2];
  scales_at(data + 2048 + g * (1024 / GROUP), scales);
  if constexpr (ZERO) scales_at(data + 2048 + SCALES + g * (1024 / GROUP), zeros);
  const auto as_float = [](u32 pair, bool upper) { return upper ? high_float(pair) : low_float(pair); };
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 pairs[2] = {half ? words[chunk].z : words[chunk].x, half ? words[chunk].w : words[chunk].y};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scale = as_float(scale_of(scales, chunk, r), upper_of(half, r));
        const float zero = ZERO ? as_float(scale_of(zeros, chunk, r), upper_of(half, r)) : 0;
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
