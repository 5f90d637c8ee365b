// Absorbed latent attention over a paged cache, for Hopper (sm_90a).
//
// An item of work is 64 rows, each a query of one head, and one part of one sequence. Every multiprocessor takes items
// in turn; the last one of a tile to finish adds its parts. The rows of all heads read the same cached rows, so a block
// of 64 keys is copied once and used twice: all its numbers are keys, its first RANK numbers are also values.
//
// Two warpgroups multiply. Of each pair of key blocks, warpgroup 0 computes the scores of the first and warpgroup 1
// those of the second, while the other one's softmax runs; each sums the values of both blocks for its half of the
// value columns, so that 64 × RANK sums fit into registers. They exchange the exponentiated scores and the rows'
// maxima through shared memory. One warp copies pages with the tensor memory accelerator (TMA). If the cache has 8-bit
// blocks, a third warpgroup loads them instead, and stores their numbers in bfloat16.
//
// The arithmetic of a row depends on its own sequence alone: on nothing that other sequences or the launch decide.
//
// Set by the compiler's command line:
//   RANK        value columns: 256 or 512; a row has up to 64 more columns, copied as 64 with zeros behind them
//   FP8         1: rows of RANK e4m3 values, RANK / 128 float32 scales, 64 bfloat16 numbers; 0: rows of bfloat16
//   SHORTEST_PART, LONGEST_PART    keys of a part at least, if there are as many, and at most

#ifdef EMULATED  // on a CPU, by tests/helpers/cuda_emulation, which defines the same
#include "primitives.h"
#else
#include "hopper.cuh"
#endif

constexpr int ROWS = 64, KEYS = 64, COLUMNS = 64;  // of a tile: queries, keys of a page, columns of one copy
constexpr int HALF = RANK / 2;                     // value columns of a warpgroup
constexpr int VALUE_TILES = RANK / COLUMNS, TILES = VALUE_TILES + 1;
constexpr u32 BYTES_TILE = 64 * COLUMNS * 2;
constexpr u32 BYTES_KEYS = TILES * BYTES_TILE;
constexpr int BLOCK = 128;  // numbers with one scale
constexpr u32 BYTES_ROW = RANK + RANK / BLOCK * 4 + COLUMNS * 2;  // of 8-bit blocks
constexpr int COPIERS = FP8 ? 4 : 1;  // warps that copy, or convert, the keys
constexpr int REGISTERS = FP8 ? 208 : 232, REGISTERS_OF_COPIERS = FP8 ? 96 : 32;  // of a thread

// Shared memory: the queries; two blocks of keys; of both warpgroups the rows' maxima and sums; how many parts are
// finished; barriers. The last tile of a block, its rotated columns, is read for scores alone; then it holds the
// exponentiated scores of the block, the weights of its values.
constexpr u32 OFFSET_KEYS = BYTES_KEYS, WEIGHTS = VALUE_TILES * BYTES_TILE;
constexpr u32 OFFSET_MAXIMA = OFFSET_KEYS + 2 * BYTES_KEYS, OFFSET_SUMS = OFFSET_MAXIMA + 2 * ROWS * 4;
constexpr u32 OFFSET_FINISHED = OFFSET_SUMS + 2 * ROWS * 4, OFFSET_BARRIERS = OFFSET_FINISHED + 8;

// Barriers: of the queries, copied and read; then for each block of keys and each half of its columns, full and empty.
// Warpgroup 0 reads the first half of the values, and warpgroup 1 the second one. The last tile belongs to the half of
// the warpgroup that reads the weights from there: to the second half of the first block, and to the first half of the
// second block.
constexpr u32 QUERIES = 0, QUERIES_READ = 8, FULL = 16, EMPTY = FULL + 4 * 8;

// sequences; queries · heads rows of each; most parts of a sequence; width of the page table.
struct Sizes {
    int batch, queries, heads, parts, table_width;
    float scale;  // of scores, times log2(e)
};

#ifndef EMULATED

template <int NUMBER>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(NUMBER));
}

template <int NUMBER>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(NUMBER));
}

// Named barriers: THREADS arrive, and those that synchronize also wait.
template <int NAME, int THREADS>
__device__ __forceinline__ void arrive() {
    asm volatile("bar.arrive %0, %1;" ::"n"(NAME), "n"(THREADS) : "memory");
}

template <int NAME, int THREADS>
__device__ __forceinline__ void synchronize() {
    asm volatile("bar.sync %0, %1;" ::"n"(NAME), "n"(THREADS) : "memory");
}

// What this thread wrote into shared memory becomes visible to the tensor cores.
__device__ __forceinline__ void show_to_tensor_cores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes of the cache, which nothing changes meanwhile.
__device__ __forceinline__ uint4 load_16(const u8* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ float load_number(const u8* address) {
    float value;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(address));
    return value;
}

__device__ __forceinline__ void store_16(u32 address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
        ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Two e4m3 numbers times their scale, rounded to bfloat16.
__device__ __forceinline__ u32 scaled_pair(u32 two, float scale) {
    u32 halves;
    float low, high;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((unsigned short)two));
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
        : "=f"(low), "=f"(high) : "r"(halves));
    return as_bfloat16(low * scale, high * scale);
}

// The same of values, whose rows are summed over: it holds the distance of the next 64 columns, and adding 128 moves it
// by 16 rows.
__device__ __forceinline__ u32 value_descriptor(u32 address) {
    return address >> 4 | BYTES_TILE / 16 << 16;
}

#define TEN(n) "%" n "0, %" n "1, %" n "2, %" n "3, %" n "4, %" n "5, %" n "6, %" n "7, %" n "8, %" n "9, "
#define SUMS_32 TEN("") TEN("1") TEN("2") "%30, %31"
#define SUMS_64 TEN("") TEN("1") TEN("2") TEN("3") TEN("4") TEN("5") "%60, %61, %62, %63"
#define SUMS_128 TEN("") TEN("1") TEN("2") TEN("3") TEN("4") TEN("5") TEN("6") TEN("7") TEN("8") TEN("9") TEN("10") \
    TEN("11") "%120, %121, %122, %123, %124, %125, %126, %127"
#define OUT_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
    "+f"(d[i + 6]), "+f"(d[i + 7])
#define OUT_32(i) OUT_8(i), OUT_8(i + 8), OUT_8(i + 16), OUT_8(i + 24)

// scores (64 × 64) = or += queries (64 × 16) · keys (64 × 16) transposed, by the tensor cores, without waiting.
__device__ __forceinline__ void multiply_keys(float (&d)[32], u32 queries, u32 keys, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        ".reg .b64 a, b;\n"
        "mov.b64 a, {%32, 0x40000040};\n"
        "mov.b64 b, {%33, 0x40000040};\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SUMS_32 "}, a, b, p, 1, 1, 0, 0;\n"
        "}\n" : OUT_32(0) : "r"(queries), "r"(keys), "r"(add));
}

// sums (64 × HALF) += weights (64 × 16) · values (16 × HALF). The weights are in registers, or in shared memory.
#if RANK == 512
#define SUMS SUMS_128
#define OUT OUT_32(0), OUT_32(32), OUT_32(64), OUT_32(96)
#define WIDE "n256"
#define A0 "%128"
#define A1 "%129"
#define A2 "%130"
#define A3 "%131"
#define B "%132"
#define B_AFTER_A "%129"
#else
#define SUMS SUMS_64
#define OUT OUT_32(0), OUT_32(32)
#define WIDE "n128"
#define A0 "%64"
#define A1 "%65"
#define A2 "%66"
#define A3 "%67"
#define B "%68"
#define B_AFTER_A "%65"
#endif

__device__ __forceinline__ void multiply_values(float (&d)[HALF / 2], const u32* weights, u32 values) {
    asm volatile(
        "{\n"
        ".reg .b64 b;\n"
        "mov.b64 b, {" B ", 0x40000040};\n"
        "wgmma.mma_async.sync.aligned.m64" WIDE "k16.f32.bf16.bf16 {" SUMS "}, "
        "{" A0 ", " A1 ", " A2 ", " A3 "}, b, 1, 1, 1, 1;\n"
        "}\n" : OUT : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(values));
}

__device__ __forceinline__ void multiply_values(float (&d)[HALF / 2], u32 weights, u32 values) {
    asm volatile(
        "{\n"
        ".reg .b64 a, b;\n"
        "mov.b64 a, {" A0 ", 0x40000040};\n"
        "mov.b64 b, {" B_AFTER_A ", 0x40000040};\n"
        "wgmma.mma_async.sync.aligned.m64" WIDE "k16.f32.bf16.bf16 {" SUMS "}, a, b, 1, 1, 1, 0, 1;\n"
        "}\n" : OUT : "r"(weights), "r"(values));
}

template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Stores four matrices of 8 × 8 numbers of 16 bits; thread t gives the address of row t % 8 of matrix t / 8.
__device__ __forceinline__ void store_matrices(u32 address, const u32* numbers) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::
        "r"(address), "r"(numbers[0]), "r"(numbers[1]), "r"(numbers[2]), "r"(numbers[3]) : "memory");
}

// Numbers that another multiprocessor may have written during this launch.
__device__ __forceinline__ float4 load_result(const float* address) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address) : "memory");
    return v;
}

__device__ __forceinline__ float load_result_number(const float* address) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
}

// Keeps the compiler from computing a number anew wherever it is used.
__device__ __forceinline__ void keep(u32& number) {
    asm volatile("" : "+r"(number));
}

#endif

#define INFINITE __int_as_float(0x7f800000)
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

// Named barriers of the two warpgroups, and one of each alone.
enum {
    FIRST_MAXIMUM = 1, FIRST_WEIGHTS, SECOND_WEIGHTS, SUMS_ARE_READ, SUMS_ARE_THERE, PART_IS_STORED, PART_IS_COUNTED,
    ZEROED,
};

// The keys of a part: a sequence is cut by its own length alone.
__device__ __forceinline__ int part_keys(int length) {
    int quarter = (length + 4 * KEYS - 1) / (4 * KEYS) * KEYS;
    return min(max(quarter, SHORTEST_PART), LONGEST_PART);
}

// An item of work: its sequence, tile of rows, and keys. `parts`: of the sequence.
struct Item {
    int sequence, tile, part, parts, length, first_key, keys;

    __device__ int blocks() const { return (keys + KEYS - 1) / KEYS; }
};

// Goes through the items of this thread block: numbers blockIdx.x, blockIdx.x + gridDim.x, … of all that sequences as
// long as the page table would have. A warp looks at 32 numbers at a time, and passes over parts that are not there.
struct Items {
    const Sizes& sizes;
    const int* lengths;
    int number, tiles;

    __device__ Items(const Sizes& sizes, const int* lengths)
        : sizes(sizes), lengths(lengths), number(blockIdx.x),
          tiles((sizes.queries * sizes.heads + ROWS - 1) / ROWS) {}

    __device__ bool at(int number, Item& item) const {
        item.sequence = number / (tiles * sizes.parts);
        if (item.sequence >= sizes.batch) return false;
        item.tile = number % tiles;
        item.part = number / tiles % sizes.parts;
        item.length = lengths[item.sequence];
        int each = part_keys(item.length);
        item.parts = max(1, (item.length + each - 1) / each);
        item.first_key = item.part * each;
        item.keys = max(0, min(each, item.length - item.first_key));
        return item.part < item.parts;
    }

    __device__ bool next(Item& item) {
        int last = sizes.batch * sizes.parts * tiles - 1;
        while (number <= last) {
            u32 there = __ballot_sync(~0u, at(number + threadIdx.x % 32 * gridDim.x, item));
            if (there) {
                number += (__ffs(there) - 1) * gridDim.x;
                at(number, item);
                number += gridDim.x;
                return true;
            }
            number += 32 * gridDim.x;
        }
        return false;
    }
};

// How often each of the two blocks of keys in shared memory has been filled, and the queries; the parity says which
// phase of a barrier to wait for.
struct Uses {
    u32 of_block[2], of_queries;
};

__device__ __forceinline__ void copy_queries(
    const TensorMap& queries, const Sizes& sizes, const Item& item, const Uses& uses, u32 shared) {
    u32 barriers = shared + OFFSET_BARRIERS;
    int row = item.sequence * sizes.queries * sizes.heads + item.tile * ROWS;
    barrier_wait(barriers + QUERIES_READ, uses.of_queries % 2 ^ 1);
    barrier_expect(barriers + QUERIES, BYTES_KEYS);
    for (int tile = 0; tile < TILES; tile++)
        copy_box(shared + tile * BYTES_TILE, &queries, tile * COLUMNS, row, barriers + QUERIES);
}

// Copies the queries and the keys of every item, from one warp: a block as soon as both warpgroups have read the one
// that was there.
__device__ __forceinline__ void copy_items(
    Items items, const TensorMap& queries, const TensorMap& pages, const int* table, u32 shared) {
    u32 barriers = shared + OFFSET_BARRIERS;
    int lane = threadIdx.x % 32;
    Item item;
    Uses uses{};
    while (items.next(item)) {
        if (lane == 0) copy_queries(queries, items.sizes, item, uses, shared);
        uses.of_queries++;
        const int* of_item = table + (long long)item.sequence * items.sizes.table_width + item.first_key / KEYS;
        int page = 0;
#pragma unroll 1
        for (int block = 0; block < item.blocks(); block++) {
            if (block % 32 == 0) page = block + lane < item.blocks() ? of_item[block + lane] : 0;
            int row = __shfl_sync(~0u, page, block % 32) * KEYS, second = block % 2;
            u32 parity = (second ? uses.of_block[1]++ : uses.of_block[0]++) % 2 ^ 1;
            u32 target = shared + OFFSET_KEYS + second * BYTES_KEYS;
            u32 full = barriers + FULL + second * 16, empty = barriers + EMPTY + second * 16;
            if (lane == 0) {
                barrier_wait(empty, parity);
                barrier_expect(full, (VALUE_TILES / 2 + second) * BYTES_TILE);
                for (int tile = 0; tile < VALUE_TILES / 2; tile++)
                    copy_box(target + tile * BYTES_TILE, &pages, tile * COLUMNS, row, full);
                if (second) copy_box(target + WEIGHTS, &pages, RANK, row, full);
                barrier_wait(empty + 8, parity);
                barrier_expect(full + 8, (VALUE_TILES / 2 + 1 - second) * BYTES_TILE);
                for (int tile = VALUE_TILES / 2; tile < VALUE_TILES; tile++)
                    copy_box(target + tile * BYTES_TILE, &pages, tile * COLUMNS, row, full + 8);
                if (!second) copy_box(target + WEIGHTS, &pages, RANK, row, full + 8);
            }
            __syncwarp();
        }
    }
}

// The address of 16 bytes in a tile whose rows of 128 bytes are swizzled as TMA does it.
__device__ __forceinline__ u32 place_in_tile(u32 tile, int row, int piece) {
    return tile + row * 128 + (piece ^ row % 8) * 16;
}

// What a thread of a converting warp loads of BLOCK columns of a page: 16 numbers of rows lane / 8, and of every
// fourth row after it, of the warp's 16 rows. Eight threads load all BLOCK columns of a row.
struct Loaded {
    uint4 values[4];
    float scales[4];
};

// The i-th row of a thread. Rows behind the sequence may hold anything, and 0 · NaN is NaN, so the last row replaces
// them.
__device__ __forceinline__ u32 row_of(int i, int left) {
    return min((int)threadIdx.x % 128 / 32 * 16 + 4 * i + (int)threadIdx.x % 32 / 8, left - 1);
}

__device__ __forceinline__ const u8* page_at(const u8* pages, int page) {
    return pages + (long long)page * (KEYS * BYTES_ROW);
}

__device__ __forceinline__ void load_columns(Loaded& loaded, const u8* page, int block, int left) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u8* from = page + row_of(i, left) * BYTES_ROW;
        loaded.values[i] = load_16(from + block * BLOCK + threadIdx.x % 8 * 16);
        loaded.scales[i] = load_number(from + RANK + 4 * block);
    }
}

__device__ __forceinline__ void store_columns(const Loaded& loaded, u32 target, int block) {
    int lane = threadIdx.x % 32;
    // A quarter of a row of one of the two tiles of these columns.
    u32 tile = target + (2 * block + lane % 8 / 4) * BYTES_TILE;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = threadIdx.x % 128 / 32 * 16 + 4 * i + lane / 8;
        uint4 from = loaded.values[i];
        float scale = loaded.scales[i];
        store_16(place_in_tile(tile, row, lane % 4 * 2),
            make_uint4(scaled_pair(from.x, scale), scaled_pair(from.x >> 16, scale), scaled_pair(from.y, scale),
                scaled_pair(from.y >> 16, scale)));
        store_16(place_in_tile(tile, row, lane % 4 * 2 + 1),
            make_uint4(scaled_pair(from.z, scale), scaled_pair(from.z >> 16, scale), scaled_pair(from.w, scale),
                scaled_pair(from.w >> 16, scale)));
    }
}

__device__ __forceinline__ void copy_rotated(const u8* page, u32 target, int left) {
    int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll 2
    for (int i = 0; i < 4; i++) {
        const u8* from = page + row_of(i, left) * BYTES_ROW + RANK + RANK / BLOCK * 4 + lane % 8 * 16;
        store_16(place_in_tile(target + WEIGHTS, warp * 16 + 4 * i + lane / 8, lane % 8), load_16(from));
    }
}

// A half of a block is complete: all of a warp's threads have stored their share.
__device__ __forceinline__ void arrive_as_warp(u32 barrier) {
    show_to_tensor_cores();
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// The same for 8-bit blocks, from a warpgroup. While BLOCK columns are stored, the next AHEAD times as many are being
// loaded.
__device__ __forceinline__ void convert_items(
    Items items, const TensorMap& queries, const u8* pages, const int* table, u32 shared) {
    constexpr int PIECES = RANK / BLOCK, AHEAD = PIECES - 1;
    u32 barriers = shared + OFFSET_BARRIERS;
    Item item;
    Uses uses{};
    while (items.next(item)) {
        if (threadIdx.x % 128 == 0) copy_queries(queries, items.sizes, item, uses, shared);
        uses.of_queries++;
        int blocks = item.blocks();
        if (blocks == 0) continue;
        const int* of_item = table + (long long)item.sequence * items.sizes.table_width + item.first_key / KEYS;
        Loaded loaded[PIECES];
        int page = of_item[0];
#pragma unroll
        for (int piece = 0; piece < AHEAD; piece++)
            load_columns(loaded[piece], page_at(pages, page), piece, item.keys);
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            int left = item.keys - block * KEYS, next = block + 1 < blocks ? of_item[block + 1] : page;
            int second = block % 2;
            u32 parity = (second ? uses.of_block[1]++ : uses.of_block[0]++) % 2 ^ 1;
            u32 target = shared + OFFSET_KEYS + second * BYTES_KEYS;
            u32 full = barriers + FULL + second * 16, empty = barriers + EMPTY + second * 16;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                int half = piece >= PIECES / 2;
                if (piece % (PIECES / 2) == 0) barrier_wait(empty + half * 8, parity);
                store_columns(loaded[piece], target, piece);
                int later = (piece + AHEAD) % PIECES;
                if (piece + AHEAD < PIECES)
                    load_columns(loaded[later], page_at(pages, page), later, left);
                else if (block + 1 < blocks)
                    load_columns(loaded[later], page_at(pages, next), later, left - KEYS);
                if (piece % (PIECES / 2) == PIECES / 2 - 1) {
                    if (half != second) copy_rotated(page_at(pages, page), target, left);
                    arrive_as_warp(full + half * 8);
                }
            }
            page = next;
        }
    }
}

// A thread's two rows of a tile, and what is known of them.
struct Rows {
    float maximum_0, maximum_8, sum_0, sum_8;
};

__device__ __forceinline__ float largest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_of_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Scales the sums of a row after its maximum has grown from `before` to `now`. Most of the time it has not.
template <int N>
__device__ __forceinline__ void rescale(float (&sums)[N], Rows& rows, float now_0, float now_8) {
    bool same = now_0 == rows.maximum_0 && now_8 == rows.maximum_8;
    if (!__all_sync(~0u, same)) {
        float factor_0 = now_0 == rows.maximum_0 ? 1 : exp2_of(rows.maximum_0 - now_0);
        float factor_8 = now_8 == rows.maximum_8 ? 1 : exp2_of(rows.maximum_8 - now_8);
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            sums[i] *= factor_0;
            sums[i + 1] *= factor_0;
            sums[i + 2] *= factor_8;
            sums[i + 3] *= factor_8;
        }
        rows.sum_0 *= factor_0;
        rows.sum_8 *= factor_8;
        rows.maximum_0 = now_0;
        rows.maximum_8 = now_8;
    }
}

// Adds some tiles' share to the scores of a block; FIRST: there are none yet.
template <int BEGIN, int END, bool FIRST>
__device__ __forceinline__ void score(float (&scores)[32], u32 queries, u32 keys) {
#pragma unroll
    for (int tile = BEGIN; tile < END; tile++)
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; k++)
            multiply_keys(scores, queries + tile * (BYTES_TILE / 16) + 2 * k, keys + tile * (BYTES_TILE / 16) + 2 * k,
                !FIRST || tile > BEGIN || k > 0);
}

// Stores a warpgroup's weights where the other one multiplies with them.
__device__ __forceinline__ void show_weights(const u32 (&weights)[16], u32 stored) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 4; k++) store_matrices(stored + ((2 * k + lane / 16) ^ (lane & 7)) * 16, weights + 4 * k);
    show_to_tensor_cores();
}

// One warpgroup's work on all blocks of a part.
template <int GROUP>
__device__ __forceinline__ void attend(
    const Item& item, int limit_0, int limit_8, float scale, u32 shared, Uses& uses, float (&sums)[HALF / 2],
    Rows& rows) {
    int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    int blocks = item.blocks(), row = warp * 16 + lane / 4;
    u32 barriers = shared + OFFSET_BARRIERS;
    u32 own = shared + OFFSET_KEYS + GROUP * BYTES_KEYS;
    u32 others_weights = descriptor(shared + OFFSET_KEYS + (GROUP ^ 1) * BYTES_KEYS + WEIGHTS);
    u32 maxima = shared + OFFSET_MAXIMA + 4 * row;
    u32 queries = descriptor(shared), keys_at = descriptor(own);
    // This half of the values of the first and of the second block of a pair.
    u32 values_0 = value_descriptor(shared + OFFSET_KEYS + GROUP * (VALUE_TILES / 2) * BYTES_TILE);
    u32 values_1 = values_0 + BYTES_KEYS / 16;
    u32 full_0 = barriers + FULL, full_1 = full_0 + 16;
    u32 full_own = GROUP ? full_1 : full_0;
    u32 empty_0 = barriers + EMPTY + 8 * GROUP, empty_1 = empty_0 + 16;
    keep(queries), keep(keys_at), keep(values_0), keep(values_1);
    u32 stored = own + WEIGHTS + (warp * 16 + lane % 16) * 128;
    barrier_wait(barriers + QUERIES, uses.of_queries++ % 2);
#pragma unroll 1
    for (int pair = 0; 2 * pair < blocks; pair++) {
        bool has_second = 2 * pair + 1 < blocks;
        u32 parity_0 = uses.of_block[0]++ % 2, parity_1 = uses.of_block[1] % 2;
        uses.of_block[1] += has_second;
        bool has_own = GROUP == 0 || has_second;
        float scores[32];
        u32 weights[16];
        float largest_0 = -INFINITE, largest_8 = largest_0;
        if (has_own) {
            int block_key = (2 * pair + GROUP) * KEYS;  // its first key, counted from the part's
            barrier_wait(full_own, GROUP ? parity_1 : parity_0);
            int left = item.keys - block_key;
            if (!FP8 && left < KEYS) {  // rows behind the sequence may hold anything, and 0 · NaN is NaN
                barrier_wait(full_own + 8, GROUP ? parity_1 : parity_0);
                for (int i = left * 8 * TILES + thread; i < KEYS * 8 * TILES; i += 128) {
                    int key = i / (8 * TILES), piece = i % (8 * TILES);
                    u32 address = own + piece / 8 * BYTES_TILE + key * 128 + piece % 8 * 16;
                    store_16(address, make_uint4(0, 0, 0, 0));
                }
                show_to_tensor_cores();
                synchronize<ZEROED + GROUP, 128>();
            }
            pin(scores);
            begin_products();
            score<0, VALUE_TILES / 2, true>(scores, queries, keys_at);
            if (GROUP == 1) score<VALUE_TILES, TILES, false>(scores, queries, keys_at);
            commit_products();
            barrier_wait(full_own + 8, GROUP ? parity_1 : parity_0);
            begin_products();
            score<VALUE_TILES / 2, VALUE_TILES + (GROUP == 0), false>(scores, queries, keys_at);
            commit_products();
            wait_for_products<0>();
            pin(scores);
            // A thread's columns are 8 i + 2 (lane % 4) and the next one, in its two rows.
            int key = item.first_key + block_key + 2 * (lane % 4);
            bool cut = item.first_key + block_key + KEYS > min(limit_0, limit_8);
#pragma unroll
            for (int i = 0; i < 32; i++) {
                scores[i] *= scale;
                if (cut && key + i / 4 * 8 + i % 2 >= (i % 4 < 2 ? limit_0 : limit_8))
                    scores[i] = -INFINITE;
                if (i % 4 < 2)
                    largest_0 = fmaxf(largest_0, scores[i]);
                else
                    largest_8 = fmaxf(largest_8, scores[i]);
            }
            largest_0 = largest_of_four(largest_0);
            largest_8 = largest_of_four(largest_8);
        }
        // The maxima after the first block: warpgroup 0 knows them, and tells warpgroup 1.
        float first_0, first_8;
        if (GROUP == 0) {
            first_0 = fmaxf(rows.maximum_0, largest_0);
            first_8 = fmaxf(rows.maximum_8, largest_8);
            if (lane % 4 == 0) {
                store_shared(maxima, first_0);
                store_shared(maxima + 32, first_8);
            }
            arrive<FIRST_MAXIMUM, 256>();
        } else {
            synchronize<FIRST_MAXIMUM, 256>();
            first_0 = load_shared(maxima);
            first_8 = load_shared(maxima + 32);
        }
        float now_0 = GROUP ? fmaxf(first_0, largest_0) : first_0;
        float now_8 = GROUP ? fmaxf(first_8, largest_8) : first_8;
        float added_0 = 0, added_8 = 0;
        if (has_own) {
            if (GROUP == 1 && lane % 4 == 0) {
                store_shared(maxima + 4 * ROWS, now_0);
                store_shared(maxima + 4 * ROWS + 32, now_8);
            }
            // A row that has seen no key yet has the maximum -inf, which no score is compared with.
            float from_0 = now_0 == -INFINITE ? 0 : now_0;
            float from_8 = now_8 == -INFINITE ? 0 : now_8;
#pragma unroll
            for (int i = 0; i < 32; i++) {
                scores[i] = exp2_of(scores[i] - (i % 4 < 2 ? from_0 : from_8));
                if (i % 4 < 2)
                    added_0 += scores[i];
                else
                    added_8 += scores[i];
            }
#pragma unroll
            for (int i = 0; i < 16; i++) weights[i] = as_bfloat16(scores[2 * i], scores[2 * i + 1]);
        }
        if (GROUP == 1 && has_own) {  // the other warpgroup waits for these
            show_weights(weights, stored);
            arrive<SECOND_WEIGHTS, 256>();
        }
        // Values of the first block.
        rescale(sums, rows, first_0, first_8);
        if (GROUP == 1) {
            barrier_wait(full_0 + 8, parity_0);
            synchronize<FIRST_WEIGHTS, 256>();
        }
        pin(sums);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (GROUP == 0)
                multiply_values(sums, weights + 4 * k, values_0 + 128 * k);
            else
                multiply_values(sums, others_weights + 2 * k, values_0 + 128 * k);
        }
        commit_products();
        if (GROUP == 0) {
            rows.sum_0 += added_0;
            rows.sum_8 += added_8;
            show_weights(weights, stored);
            arrive<FIRST_WEIGHTS, 256>();
        }
        wait_for_products<0>();
        pin(sums);
        if (lane == 0) barrier_arrive(empty_0);
        if (!has_second) break;
        // Values of the second block.
        if (GROUP == 0) {
            barrier_wait(full_1, parity_1);
            synchronize<SECOND_WEIGHTS, 256>();
            now_0 = load_shared(maxima + 4 * ROWS);
            now_8 = load_shared(maxima + 4 * ROWS + 32);
        }
        rescale(sums, rows, now_0, now_8);
        pin(sums);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (GROUP == 1)
                multiply_values(sums, weights + 4 * k, values_1 + 128 * k);
            else
                multiply_values(sums, others_weights + 2 * k, values_1 + 128 * k);
        }
        commit_products();
        if (GROUP == 1) {
            rows.sum_0 += added_0;
            rows.sum_8 += added_8;
        }
        wait_for_products<0>();
        pin(sums);
        if (lane == 0) barrier_arrive(empty_1);
    }
    if (lane == 0) barrier_arrive(barriers + QUERIES_READ);
}

// Where results go: those of sequences with one part, and of parts with how many of them are finished.
struct Results {
    bf16* out;
    float* lse;
    float* parts;
    float* part_lse;
    int* finished;
};

// Stores the result of an item, divided by its sum: in bfloat16, or, if its sequence has more parts, in float32.
__device__ __forceinline__ void store(
    float (&sums)[HALF / 2], const Rows& rows, int group, const Item& item, int rows_left, long long out_row,
    const Results& results, u32 shared) {
    int thread = threadIdx.x % 128, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    float sum_0 = sum_of_four(rows.sum_0), sum_8 = sum_of_four(rows.sum_8);
    // Each warpgroup has the sums of its own blocks.
    u32 exchange = shared + OFFSET_SUMS + 4 * row;
    synchronize<SUMS_ARE_READ, 256>();
    if (lane % 4 == 0) {
        store_shared(exchange + 4 * ROWS * group, sum_0);
        store_shared(exchange + 4 * ROWS * group + 32, sum_8);
    }
    synchronize<SUMS_ARE_THERE, 256>();
    sum_0 = load_shared(exchange) + load_shared(exchange + 4 * ROWS);
    sum_8 = load_shared(exchange + 32) + load_shared(exchange + 4 * ROWS + 32);
    bool only = item.parts == 1;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = row + 8 * half;
        if (at >= rows_left) continue;
        float sum = half ? sum_8 : sum_0, share = sum == 0 ? 0 : 1 / sum;
        float maximum = half ? rows.maximum_8 : rows.maximum_0;
        long long place = (out_row + at) * RANK + group * HALF + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < HALF / 8; i++) {
            float low = sums[4 * i + 2 * half] * share, high = sums[4 * i + 2 * half + 1] * share;
            if (only)
                *reinterpret_cast<u32*>(results.out + place + 8 * i) = as_bfloat16(low, high);
            else
                *reinterpret_cast<float2*>(results.parts + place + 8 * i) = make_float2(low, high);
        }
        // log2 of the sum of exponentiated scores; times ln 2 it is the natural logarithm.
        if (group == 0 && lane % 4 == 0)
            (only ? results.lse : results.part_lse)[out_row + at] =
                sum == 0 ? -INFINITE : (maximum + log2f(sum)) * LN_2;
    }
}

// Counts a part as finished; returns whether it was the last one of its tile.
__device__ __forceinline__ bool is_last(const Item& item, int* finished, u32 shared) {
    __threadfence();  // what this thread has stored, before others are told
    synchronize<PART_IS_STORED, 256>();
    if (threadIdx.x == 0) store_shared(shared + OFFSET_FINISHED, atomicAdd(finished, 1));
    synchronize<PART_IS_COUNTED, 256>();
    __threadfence();
    return load_shared(shared + OFFSET_FINISHED) == item.parts - 1;
}

// Adds the parts of a tile, weighted by their sums, in the order of the keys. A warp takes every eighth row.
__device__ __forceinline__ void combine(
    const Item& item, const Sizes& sizes, int rows_left, long long out_row, const Results& results) {
    int rows = sizes.queries * sizes.heads, lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < min(ROWS, rows_left); row += 8) {
        long long first = (long long)item.sequence * sizes.parts * rows + item.tile * ROWS + row;
        float largest = -INFINITE, sum = 0;
        for (int part = 0; part < item.parts; part++)
            largest = fmaxf(largest, load_result_number(results.part_lse + first + (long long)part * rows));
        float4 total[RANK / 128]{};
        for (int part = 0; part < item.parts; part++) {
            long long at = first + (long long)part * rows;
            float lse = load_result_number(results.part_lse + at);
            float share = lse == -INFINITE ? 0 : exp2_of((lse - largest) * LOG2_E);  // the row may see none of its keys
            sum += share;
#pragma unroll
            for (int i = 0; i < RANK / 128; i++) {
                float4 values = load_result(results.parts + at * RANK + 128 * i + 4 * lane);
                total[i].x += share * values.x, total[i].y += share * values.y;
                total[i].z += share * values.z, total[i].w += share * values.w;
            }
        }
        float scale = sum == 0 ? 0 : 1 / sum;
        bf16* out = results.out + (out_row + row) * RANK + 4 * lane;
#pragma unroll
        for (int i = 0; i < RANK / 128; i++)
            *reinterpret_cast<uint2*>(out + 128 * i) =
                make_uint2(as_bfloat16(total[i].x * scale, total[i].y * scale),
                    as_bfloat16(total[i].z * scale, total[i].w * scale));
        if (lane == 0) results.lse[out_row + row] = sum == 0 ? -INFINITE : largest + log2f(sum) * LN_2;
    }
}

// Attends with every item, from two warpgroups.
template <int GROUP>
__device__ __forceinline__ void attend_items(Items items, const Results& results, u32 shared) {
    const Sizes& sizes = items.sizes;
    int rows = sizes.queries * sizes.heads;
    Item item;
    Uses uses{};
    while (items.next(item)) {
        int row = item.tile * ROWS + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        // The first key that a row does not see: query s of S sees the keys before length - (S - 1 - s).
        int limit = item.length - sizes.queries + 1;
        int limit_0 = limit + min(row, rows - 1) / sizes.heads, limit_8 = limit + min(row + 8, rows - 1) / sizes.heads;
        float sums[HALF / 2];
#pragma unroll
        for (int i = 0; i < HALF / 2; i++) sums[i] = 0;
        Rows known{-INFINITE, -INFINITE, 0, 0};
        attend<GROUP>(item, limit_0, limit_8, sizes.scale, shared, uses, sums, known);
        int rows_left = rows - item.tile * ROWS;
        long long row_of_tile = (long long)item.sequence * rows + item.tile * ROWS;
        long long row_of_part = ((long long)item.sequence * sizes.parts + item.part) * rows + item.tile * ROWS;
        store(sums, known, GROUP, item, rows_left, item.parts == 1 ? row_of_tile : row_of_part, results, shared);
        if (item.parts > 1 && is_last(item, results.finished + item.sequence * items.tiles + item.tile, shared))
            combine(item, sizes, rows_left, row_of_tile, results);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) mla_decode(
    const __grid_constant__ TensorMap queries,
    const __grid_constant__ TensorMap pages,  // of bfloat16
    const u8* bytes,                          // the pages, if they have 8-bit blocks
    const int* table, const int* lengths, bf16* out, float* lse, float* parts, float* part_lse,
    int* finished,  // zeros
    const Sizes sizes) {
    u32 shared = shared_memory();
    if (threadIdx.x == 0) {
        u32 barriers = shared + OFFSET_BARRIERS;
        barrier_init(barriers + QUERIES, 1);
        barrier_init(barriers + QUERIES_READ, 8);
        for (int i = 0; i < 4; i++) {
            barrier_init(barriers + FULL + 8 * i, COPIERS);
            barrier_init(barriers + EMPTY + 8 * i, 4);  // the warps of the warpgroup that reads this half
        }
        show_barriers();
    }
    __syncthreads();
    Items items(sizes, lengths);
    Results results{out, lse, parts, part_lse, finished};
    if (threadIdx.x >= 256) {
        give_registers<REGISTERS_OF_COPIERS>();
        if (FP8)
            convert_items(items, queries, bytes, table, shared);
        else if (threadIdx.x < 288)
            copy_items(items, queries, pages, table, shared);
    } else {
        take_registers<REGISTERS>();
        if (threadIdx.x < 128)
            attend_items<0>(items, results, shared);
        else
            attend_items<1>(items, results, shared);
    }
}
