// One token times four-bit weights, at the speed of the memory; with the norm before it and the activation after it.
//
// Weights come in tiles of 16 rows x 256 columns, a row block's one after the other (gemma4_impl/quant/cuda.py). Each
// block of threads takes an equal share of all tiles, whose ends need not be those of row blocks, through a ring in shared
// memory; its warps take the next few tiles whenever they are free. The tensor cores multiply: the columns of B are not
// tokens but groups of 32 columns of the one token, so that a tile's scales are applied once, to the sums.
#include "common.cuh"

// GROUP: weights that share a scale. ZERO: scale * code + zero. SPLIT: codes of eight bits, as 16 high nibbles and then
// their 16 low ones. SPAN: tiles copied, and multiplied, at once. NORM, ADD: what is done to x. ACT: 1 gelu(gate) * up,
// 2 gelu(y) * times, 3 cap * tanh(y / cap).

constexpr int ROWS = 16, COLUMNS = 256;
// WARPS multiply, one more begins, and looks after what the next block of threads has for this one; and one adds up.
constexpr int HELPER = WARPS, ADDER = WARPS + 1, THREADS = (WARPS + 2) * 32;
static_assert(WARPS % 2 == 0, "barriers follow a float for each warp");
constexpr int SCALES = ROWS * COLUMNS / GROUP * 2;
constexpr int TILE = ROWS * COLUMNS / 2 + SCALES * (1 + ZERO);
// HELD: vectors of 8 that a thread holds while x is normed; BATCH: that it loads at once, if not
constexpr int BATCH = 7;

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
  u64* partials;           // [blocks, 16]: a float each, and that it is there; zero between launches
  float eps, softcap;
  float less;              // minus what the codes are too much
  int n;                   // rows of one matrix
  int k;                   // columns of x, a multiple of 8
  int tiles_per_block;     // of a row block: ceil(K / 256), twice that if SPLIT
  int row_blocks;          // of one matrix
  int slots;               // matrices: 1, or the chosen experts
  int x_per_slot;          // whether each has its own x
  int most_blocks;         // row blocks that a block of threads touches
  int most_parts;          // and what it adds up for them
  int stages;              // of the ring, SPAN tiles each
  u32 per_tiles_per_block, per_stages;  // 2^32 / n, rounded up: a product's upper half is the quotient
  int lead;                // stages that are not yet asked for when the next kernel may start
  u32* so_far;             // blocks that have come that far, then those that leave; 0 between launches. Null if too many
  u32 zero;                // 0, which the compiler does not know
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

DEVICE float squares(const uint4& v) {
  float x[8], sum = 0;
  unpack(v, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
  return sum;
}

// Eight columns of x to where the tensor cores expect them.
DEVICE void place(bf16* xs, int column, const uint4& v) {
  if constexpr (!SPLIT) {
    *reinterpret_cast<uint4*>(xs + column) = times(v, RAISED);
  } else {
    bf16* unit = xs + column / 16 * 32 + column % 16;
    *reinterpret_cast<uint4*>(unit) = times(times(v, SIXTEEN), RAISED);
    *reinterpret_cast<uint4*>(unit + 16) = times(v, RAISED);
  }
}

// A tile's scales (or zeros): of groups 2 t and 2 t + 1 for row g, and for row g + 8; or of both rows for the one group
DEVICE void load_scales(const u8* at, u32 (&s)[2]) {
  const int lane = lane_id();
  if constexpr (GROUP == 32) {
    const uint2 both = reinterpret_cast<const uint2*>(at)[lane];
    s[0] = both.x, s[1] = both.y;
  } else {
    s[0] = reinterpret_cast<const u32*>(at)[GROUP == 64 ? lane : lane / 4 * 2 + lane % 4 / 2];
  }
}

DEVICE float gelu(float x) {
  const float u = x * (0.7978845608f + 0.0356774081f * x * x);
  return x / (1 + __expf(-2 * u));
}

// n / d for n d < 2^32; of d = 1, the 2^32 is 0.
DEVICE u32 quotient(u32 n, u32 per_d) { return per_d ? __umulhi(n, per_d) : n; }

// Whether a row block begins here and ends in the next block of threads, which leaves its part for this one.
DEVICE bool ends_in_next(const Arguments& a, int block, int first, int last) {
  return block * a.tiles_per_block >= first && (block + 1) * a.tiles_per_block > last;
}

// The tiles of each row block, always in the same order, and what is to be done with their sum.
DEVICE void add_up(const Arguments& a, const float* parts, const float* next, u64* added, int first, int last,
                   int first_block, int end_block) {
  const int lane = lane_id(), row = lane % ROWS;
  for (int block = first_block; block < end_block; ++block) {
    const int begin = max(first, block * a.tiles_per_block), end = min(last, (block + 1) * a.tiles_per_block);
    barrier_wait(added + block - first_block, 0);
    float y = ends_in_next(a, block, first, last) && lane < ROWS ? next[row] : 0;
    float more[8] = {};
    const int end_part = (end - 1 - first) / SPAN + 1 + block - first_block;
    for (int i = (begin - first) / SPAN + block - first_block + lane / ROWS; i < end_part; i += 16)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (i + 2 * j < end_part) more[j] += parts[(i + 2 * j) * ROWS + row];
    y += ((more[0] + more[1]) + (more[2] + more[3])) + ((more[4] + more[5]) + (more[6] + more[7]));
    y += __shfl_xor_sync(0xffffffffu, y, ROWS);
    if (begin > block * a.tiles_per_block) {  // it began in the block before, which adds this to its own
      // In one word, so that no fence is needed: one took 5 us, with the copies under way.
      if (lane < ROWS) store_volatile(a.partials + blockIdx.x * ROWS + row, u64{1} << 32 | __float_as_uint(y));
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

// The next kernel starts when all blocks have been here.
DEVICE void start_next(const Arguments& a) {
  if (a.so_far) atomicInc(a.so_far, 2 * gridDim.x - 1);
  grid_trigger();
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) matvec(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) u8 shared[];
  const int warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
  const int width = a.tiles_per_block * COLUMNS;  // of x as the tensor cores see it
  const int x_rows = a.x_per_slot ? a.slots : 1;
  u8* ring = shared;
  bf16* xs = reinterpret_cast<bf16*>(ring + a.stages * SPAN * TILE);
  float* sums = reinterpret_cast<float*>(xs + x_rows * width);  // of x, per 32 columns, times ONE
  float* parts = sums + x_rows * width / 32;                // of y, per stage and row block
  float* next_part = parts + a.most_parts * ROWS;           // and the next block of threads'
  float* scratch = next_part + ROWS;
  u64* filled = reinterpret_cast<u64*>(scratch + THREADS / 32);
  u64* added = filled + a.stages;                           // per row block
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
    store_volatile<u32>(current + stage, number);
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

  if (warp == HELPER) {
    for (int s = lane; s < a.stages; s += 32) barrier_init(filled + s, 1);
    for (int b = first_block + lane; b < end_block; b += 32) {
      const int begin = max(first, b * a.tiles_per_block), end = min(last, (b + 1) * a.tiles_per_block);
      barrier_init(added + b - first_block,
                   (end - 1 - first) / SPAN - (begin - first) / SPAN + 1 + ends_in_next(a, b, first, last));
    }
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
  const auto put = [&](int row, int v, const uint4& x, bool any) {  // by whole warps, four lanes the next four v
    float f[8];
    unpack(x, f);
    float sum = ((f[0] + f[1]) + (f[2] + f[3])) + ((f[4] + f[5]) + (f[6] + f[7]));
#pragma unroll
    for (int other = 1; other < PER_SUM; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (any) {
      place(xs + row * width, v * 8, x);
      if (v % PER_SUM == 0) sums[row * (width / 32) + v / PER_SUM] = sum * ONE;
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
  if (EXPERTS && threadIdx.x == HELPER * 32) prefetch();
  if constexpr (NORM || ADD) {
    uint4 x[HELD], r[HELD];
    float square = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int v = threadIdx.x + i * THREADS;
      x[i] = v < vectors ? reinterpret_cast<const uint4*>(a.x)[v] : uint4{0, 0, 0, 0};
      if (ADD && v < vectors) r[i] = reinterpret_cast<const uint4*>(a.residual)[v];
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i) square += squares(x[i]);
    if constexpr (ADD) {
      const float scale = rsqrtf(block_sum(square, scratch) / a.k + a.eps);
      square = 0;
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int v = threadIdx.x + i * THREADS;
        if (v < vectors) {
          float h[8], w[8], sum[8];
          unpack(x[i], h), unpack(post[i], w), unpack(r[i], sum);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[j] = round_bf16(sum[j] + round_bf16(h[j] * scale * w[j])) * scalar;
          x[i] = pack(sum);
          square += squares(x[i]);
          if (blockIdx.x == 0) reinterpret_cast<uint4*>(a.residual_out)[v] = x[i];
        }
      }
    }
    float scale = 1;
    if (NORM) scale = rsqrtf(block_sum(square, scratch) / a.k + a.eps);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int v = threadIdx.x + i * THREADS;
      if (NORM && v < vectors) {
        float h[8], w[8];
        unpack(x[i], h), unpack(norm[i], w);
#pragma unroll
        for (int j = 0; j < 8; ++j) h[j] *= scale * w[j];
        x[i] = pack(h);
      }
      put(0, v, x[i], v < places);
    }
  } else {
    // Each block begins elsewhere: all of them read the same, and would stand in each other's way.
    const int shift = static_cast<int>(i64{places} * blockIdx.x / gridDim.x) & ~31;
    for (int row = 0; row < x_rows; ++row)
      for (int from = threadIdx.x; from - lane < places; from += BATCH * THREADS) {
        uint4 x[BATCH];
        const auto at = [&](int i) {
          const int v = from + i * THREADS + shift;
          return v < places ? v : v - places;
        };
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          x[i] = {0, 0, 0, 0};
          if (from + i * THREADS < places && at(i) < vectors)
            x[i] = reinterpret_cast<const uint4*>(a.x + i64{row} * a.k)[at(i)];
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
          if (from - lane + i * THREADS < places) put(row, at(i), x[i], from + i * THREADS < places);
      }
  }
  __syncthreads();

  const u32 trigger = max(a.stages, stages_to_do - a.lead);
  if (warp == HELPER) {
    if (lane == 0 && trigger >= stages_to_do) start_next(a);
    if (ends_in_next(a, end_block - 1, first, last)) {
      if (lane < ROWS) {
        u64* from = a.partials + (blockIdx.x + 1) * ROWS + lane;
        u64 part;
        while (!((part = load_volatile(from)) >> 32)) __nanosleep(100);
        *from = 0;
        next_part[lane] = __uint_as_float(static_cast<u32>(part));
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(added + end_block - 1 - first_block);
    }
    // Stays until the next kernel has its blocks, for each of which there is just one multiprocessor with room then: if
    // some were empty, they would get two, which take twice as long. Not for ever: other streams may leave no room.
    if (a.so_far) {
      for (int i = 0; i < 100 && load_volatile(a.so_far) < gridDim.x; ++i) __nanosleep(200);
      __nanosleep(1000);
      if (lane == 0) atomicInc(a.so_far, 2 * gridDim.x - 1);
    }
    return;
  }
  if (warp == ADDER) {
    add_up(a, parts, next_part, added, first, last, first_block, end_block);
    return;
  }

  // 2. Tiles, a stage of them at a time
  uint4 x[4] = {};
  for (u32 number = warp; number < stages_to_do;) {
    const u32 tile = first + number * SPAN, tiles = min(SPAN, last - tile);
    const u32 round = quotient(number, a.per_stages), stage = number - round * a.stages;
    u32 block = quotient(tile, a.per_tiles_per_block), column = tile - block * a.tiles_per_block;
    // A barrier tells a round from the next one only; who runs ahead waits until it is this round's turn.
    while (load_volatile(current + stage) != number) {
      __nanosleep(20);  // leaves the multiprocessor to the others
    }
    barrier_wait(filled + stage, round & 1);
    uint4 words[SPAN][4];
    u32 scales[SPAN][2], zeros[SPAN][2], loaded = 0;
#pragma unroll
    for (int i = 0; i < SPAN; ++i) {
      const u8* data = ring + (stage * SPAN + i) * TILE;  // of the last stage perhaps what was there before
#pragma unroll
      for (int chunk = 0; chunk < 4; ++chunk) {
        words[i][chunk] = reinterpret_cast<const uint4*>(data + chunk * 512)[lane];
        loaded |= words[i][chunk].x;
      }
      load_scales(data + 2048, scales[i]);
      loaded |= scales[i][0];
      if (ZERO) load_scales(data + 2048 + SCALES, zeros[i]), loaded |= zeros[i][0];
    }
    // The room is given back as soon as all of it is in registers. The ballot, 0, needs every lane's: a load that was only
    // issued could be overtaken by the copy that refills the room.
    const u32 again = number + a.stages + __ballot_sync(0xffffffffu, loaded & a.zero);
    if (lane == 0 && again < stages_to_do) {
      fetch(again, stage);
      if (again == trigger) start_next(a);
    }
    float y0 = 0, y1 = 0;
    u32 next = 0;
#pragma unroll
    for (int i = 0; i < SPAN; ++i) {
      if (i >= tiles) break;
      // Not earlier: a stage that is taken by a warp which waits for another one is as good as not there.
      if (i + 1 == tiles && lane == 0) next = shared_add(taken, 1);
      u32 at = column * COLUMNS;
      if (EXPERTS && a.x_per_slot) at += block / a.row_blocks * width;
      const float2 sum = *reinterpret_cast<const float2*>(sums + at / 32 + 2 * t);
      // Column n of B is group n's x, or 0: of two groups at a time, so that their products with the tile's other groups
      // add nothing. Lane (g, t) gets the sums of groups 2 t and 2 t + 1 for rows g and g + 8.
      const uint4* mine = reinterpret_cast<const uint4*>(xs + at + g * 32 + t * 8);
      const float x0 = a.less * sum.x, x1 = a.less * sum.y;
      const float from[4] = {17 * x0, 17 * x1, 16 * x0, 16 * x1};
      float even[4], odd[4];
#pragma unroll
      for (int chunk = 0; chunk < 4; ++chunk) {
        load_if(g / 2 == chunk, x[chunk], mine);
        const uint4 v = words[i][chunk], b = x[chunk];
        u32 w[4];
        widen(v.x, w);
        chunk ? mma(even, w, {b.x, b.y}) : mma_from(even, from, w, {b.x, b.y});
        widen(v.z, w);
        chunk ? mma(odd, w, {b.x, b.y}) : mma_from(odd, from, w, {b.x, b.y});
        widen(v.y, w);
        mma(even, w, {b.z, b.w});
        widen(v.w, w);
        mma(odd, w, {b.z, b.w});
      }
      const auto apply = [&](const u32 (&s)[2], float c0, float c1, float c2, float c3) {
        if constexpr (GROUP == 32) {
          y0 += c0 * low_float(s[0]) + c1 * high_float(s[0]);
          y1 += c2 * low_float(s[1]) + c3 * high_float(s[1]);
        } else {
          y0 += (c0 + c1) * low_float(s[0]);
          y1 += (c2 + c3) * high_float(s[0]);
        }
      };
      apply(scales[i], even[0] - even[2], odd[1] - odd[3], even[2], odd[3]);
      if constexpr (ZERO) apply(zeros[i], sum.x, sum.y, 16 * sum.x, 16 * sum.y);
      if (++column < a.tiles_per_block && i + 1 < tiles) continue;
      // Lanes t = 0 get row g, t = 1 row g + 8.
      float y = (t & 1 ? y1 : y0) + __shfl_xor_sync(0xffffffffu, t & 1 ? y0 : y1, 1);
      y += __shfl_xor_sync(0xffffffffu, y, 2);
      if (t < 2) parts[(number + block - first_block) * ROWS + t * 8 + g] = y * (t ? LOWERED / 16 : LOWERED);
      __syncwarp();
      if (lane == 0) barrier_arrive(added + block - first_block);
      ++block, column = 0;
      y0 = y1 = 0;
    }
    number = __shfl_sync(0xffffffffu, next, 0);
  }
}
