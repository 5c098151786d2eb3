// Attention of a few query tokens to a long cache: the keys are split over all multiprocessors, each warp streams its
// own tiles of 16 keys through asynchronous copies, and the parts are merged in fixed order.
//
// Scores are computed transposed, S^T[16 keys, 8 rows] = K q^T and O^T[H, 8 rows] = V^T P^T, so that the 8 columns of
// an m16n8k16 product hold the query rows (G heads x T tokens) that share a kv head.
//
// Macros: HEAD_DIM; GROUPS, the warps of a team, each with 8 of the query rows; TEAMS of a block, each with its own
// tiles; SLOTS, the tiles of K or V that a team has in flight; CLUSTER, the blocks that merge through each other's
// shared memory; POSITIONS, positions are read and keys may lie anywhere; FUSED, the query and the newest key and value
// come from the projections, one token a row.
#include "common.cuh"

constexpr int H = HEAD_DIM;
constexpr int TILE = 16;
constexpr int ROWS = 8 * GROUPS;
constexpr int WARPS = GROUPS * TEAMS, THREADS = 32 * WARPS;
constexpr int KEY = 2 * H, SLOT = TILE * KEY;
constexpr int CHUNK = TILE * 128;   // bytes of 64 dims of a tile, which copies swizzle
constexpr int PITCH = 2 * H + 16;   // bytes of a query: eight of them start in different banks
constexpr bool Q_IN_REGISTERS = H < 512;
constexpr bool PUSH = CLUSTER > 1 && GROUPS == 1;  // partial sums go to the block that merges them; else it fetches them
constexpr int SLICE = H / 4 / CLUSTER;             // float4 columns that a block of a cluster merges
constexpr float NONE = -1e30f;  // below every score, yet finite: NONE - NONE is 0
constexpr float SLACK = 8;      // weights may grow to 2^8 before the running maximum follows
static_assert(GROUPS + PUSH <= SLOTS, "partial sums, and what is received, take the place of slots");

struct Arguments {
  const bf16* q;  // [B, N, T, H], or FUSED: [B, (N + 2K) H]
  bf16 *k, *v;    // [B, K, C, H]
  bf16* out;      // [B, T, N, H]
  const void* length;  // [B]: tokens held, or FUSED: the new token's position
  const i64 *q_positions, *k_positions;
  const bf16 *q_norm, *k_norm;
  const float* inv_freq;
  float* partial;
  u32* tickets;
  i64 q_row, q_head, q_token, kv_row, kv_head, k_position_row;
  u64 capacity_inverse;  // 2^64 / capacity, upwards
  i32 batch, heads, kv_heads, group, tokens, capacity, window, wide_length, k_eq_v, early;
  u32 tokens_inverse;              // 2^16 / tokens, upwards
  u32 per_head, per_head_inverse;  // clusters that may share the head of a single row, else 0; and 2^32 / that, upwards
  float scale, eps;  // scale includes log2(e)
};

DEVICE float4 cluster_load4(u32 address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
// Stores into a block's shared memory that its barrier counts.
DEVICE void push4(u32 address, float4 x, u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                   address),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
               : "memory");
}
DEVICE void push2(u32 address, float x, float y, u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(address),
               "f"(x), "f"(y), "r"(barrier)
               : "memory");
}
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
// Everything that the block wrote before a __syncthreads is visible to whoever sees the new value, and the reverse.
DEVICE u32 ticket_taken(u32* ticket) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
  return before;
}
DEVICE void add_scaled(float4& sum, float f, float4 x) {
  sum.x += f * x.x, sum.y += f * x.y, sum.z += f * x.z, sum.w += f * x.w;
}
DEVICE void prefetch_bulk(const void* global, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
// From the L2: an earlier kernel may write it between two looks.
DEVICE int value_at(const void* p, int wide, int i) {
  return wide ? static_cast<int>(__ldcg(static_cast<const i64*>(p) + i)) : __ldcg(static_cast<const i32*>(p) + i);
}

// Where the 16 bytes of a tile are that hold `dim` of `key`
DEVICE u32 swizzled(int key, int dim) { return dim / 64 * CHUNK + key * 128 + ((dim / 8 % 8 ^ key % 8) << 4); }

// Division is slow: quotients of few rows, and x mod capacity (Lemire, Kaser, Kurz: Faster remainder by direct computation).
DEVICE u32 head_of(const Arguments& a, u32 row) { return row * a.tokens_inverse >> 16; }
DEVICE u32 token_of(const Arguments& a, u32 row) { return row - head_of(a, row) * a.tokens; }
DEVICE int slot_of(const Arguments& a, u32 x) { return __umul64hi(a.capacity_inverse * x, a.capacity); }

// Positions (POSITIONS: slots) lo .. hi - 1 hold every key that a query of the row may see.
struct Range {
  int lo, hi, first;  // first: the position of the first query
  __device__ int tiles() const { return hi > lo ? (hi - lo + TILE - 1) / TILE : 1; }
};
DEVICE int length_of(const Arguments& a, int b) {
  return a.length ? max(0, value_at(a.length, a.wide_length, b)) + FUSED : a.capacity;
}
DEVICE Range range_of(const Arguments& a, int length) {
  const int first = length - a.tokens, lo = max(0, length - a.capacity);
  if (POSITIONS) return {0, a.k_positions ? a.capacity : min(length, a.capacity), first};
  return {a.window ? max(lo, first - a.window + 1) : lo, length, first};
}

#if FUSED
constexpr int PAIRS = H / 64;  // rotated pairs of dims (d, d + H / 2) that a lane holds
struct Turn {
  float cos[PAIRS], sin[PAIRS];
};
// The angle is a product of up to 42 bits: exact in float64, and reduced there.
DEVICE Turn turn_of(const float (&inv_freq)[PAIRS], int position) {
  Turn turn;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    const double turns = static_cast<double>(position) * inv_freq[i] * 0.15915494309189535;
    const float angle = static_cast<float>(turns - rint(turns)) * 6.283185307f;
    turn.cos[i] = __cosf(angle), turn.sin[i] = __sinf(angle);
  }
  return turn;
}
struct Vector {
  float low[PAIRS], high[PAIRS];
};
struct __align__(2 * PAIRS) Packed {
  bf16 x[PAIRS];
};
DEVICE Vector unpacked(const Packed (&x)[2]) {
  Vector y;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) y.low[i] = to_float(x[0].x[i]), y.high[i] = to_float(x[1].x[i]);
  return y;
}
DEVICE void load_packed(Packed (&y)[2], const bf16* x) {
  y[0] = reinterpret_cast<const Packed*>(x)[lane_id()], y[1] = reinterpret_cast<const Packed*>(x + H / 2)[lane_id()];
}
DEVICE Vector load_vector(const bf16* x) {
  Packed y[2];
  load_packed(y, x);
  return unpacked(y);
}
DEVICE void store_vector(bf16* x, const Vector& y) {
  Packed low, high;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) low.x[i] = to_bf16(y.low[i]), high.x[i] = to_bf16(y.high[i]);
  reinterpret_cast<Packed*>(x)[lane_id()] = low, reinterpret_cast<Packed*>(x + H / 2)[lane_id()] = high;
}
// As a key of a tile
DEVICE void store_key(u8* tile, int key, const Vector& y) {
  const int dim = lane_id() * PAIRS;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Packed x;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) x.x[i] = to_bf16(half ? y.high[i] : y.low[i]);
    *reinterpret_cast<Packed*>(tile + swizzled(key, half * H / 2 + dim) + dim % 8 * 2) = x;
  }
}
DEVICE Vector normed(const Vector& x, float eps) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) sum += x.low[i] * x.low[i] + x.high[i] * x.high[i];
  const float scale = rsqrtf(warp_sum(sum) / H + eps);
  Vector y;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) y.low[i] = x.low[i] * scale, y.high[i] = x.high[i] * scale;
  return y;
}
// Weighted and rounded as a norm's result, then rotated.
DEVICE Vector rotated(const Vector& x, const Vector& weight, const Turn& turn) {
  Vector y;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    const float low = round_bf16(x.low[i] * weight.low[i]), high = round_bf16(x.high[i] * weight.high[i]);
    y.low[i] = low * turn.cos[i] - high * turn.sin[i], y.high[i] = high * turn.cos[i] + low * turn.sin[i];
  }
  return y;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
           const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) u8 memory[];
  u8* const slots = memory;                                    // [TEAMS][SLOTS][SLOT]
  u8* const q_rows = slots + TEAMS * SLOTS * SLOT;             // [ROWS][PITCH]
  float* const team_m = reinterpret_cast<float*>(q_rows + ROWS * PITCH);  // [TEAMS][ROWS]
  float* const team_l = team_m + TEAMS * ROWS;
  float* const block_m = team_l + TEAMS * ROWS;  // [ROWS]
  float* const block_l = block_m + ROWS;
  u64* const full = reinterpret_cast<u64*>(block_l + ROWS);  // [TEAMS][SLOTS]
  u64* const empty = full + TEAMS * SLOTS;
  u64* const received = empty + TEAMS * SLOTS;
  float2* const received_stats = reinterpret_cast<float2*>(received + 1);  // [CLUSTER][ROWS], PUSH
  u32* const is_last = reinterpret_cast<u32*>(received_stats + CLUSTER * ROWS);
  i32* const key_positions = reinterpret_cast<i32*>(is_last + 2);  // [WARPS][SLOTS][TILE], POSITIONS

  if (!FUSED) {
    // What is read first may come to the L2 meanwhile: the length, and the first row's queries, a part by each block.
    const int i = blockIdx.x * THREADS + threadIdx.x, row = i / (H / 64);
    if (i == 0 && a.length) prefetch(a.length);
    if (row < a.heads * a.tokens)
      prefetch(a.q + head_of(a, row) * a.q_head + token_of(a, row) * a.q_token + i % (H / 64) * 64);
  }
  const int lane = lane_id(), warp = threadIdx.x / 32, team = warp % TEAMS, group = warp / TEAMS;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const u32 cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;

  u64* const my_full = full + team * SLOTS;
  u64* const my_empty = empty + team * SLOTS;
  u8* const my_slots = slots + team * SLOTS * SLOT;
  if (threadIdx.x == 0) prefetch_map(k_map), prefetch_map(v_map);
  if (group == 0 && lane < SLOTS) {
    barrier_init(my_full + lane, 1), barrier_init(my_empty + lane, GROUPS);
    barrier_init_fence();
  }
  if (PUSH && threadIdx.x == 0) barrier_init(received, 1), barrier_init_fence();
  if (GROUPS == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
#if FUSED
  float inv_freq[PAIRS];
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) inv_freq[i] = a.inv_freq[H / 2 + lane * PAIRS + i];
  Packed q_weight[2], k_weight[2] = {};
  load_packed(q_weight, a.q_norm);
  if (a.k_norm && warp == 0) load_packed(k_weight, a.k_norm);
#endif
  bool waited = false;
  const auto wait = [&]() {
    if (!waited) grid_wait();
    waited = true;
  };
  const int G = a.group, rows = G * a.tokens, r0 = group * 8 + lane % 4 * 2;
  constexpr int STRIDE = CLUSTER * TEAMS;

  // 1. This cluster's share of the list of (row, kv head, tile), from `at` to `end`, and of it the item at `at`
  u32 at = 0, end = 0, kv = 0, per_head = 0, parts = 0, total = 0, before = 0;  // before: tiles of the rows before b
  u32 item_start, item_end;
  int b = 0, first, last, lo_slot, newest_at, q_at[2], lowest, highest, tile;
  bool nothing;
  Range range;
  const auto start_of = [&](u32 part) { return total * part / parts; };
  const auto find = [&]() {
#pragma unroll 1
    while (at >= before + range.tiles() * a.kv_heads) {
      before += range.tiles() * a.kv_heads;
      range = range_of(a, length_of(a, ++b));
    }
    const u32 tiles = range.tiles();
    if (!a.per_head) kv = (at - before) / tiles;
    item_start = before + kv * tiles, item_end = item_start + tiles;
    first = at - item_start, last = min(end, item_end) - item_start;
    nothing = range.hi <= range.lo;
    tile = nothing ? last : first + team * CLUSTER + rank;
    // Tiles are counted from the newest key backwards; the oldest tile repeats the oldest key in front.
    lo_slot = POSITIONS ? 0 : slot_of(a, range.lo);
    newest_at = FUSED && a.k_norm ? range.hi - 1 : -1;
    const auto position_of = [&](int t) {
      return POSITIONS && a.q_positions ? static_cast<int>(a.q_positions[i64(b) * a.tokens + t]) : range.first + t;
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) q_at[i] = r0 + i < rows ? position_of(token_of(a, r0 + i)) : -1;
    lowest = 0x7fffffff, highest = -1;
    if (POSITIONS) {
#pragma unroll 1
      for (int t = 0; t < a.tokens; ++t) {
        if (position_of(t) >= 0) lowest = min(lowest, position_of(t));
        highest = max(highest, position_of(t));
      }
    } else {
      lowest = max(range.first, 0), highest = range.hi - 1;
    }
  };
  const auto slot_from = [&](int position) {
    const int slot = lo_slot + position - range.lo;
    return slot < a.capacity ? slot : slot - a.capacity;
  };
  const auto load_q = [&]() {
#pragma unroll 2
    for (int i = threadIdx.x; i < rows * (H / 8); i += THREADS) {
      const int row = i / (H / 8), head = kv * G + head_of(a, row), column = i % (H / 8);
      const bf16* const from = a.q + b * a.q_row + head * a.q_head + token_of(a, row) * a.q_token;
      copy16(q_rows + row * PITCH + column * 16, from + column * 8);
    }
  };
  bool q_asked = false;
  const bool ahead = FUSED || a.early;  // of the wait, lengths and the cache are read
  if (!ahead && (POSITIONS || !a.per_head)) wait();
#pragma unroll 1
  while (true) {
    const int length = length_of(a, 0);
    range = range_of(a, length);
    if (a.per_head) {
      // A head that gives no team two tiles is not split over clusters, and none gets an empty part.
      const u32 tiles = range.tiles();
      per_head = tiles <= CLUSTER * TEAMS || tiles < a.per_head ? 1 : a.per_head;
      const auto divided = [&](u32 x) { return per_head == 1 ? x : __umulhi(x, a.per_head_inverse); };
      kv = divided(cluster);
      const u32 part = cluster - kv * per_head;
      at = end = 0;
      if (kv < a.kv_heads) at = kv * tiles + divided(tiles * part), end = kv * tiles + divided(tiles * (part + 1));
    } else {
#pragma unroll 1
      for (int b = 0; b < a.batch; ++b) total += range_of(a, length_of(a, b)).tiles() * a.kv_heads;
      parts = min(clusters, total);
      if (cluster < parts) at = start_of(cluster), end = start_of(cluster + 1);
    }
    if (at < end) find();
    if (ahead || waited) break;
    // The length may still change, but most likely it does not.
    wait();
    const int now = length_of(a, 0);
    if (at < end) load_q();
    q_asked = true;
    if (now == length) break;
    copy_wait(), q_asked = false;
  }

  const u32 my_start = at;
  int slot = 0;
  u32 phase = 0, received_phase = 0;
  if (at == end) {
    wait();
    grid_trigger();
  }
  while (at < end) {
    bf16* const k = a.k + b * a.kv_row + kv * a.kv_head;
    bf16* const v = a.v + b * a.kv_row + kv * a.kv_head;

    // 2. Copies: a cursor runs over this team's tiles, K then V of each.
    int issued = 0, key_at = 0, source = 0;
    bool is_v = false, wrote = false;  // wrote: slots, otherwise than by the copy engine
    const auto seek = [&]() {  // the next tile with a key that some query sees
      for (; tile < last; tile += STRIDE) {
        const int index = tile * TILE + lane % TILE;
        key_at = -1;
        if (index < range.hi) {
          const int length = range.first + a.tokens;
          key_at = a.k_positions ? static_cast<int>(a.k_positions[b * a.k_position_row + index])
                                 : length - 1 - slot_of(a, length - 1 - index);
        }
        const bool seen = key_at >= 0 && key_at <= highest && (!a.window || key_at > lowest - a.window);
        const u32 any = __ballot_sync(0xffffffffu, seen);
        source = tile * TILE + (seen ? lane % TILE : __ffs(any) - 1);
        if (any) return;
      }
    };
    if (POSITIONS) seek();
    const auto fetch = [&](int into) {
      if (tile >= last) return;
      if (POSITIONS && !is_v && lane < TILE) key_positions[(warp * SLOTS + into) * TILE + lane] = key_at;
      if (group == 0) {
        u8* const to = my_slots + into * SLOT;
        const int oldest = range.hi - TILE * (tile + 1);
        const int start = slot_from(oldest);
        if (!POSITIONS && oldest >= range.lo && start + TILE <= a.capacity) {
          if (wrote) fence_for_engines();
          if (lane == 0) {
            barrier_expect(my_full + into, SLOT);
            copy_box(shared_address(to), is_v ? v_map : k_map, start, 0, kv, b, my_full + into);
          }
        } else {
          // Keys from anywhere, 16 bytes by each lane at a time
          bool skip = false;
          if (!POSITIONS) {
            const int position = max(oldest + lane % TILE, range.lo);
            source = slot_from(position);
            skip = position == newest_at;
          }
          const bf16* const from = is_v ? v : k;
#pragma unroll 4
          for (int e = lane; e < TILE * H / 8; e += 32) {
            const int key = e / (H / 8), dim = e % (H / 8) * 8, row = __shfl_sync(0xffffffffu, skip ? -1 : source, key);
            if (row >= 0) copy16(to + swizzled(key, dim), from + i64(row) * H + dim);
          }
          barrier_await_copies(my_full + into);
          __syncwarp();
          if (lane == 0) barrier_arrive(my_full + into);
          wrote = true;
        }
      }
      if (is_v) {
        tile += STRIDE;
        if (POSITIONS) seek();
      } else {
        ++issued;
      }
      is_v = !is_v;
    };
    // Else they would queue behind the keys.
    if (!FUSED && waited && !q_asked) load_q(), q_asked = true;
#pragma unroll 1
    for (int i = 0; i < SLOTS; ++i) fetch(slot + i < SLOTS ? slot + i : slot + i - SLOTS);

    if (!waited && !POSITIONS && group == 0) {
      // The next tile, which has no slot yet, may come to the L2.
      const int oldest = range.hi - TILE * (tile + 1);
      const int start = slot_from(oldest);
      if (lane < 2 && tile < last && oldest >= range.lo && start + TILE <= a.capacity) {
        prefetch_bulk((lane ? v : k) + i64(start) * H, TILE * KEY);
      }
    }

    // 3. Queries, as rows of shared memory and then as operands in registers
#if FUSED
    {
      const Turn turn = turn_of(inv_freq, range.hi - 1);
      wait();
      const bf16* const x = a.q + b * a.q_row;
      if (newest_at >= 0 && first == 0 && rank == 0 && warp == 0) {  // its tile is the first of team 0
        const i64 offset = i64(slot_of(a, newest_at)) * H;
        const int value_head = a.heads + (a.k_eq_v ? 0 : a.kv_heads) + kv;
        const Vector raw_k = load_vector(x + (a.heads + kv) * H), raw_v = load_vector(x + value_head * H);
        const Vector new_k = rotated(normed(raw_k, a.eps), unpacked(k_weight), turn), new_v = normed(raw_v, a.eps);
        store_vector(k + offset, new_k), store_vector(v + offset, new_v);
        const int v_slot = slot + 1 < SLOTS ? slot + 1 : 0;
        barrier_wait(my_full + slot, phase), barrier_wait(my_full + v_slot, slot + 1 < SLOTS ? phase : phase ^ 1);
        for (int i = newest_at == range.lo ? 0 : TILE - 1; i < TILE; ++i) {
          store_key(my_slots + slot * SLOT, i, new_k), store_key(my_slots + v_slot * SLOT, i, new_v);
        }
        fence_for_engines();
      }
      constexpr int BATCH = 4;
#pragma unroll 1
      for (int r = WARPS - 1 - warp; r < G; r += BATCH * WARPS) {
        Packed raw[BATCH][2];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) load_packed(raw[i], x + (kv * G + min(r + i * WARPS, G - 1)) * H);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          if (r + i * WARPS >= G) break;
          const Vector y = rotated(normed(unpacked(raw[i]), a.eps), unpacked(q_weight), turn);
          store_vector(reinterpret_cast<bf16*>(q_rows + (r + i * WARPS) * PITCH), y);
        }
      }
    }
#else
    wait();
    if (!q_asked) load_q();
    q_asked = false;
    copy_wait();
#endif
#pragma unroll 1
    for (int i = rows * (H / 8) + threadIdx.x; i < ROWS * (H / 8); i += THREADS) {
      reinterpret_cast<uint4*>(q_rows + i / (H / 8) * PITCH)[i % (H / 8)] = {0, 0, 0, 0};
    }
    __syncthreads();
    grid_trigger();  // not before: what the next kernel asks for must not delay the queries
    const u8* const my_q = q_rows + (group * 8 + lane % 8) * PITCH + lane / 8 * 16;
    u32 q[Q_IN_REGISTERS ? H / 32 : 1][4];
    if (Q_IN_REGISTERS) {
#pragma unroll
      for (int i = 0; i < H / 32; ++i) load_matrix(q[i], my_q + i * 64);
    }

    // 4. The stream
    float o[H / 16][4], m[2] = {NONE, NONE}, l[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < H / 16; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
    const auto release = [&]() {
      __syncwarp();
      if (GROUPS > 1) {
        if (lane == 0) barrier_arrive(my_empty + slot);
        if (group == 0) barrier_wait(my_empty + slot, phase);
      }
      fetch(slot);
      if (++slot == SLOTS) slot = 0, phase ^= 1;
    };
    for (int used = 0, now = first + team * CLUSTER + rank; used < issued; ++used, now += STRIDE) {
      barrier_wait(my_full + slot, phase);
      u8* const keys = my_slots + slot * SLOT;
      float s4[4][4] = {};
#pragma unroll
      for (int i = 0; i < H / 32; ++i) {
        u32 loaded[4];
        if (!Q_IN_REGISTERS) load_matrix(loaded, my_q + i * 64);
        const u32(&y)[4] = Q_IN_REGISTERS ? q[i] : loaded;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          u32 x[4];
          load_matrix(x, keys + swizzled(lane % 16, i * 32 + j * 16 + lane / 16 * 8));
          mma(s4[i % 2 * 2 + j], x, {y[2 * j], y[2 * j + 1]});
        }
      }
      float s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] = (s4[0][i] + s4[1][i] + s4[2][i] + s4[3][i]) * a.scale;
      int at0 = range.hi - TILE * (now + 1) + lane / 4, at1 = at0 + 8;
      if (POSITIONS) {
        const i32* const p = key_positions + (warp * SLOTS + slot) * TILE + lane / 4;
        at0 = p[0], at1 = p[8];
      }
      const int oldest = range.hi - TILE * (now + 1), youngest = oldest + TILE - 1;
      if (POSITIONS || oldest < range.lo || youngest > lowest || (a.window && oldest <= highest - a.window)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = i < 2 ? at0 : at1, query = q_at[i % 2];
          const bool seen = key >= (POSITIONS ? 0 : range.lo) && key <= query && (!a.window || key > query - a.window);
          if (!seen) s[i] = -__int_as_float(0x7f800000);
        }
      }
      release();

      if (__any_sync(0xffffffffu, fmaxf(s[0], s[2]) > m[0] + SLACK || fmaxf(s[1], s[3]) > m[1] + SLACK)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float top = fmaxf(m[i], fmaxf(s[i], s[i + 2]));
#pragma unroll
          for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
          const float f = exp2f(m[i] - top);
          m[i] = top, l[i] *= f;
#pragma unroll
          for (int d = 0; d < H / 16; ++d) o[d][i] *= f, o[d][i + 2] *= f;
        }
      }
      const u32 low = to_bf16x2(exp2f(s[0] - m[0]), exp2f(s[1] - m[1]));
      const u32 high = to_bf16x2(exp2f(s[2] - m[0]), exp2f(s[3] - m[1]));
      l[0] += low_float(low) + low_float(high), l[1] += high_float(low) + high_float(high);
      const u32 p[2] = {transposed(low), transposed(high)};

      barrier_wait(my_full + slot, phase);
      u8* const values = my_slots + slot * SLOT;
#pragma unroll
      for (int i = 0; i < H / 16; ++i) {
        u32 x[4];
        load_matrix_transposed(x, values + swizzled(lane % 8 + lane / 16 * 8, i * 16 + lane / 8 % 2 * 8));
        mma(o[i], x, p);
      }
      release();
    }

    // 5. The sum over a block's teams, of which each block of the cluster is sent its columns
    // Floats of a team's sums, [rows][H]: those of a lane's rows are in different banks than its neighbours'.
    const auto sums = [&](int t) { return reinterpret_cast<float*>(slots + t * SLOTS * SLOT); };
    const auto place_of = [&](int row, int column) { return row * H + (column ^ row / 2 % 4 * 8); };
    float4* const inbox = reinterpret_cast<float4*>(slots + GROUPS * SLOT);  // [CLUSTER][rows][SLICE], PUSH
    if (PUSH) {
      if (threadIdx.x == 0) barrier_expect(received, CLUSTER * rows * (16 * SLICE + 8));
      __syncwarp();
      cluster_arrive_relaxed();
    }
    if (GROUPS > 1) __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) l[i] += __shfl_xor_sync(0xffffffffu, l[i], step);
      if (lane < 4) team_m[team * ROWS + r0 + i] = m[i], team_l[team * ROWS + r0 + i] = l[i];
      if (r0 + i < rows) {
#pragma unroll
        for (int d = 0; d < H / 16; ++d) {
          sums(team)[place_of(r0 + i, d * 16 + lane / 4)] = o[d][i];
          sums(team)[place_of(r0 + i, d * 16 + 8 + lane / 4)] = o[d][i + 2];
        }
      }
    }
    __syncthreads();
    if (PUSH) cluster_wait();
    const auto top_of = [&](int row) {
      float top = NONE;
#pragma unroll
      for (int t = 0; t < TEAMS; ++t) top = fmaxf(top, team_m[t * ROWS + row]);
      return top;
    };
    for (int i = threadIdx.x; i < rows * (PUSH ? CLUSTER : 1); i += THREADS) {
      const int row = PUSH ? i / CLUSTER : i, owner = i % CLUSTER;
      const float top = top_of(row);
      float sum = 0;
#pragma unroll
      for (int t = 0; t < TEAMS; ++t) sum += exp2f(team_m[t * ROWS + row] - top) * team_l[t * ROWS + row];
      if (PUSH) {
        push2(cluster_address(received_stats + rank * ROWS + row, owner), top, sum, cluster_address(received, owner));
      } else {
        block_m[row] = top, block_l[row] = sum;
      }
    }
    constexpr int BATCH = 4;
    for (int start = threadIdx.x; start < rows * (H / 4); start += BATCH * THREADS) {
      float4 sum[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int e = min(start + i * THREADS, rows * (H / 4) - 1), row = e / (H / 4);
        const float top = top_of(row);
        sum[i] = {0, 0, 0, 0};
#pragma unroll
        for (int t = 0; t < TEAMS; ++t) {
          const float4 x = *reinterpret_cast<float4*>(sums(t) + place_of(row, e % (H / 4) * 4));
          add_scaled(sum[i], exp2f(team_m[t * ROWS + row] - top), x);
        }
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int e = start + i * THREADS, row = e / (H / 4), column = e % (H / 4);
        if (e >= rows * (H / 4)) break;
        if (PUSH) {
          const int owner = column / SLICE;
          float4* const to = inbox + (rank * rows + row) * SLICE + column % SLICE;
          push4(cluster_address(to, owner), sum[i], cluster_address(received, owner));
        } else {
          *reinterpret_cast<float4*>(sums(0) + place_of(row, column * 4)) = sum[i];
        }
      }
    }
    if (PUSH) {
      barrier_wait(received, received_phase);
      received_phase ^= 1;
    } else if (CLUSTER > 1) {
      cluster_arrive(), cluster_wait();
    } else {
      __syncthreads();
    }

    // 6. The sum over the cluster's blocks
    const bool whole = at == item_start && end >= item_end;
    // Places for partial sums: a cluster has one for a head that it begins with, and one for a head that it ends with.
    const auto sums_of = [&](u32 place) { return reinterpret_cast<float4*>(a.partial) + i64(place) * rows * (H / 4); };
    const auto stats_of = [&](u32 place) {
      float* const stats = a.partial + i64(2 * clusters) * rows * H;
      return reinterpret_cast<float2*>(stats) + i64(place * CLUSTER + rank) * rows;
    };
    const u32 my_place = 2 * cluster + (at != my_start);
    const auto write = [&](int row, int column, float4 sum, float l) {
      const int head = kv * G + head_of(a, row), t = token_of(a, row);
      const float f = l > 0 ? 1 / l : 0;
      bf16* const to = a.out + ((i64(b) * a.tokens + t) * a.heads + head) * H;
      reinterpret_cast<uint2*>(to)[column] = {to_bf16x2(sum.x * f, sum.y * f), to_bf16x2(sum.z * f, sum.w * f)};
    };
    for (int e = threadIdx.x; e < rows * SLICE; e += THREADS) {
      const int row = e / SLICE, column = rank * SLICE + e % SLICE, offset = place_of(row, column * 4);
      float2 stats[CLUSTER];
      float4 x[CLUSTER];
#pragma unroll
      for (int i = 0; i < CLUSTER; ++i) {
        if (PUSH) {
          stats[i] = received_stats[i * ROWS + row], x[i] = inbox[i * rows * SLICE + e];
        } else if (CLUSTER > 1) {
          stats[i].x = cluster_load(cluster_address(block_m + row, i));
          stats[i].y = cluster_load(cluster_address(block_l + row, i));
          x[i] = cluster_load4(cluster_address(sums(0) + offset, i));
        } else {
          stats[i] = {block_m[row], block_l[row]}, x[i] = *reinterpret_cast<float4*>(sums(0) + offset);
        }
      }
      float top = NONE, sum_l = 0;
      float4 sum = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < CLUSTER; ++i) top = fmaxf(top, stats[i].x);
#pragma unroll
      for (int i = 0; i < CLUSTER; ++i) {
        const float f = exp2f(stats[i].x - top);
        sum_l += f * stats[i].y, add_scaled(sum, f, x[i]);
      }
      if (whole) {
        write(row, column, sum, sum_l);
      } else {
        sums_of(my_place)[row * (H / 4) + column] = sum;
        if (e % SLICE == 0) stats_of(my_place)[row] = {top, sum_l};
      }
    }

    // 7. The sum over clusters: by the last one to arrive, each block its columns
    if (!whole) {
      u32 c0 = kv * per_head, c1 = c0 + per_head, first_place = 2 * c0;
      if (!a.per_head) {
        c0 = cluster, c1 = cluster + 1;
        while (start_of(c0) > item_start) --c0;
        while (c1 < parts && start_of(c1) < item_end) ++c1;
        first_place = 2 * c0 + (start_of(c0) < item_start);
      }
      u32* const ticket = a.tickets + (b * a.kv_heads + kv) * CLUSTER + rank;
      __syncthreads();
      if (threadIdx.x == 0) *is_last = ticket_taken(ticket) == c1 - c0 - 1;
      __syncthreads();
      if (*is_last) {
        if (threadIdx.x == 0) *ticket = 0;
        for (int e = threadIdx.x; e < rows * SLICE; e += THREADS) {
          const int row = e / SLICE, column = rank * SLICE + e % SLICE;
          float top = NONE, sum_l = 0;
          float4 sum = {0, 0, 0, 0};
          constexpr int PARTS = 8;
          for (u32 c = c0; c < c1; c += PARTS) {
            float2 stats[PARTS];
            float4 x[PARTS];
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
              const u32 place = c + i == c0 ? first_place : 2 * min(c + i, c1 - 1);
              stats[i] = __ldcg(stats_of(place) + row);
              x[i] = __ldcg(sums_of(place) + row * (H / 4) + column);
            }
            const float old = top;
#pragma unroll
            for (int i = 0; i < PARTS; ++i) top = fmaxf(top, stats[i].x);
            const float kept = exp2f(old - top);
            sum_l *= kept, sum = {sum.x * kept, sum.y * kept, sum.z * kept, sum.w * kept};
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
              const float f = c + i < c1 ? exp2f(stats[i].x - top) : 0;
              sum_l += f * stats[i].y, add_scaled(sum, f, x[i]);
            }
          }
          write(row, column, sum, sum_l);
        }
      }
    }
    // Until here the block's sums were read; copies may overwrite them now.
    fence_for_engines();
    if (CLUSTER > 1 && !PUSH) {
      cluster_arrive(), cluster_wait();
    } else {
      __syncthreads();
    }
    at = item_start + last;
    if (at < end) find();
  }
}
