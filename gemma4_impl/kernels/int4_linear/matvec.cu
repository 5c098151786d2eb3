// One token times four-bit weights, at the speed of the memory; with the norm before it and the activation after it.
//
// Weights come in tiles of 16 rows x 256 columns, a row block's one after the other (gemma4_impl/quant/cuda.py). Each
// block of threads takes an equal share of all tiles, whose ends need not be those of row blocks, through a ring in shared
// memory; its warps take the next tile whenever they are free. The tensor cores multiply: the columns of B are not tokens
// but groups of 32 columns of the one token, so that a tile's scales are applied once, to the sums.
#include "common.cuh"

// GROUP: weights that share a scale. ZERO: scale * code + zero. SPLIT: codes of eight bits, as 16 high nibbles and then
// their 16 low ones. SPAN: tiles copied at once. NORM, ADD: what is done to x. ACT: 1 gelu(gate) * up, 2 gelu(y) * times, 3 cap * tanh(y / cap).

constexpr int ROWS = 16, COLUMNS = 256;
// WARPS multiply, one more copies tiles, and one adds up row blocks.
constexpr int COPIER = WARPS, ADDER = WARPS + 1, THREADS = (WARPS + 2) * 32;
constexpr int SCALES = ROWS * COLUMNS / GROUP * 2;
constexpr int TILE = ROWS * COLUMNS / 2 + SCALES * (1 + ZERO);
constexpr int HELD = (1024 + THREADS - 1) / THREADS;  // vectors of 8 that a thread holds while x is normed: 8192 columns
constexpr int BATCH = 6;                              // and that it loads at once, if not

struct Arguments {
  const u8* weight;
  const bf16* x;           // [K], or [slots, K] where each expert has its own
  void* out;               // [N] or [N / 2] bfloat16; float32 if OUT_FLOAT
  const bf16* norm;        // [K]
  const bf16* residual;    // [K]
  const bf16* post_norm;   // [K]
  const bf16* scalar;      // [1] or null
  bf16* residual_out;      // [K]
  const bf16* times;       // [N]
  const i64* experts;      // [slots], or null
  float* partials;         // [blocks, 16]
  u32* flags;              // [blocks], zero between launches
  float eps, softcap;
  float offset;            // what the tensor cores' 128 + nibble is too much, as a factor of the sum of x
  int n;                   // rows of one matrix
  int k;                   // columns of x, a multiple of 8
  int tiles_per_block;     // of a row block: ceil(K / 256), twice that if SPLIT
  int row_blocks;          // of one matrix
  int slots;               // matrices: 1, or the chosen experts
  int x_per_slot;          // whether each has its own x
  int most_tiles;          // of a block of threads
  int most_blocks;         // row blocks that it touches
  int stages;              // of the ring, SPAN tiles each
  u32 per_tiles_per_block, per_stages;  // 2^32 / n, rounded up: a product's upper half is the quotient
  int lead;                // stages that are not yet asked for when the next kernel may start
};

DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (lane_id() == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS + 2; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

DEVICE void unpack(const uint4& v, float (&x)[8]) {
  x[0] = low_float(v.x), x[1] = high_float(v.x), x[2] = low_float(v.y), x[3] = high_float(v.y);
  x[4] = low_float(v.z), x[5] = high_float(v.z), x[6] = low_float(v.w), x[7] = high_float(v.w);
}
DEVICE uint4 pack(const float (&x)[8]) {
  return {to_bf16x2(x[0], x[1]), to_bf16x2(x[2], x[3]), to_bf16x2(x[4], x[5]), to_bf16x2(x[6], x[7])};
}

// Eight columns of x to where the tensor cores expect them.
DEVICE void place(bf16* xs, int column, const uint4& v) {
  if constexpr (!SPLIT) {
    *reinterpret_cast<uint4*>(xs + column) = v;
  } else {
    float f[8];
    unpack(v, f);
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] *= 16;
    bf16* unit = xs + column / 16 * 32 + column % 16;
    *reinterpret_cast<uint4*>(unit) = pack(f);
    *reinterpret_cast<uint4*>(unit + 16) = v;
  }
}

// The bfloat16 numbers 128 + nibble: pairs (k, k + 1) of rows g and g + 8, then (k + 2, k + 3). What is too much is taken
// from the sums, in float32.
DEVICE void widen(u32 word, u32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = lop3<(0xf0 & 0xcc) | 0xaa>(word >> (4 * i), 0x000f000fu, 0x43004300u);
}

DEVICE float gelu(float x) {
  const float u = x * (0.7978845608f + 0.0356774081f * x * x);
  return x / (1 + __expf(-2 * u));
}

// n / d for n d < 2^32; of d = 1, the 2^32 is 0.
DEVICE u32 quotient(u32 n, u32 per_d) { return per_d ? __umulhi(n, per_d) : n; }

// The tiles of each row block, always in the same order, and what is to be done with their sum.
DEVICE void add_up(const Arguments& a, const float* parts, u64* added, int first, int last, int first_block,
                   int end_block) {
  const int lane = lane_id(), row = lane % ROWS;
  for (int block = first_block; block < end_block; ++block) {
    const int begin = max(first, block * a.tiles_per_block), end = min(last, (block + 1) * a.tiles_per_block);
    float y = 0;
    // What the next block of threads began with is there long before this one's last tile.
    const bool shared_with_next = begin == block * a.tiles_per_block && end < begin + a.tiles_per_block;
    if (shared_with_next) {
      while (!load_acquire(a.flags + blockIdx.x + 1)) {
      }
      y = lane < ROWS ? __ldcg(a.partials + (blockIdx.x + 1) * ROWS + row) : 0;
      __syncwarp();
      if (lane == 0) a.flags[blockIdx.x + 1] = 0;
    }
    barrier_wait(added + block - first_block, 0);
    float more[8] = {};
    for (int i = begin - first + lane / ROWS; i < end - first; i += 16)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (i + 2 * j < end - first) more[j] += parts[(i + 2 * j) * ROWS + row];
    y += ((more[0] + more[1]) + (more[2] + more[3])) + ((more[4] + more[5]) + (more[6] + more[7]));
    y += __shfl_xor_sync(0xffffffffu, y, ROWS);
    if (begin > block * a.tiles_per_block) {  // it began in the block before, which adds this to its own
      if (lane < ROWS) a.partials[blockIdx.x * ROWS + row] = y;
      __syncwarp();
      if (lane == 0) {
        __threadfence();
        store_release(a.flags + blockIdx.x, 1);
      }
      continue;
    }
    const int slot = EXPERTS ? block / a.row_blocks : 0;
    int n = (block - slot * a.row_blocks) * ROWS + row;
    const bool kept = n < a.n && lane < (ACT == 1 ? 8 : ROWS);
    n += slot * a.n;
    if constexpr (ACT == 1) {
      const float up = __shfl_down_sync(0xffffffffu, y, 8);
      y = gelu(y) * up;
      n = block * 8 + row;
    }
    if constexpr (ACT == 2) y = gelu(y) * (kept ? to_float(a.times[n]) : 0);
    if constexpr (ACT == 3) y = a.softcap * (1 - 2 / (1 + __expf(2 * y / a.softcap)));
    if (kept) {
      if constexpr (OUT_FLOAT) {
        static_cast<float*>(a.out)[n] = y;
      } else {
        static_cast<bf16*>(a.out)[n] = to_bf16(y);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) matvec(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
  const int width = a.tiles_per_block * COLUMNS;  // of x as the tensor cores see it
  const int x_rows = a.x_per_slot ? a.slots : 1;
  u8* ring = shared;
  bf16* xs = reinterpret_cast<bf16*>(ring + a.stages * SPAN * TILE);
  float* sums = reinterpret_cast<float*>(xs + x_rows * width);  // of x, per 32 columns
  float* parts = sums + x_rows * width / 32;                // of y, per tile
  float* scratch = parts + a.most_tiles * ROWS;
  u64* filled = reinterpret_cast<u64*>(scratch + THREADS / 32);
  u64* emptied = filled + a.stages;
  u64* added = emptied + a.stages;                          // per row block
  u32* current = reinterpret_cast<u32*>(added + a.most_blocks);      // what each stage holds, or will
  u32* taken = current + a.stages;

  const i64 total = i64{a.slots} * a.row_blocks * a.tiles_per_block;
  const int first = static_cast<int>(total * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);
  const int first_block = first / a.tiles_per_block, end_block = (last - 1) / a.tiles_per_block + 1;
  const int stages_to_do = (last - first + SPAN - 1) / SPAN;

  const auto fetch = [&](int number, int stage) {
    const int tile = first + number * SPAN, tiles = min(SPAN, last - tile);
    u8* to = ring + stage * SPAN * TILE;
    barrier_expect(filled + stage, tiles * TILE);
    *reinterpret_cast<volatile u32*>(current + stage) = number;
    if (EXPERTS) {
      const int per_matrix = a.row_blocks * a.tiles_per_block;
      for (int i = 0; i < tiles; ++i) {
        const i64 at = a.experts[(tile + i) / per_matrix] * per_matrix + (tile + i) % per_matrix;
        copy_bulk(to + i * TILE, a.weight + at * TILE, TILE, filled + stage);
      }
    } else {
      copy_bulk(to, a.weight + i64{tile} * TILE, tiles * TILE, filled + stage);
    }
  };
  const auto prefetch = [&] {
    for (int number = 0; number < min(a.stages, stages_to_do); ++number) fetch(number, number);
  };

  if (warp == COPIER) {
    for (int s = lane; s < a.stages; s += 32) barrier_init(filled + s, 1), barrier_init(emptied + s, SPAN);
    for (int b = first_block + lane; b < end_block; b += 32)
      barrier_init(added + b - first_block, min(last, (b + 1) * a.tiles_per_block) - max(first, b * a.tiles_per_block));
    barrier_init_fence();
    __syncwarp();
    if (lane == 0) {
      if (!EXPERTS) prefetch();
      *taken = WARPS;
    }
  }

  // 1. x, normed or not, into shared memory, with zeros up to whole tiles; and its sums
  const int vectors = a.k / 8, places = width / (SPLIT ? 16 : 8);
  constexpr int PER_SUM = SPLIT ? 2 : 4;
  const auto put = [&](int row, int v, const uint4& x) {  // by whole warps, each lane the next v
    float f[8];
    unpack(x, f);
    float sum = ((f[0] + f[1]) + (f[2] + f[3])) + ((f[4] + f[5]) + (f[6] + f[7]));
#pragma unroll
    for (int other = 1; other < PER_SUM; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (v < places) {
      place(xs + row * width, v * 8, x);
      if (v % PER_SUM == 0) sums[row * (width / 32) + v / PER_SUM] = sum;
    }
  };
  uint4 norm[HELD], post[HELD];
  const float scalar = ADD && a.scalar ? to_float(*a.scalar) : 1.0f;
  if constexpr (NORM || ADD) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int v = threadIdx.x + i * THREADS;
      if (v < vectors) {
        if (NORM) norm[i] = reinterpret_cast<const uint4*>(a.norm)[v];
        if (ADD) post[i] = reinterpret_cast<const uint4*>(a.post_norm)[v];
      }
    }
  }
  grid_wait();
  if (EXPERTS && threadIdx.x == COPIER * 32) prefetch();
  if constexpr (NORM || ADD) {
    float x[HELD][8], r[HELD][8], square = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int v = threadIdx.x + i * THREADS;
      const bool valid = v < vectors;
      unpack(valid ? reinterpret_cast<const uint4*>(a.x)[v] : uint4{0, 0, 0, 0}, x[i]);
      if (ADD) unpack(valid ? reinterpret_cast<const uint4*>(a.residual)[v] : uint4{0, 0, 0, 0}, r[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) square += x[i][j] * x[i][j];
    }
    if constexpr (ADD) {
      const float scale = rsqrtf(block_sum(square, scratch) / a.k + a.eps);
      square = 0;
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int v = threadIdx.x + i * THREADS;
        if (v < vectors) {
          float w[8];
          unpack(post[i], w);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float sum = round_bf16(r[i][j] + round_bf16(x[i][j] * scale * w[j]));
            x[i][j] = round_bf16(sum * scalar);
            square += x[i][j] * x[i][j];
          }
          if (blockIdx.x == 0) reinterpret_cast<uint4*>(a.residual_out)[v] = pack(x[i]);
        }
      }
    }
    float scale = 1;
    if (NORM) scale = rsqrtf(block_sum(square, scratch) / a.k + a.eps);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int v = threadIdx.x + i * THREADS;
      if (NORM && v < vectors) {
        float w[8];
        unpack(norm[i], w);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[i][j] *= scale * w[j];
      }
      put(0, v, pack(x[i]));
    }
  } else {
    for (int row = 0; row < x_rows; ++row)
      for (int from = threadIdx.x; from - lane < places; from += BATCH * THREADS) {
        uint4 x[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const int v = from + i * THREADS;
          x[i] = v < vectors ? reinterpret_cast<const uint4*>(a.x + i64{row} * a.k)[v] : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
          if (from - lane + i * THREADS < places) put(row, from + i * THREADS, x[i]);
      }
  }
  __syncthreads();

  if (warp == COPIER) {
    if (lane == 0) {
      const int trigger = max(a.stages, stages_to_do - a.lead);
      for (int number = a.stages, stage = 0, parity = 0; number < stages_to_do; ++number) {
        if (number == trigger) grid_trigger();
        barrier_wait(emptied + stage, parity);
        fetch(number, stage);
        if (++stage == a.stages) stage = 0, parity ^= 1;
      }
    }
    // One lane's trigger is the block's, so that the others wait for lane 0.
    __syncwarp();
    grid_trigger();
    return;
  }
  if (warp == ADDER) {
    add_up(a, parts, added, first, last, first_block, end_block);
    return;
  }

  // 2. Tiles
  for (u32 index = warp; index < last - first;) {
    u32 next = 0;
    if (lane == 0) next = atomicAdd(taken, 1);
    const u32 tile = first + index, block = quotient(tile, a.per_tiles_per_block);
    const u32 number = index / SPAN, round = quotient(number, a.per_stages), stage = number - round * a.stages;
    u32 column = (tile - block * a.tiles_per_block) * COLUMNS;
    if (EXPERTS && a.x_per_slot) column += block / a.row_blocks * width;
    const u8* data = ring + (stage * SPAN + index % SPAN) * TILE;
    const float2 sum = *reinterpret_cast<const float2*>(sums + column / 32 + 2 * t);
    // A barrier tells a round from the next one only; who runs ahead waits until it is this round's turn.
    while (*reinterpret_cast<volatile u32*>(current + stage) != number) {
      __nanosleep(20);  // leaves the multiprocessor to the others
    }
    barrier_wait(filled + stage, round & 1);
    // Column n of B is group n's x, so of a group's product with all of them one column counts.
    const uint4 x = *reinterpret_cast<const uint4*>(xs + column + lane / 4 * 32 + t * 8);
    float c[8][4];
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      const uint4 words = reinterpret_cast<const uint4*>(data + chunk * 512)[lane];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float(&d)[4] = c[chunk * 2 + half];
        u32 w[4];
        widen(half ? words.z : words.x, w);
        mma_first(d, w, {x.x, x.y});
        widen(half ? words.w : words.y, w);
        mma(d, w, {x.z, x.w});
      }
    }
    // Lane (g, t) gets the sums of groups 2 t and 2 t + 1 for rows g and g + 8.
    float d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int odd = i % 2;
      const float low = t & 1 ? c[2 + odd][i] : c[odd][i], high = t & 1 ? c[6 + odd][i] : c[4 + odd][i];
      d[i] = t & 2 ? high : low;
    }
    float y0 = 0, y1 = 0;
    const auto apply = [&](const u8* at, float c0, float c1, float c2, float c3) {
      if constexpr (GROUP == 32) {
        const uint2 s = reinterpret_cast<const uint2*>(at)[lane];
        y0 += c0 * low_float(s.x) + c1 * high_float(s.x);
        y1 += c2 * low_float(s.y) + c3 * high_float(s.y);
      } else {
        const u32 s = reinterpret_cast<const u32*>(at)[GROUP == 64 ? lane : g * 2 + t / 2];
        y0 += (c0 + c1) * low_float(s);
        y1 += (c2 + c3) * high_float(s);
      }
    };
    const float x0 = a.offset * sum.x, x1 = a.offset * sum.y;
    apply(data + 2048, d[0] - x0, d[1] - x1, d[2] - x0, d[3] - x1);
    if constexpr (ZERO) apply(data + 2048 + SCALES, sum.x, sum.y, sum.x, sum.y);
    // Lanes t = 0 get row g, t = 1 row g + 8.
    float y = (t & 1 ? y1 : y0) + __shfl_xor_sync(0xffffffffu, t & 1 ? y0 : y1, 1);
    y += __shfl_xor_sync(0xffffffffu, y, 2);
    if (t < 2) parts[index * ROWS + t * 8 + g] = y;
    __syncwarp();
    // The tile's room is given back here and no earlier: what was loaded last, the scales, has arrived for sure.
    if (lane == 0) barrier_arrive(emptied + stage), barrier_arrive(added + block - first_block);
    index = __shfl_sync(0xffffffffu, next, 0);
  }
}
