// Absorbed latent attention over a paged cache, for Hopper (sm_90a).
//
// A tile is 64 rows, each a query of one head. The rows of all heads read the same cached rows, so a block of 64 keys
// is copied once and used twice: all its numbers are keys, its first RANK numbers are also values.
//
// A sequence is cut into parts by its own length alone, and its result is that of its parts, added from the first to
// the last. All blocks of keys of all sequences, in a row, are dealt to the thread blocks in equal shares, from one
// part's beginning to another one's. A thread block adds the parts of a sequence as it goes. If a sequence begins in
// one share and ends in another, its parts are added by a second kernel, with the same arithmetic. So the arithmetic of
// a row depends on its own sequence alone: on nothing that other sequences or the launch decide.
//
// Two warpgroups multiply. They compute the scores of blocks in turn, and both sum the values of every block, each for
// its half of the value columns, so that 64 × RANK sums fit into registers. They exchange the exponentiated scores and
// the rows' maxima through shared memory. There is place for two blocks: while one is read, the next one comes. One
// warp copies pages with the tensor memory accelerator (TMA). If the cache has 8-bit blocks, a third warpgroup turns
// them into bfloat16 in place: their bytes come into the second half of a block's columns, and fill all from the first
// one on.
//
// Set by the compiler's command line:
//   RANK        value columns: 256 or 512; a row has up to 64 more columns, copied as 64 with zeros behind them
//   FP8         1: rows of RANK e4m3 values, RANK / 128 float32 scales, 64 bfloat16 numbers; 0: rows of bfloat16
//   PARTS, LONGEST_PART, MOST_PARTS    a sequence has PARTS parts of at most LONGEST_PART keys and at least what
//                                      `Sizes` says, but never more than MOST_PARTS parts
//   LONG        parts of more keys than this are at most half as long, because few such sequences fit into memory

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
constexpr int BLOCK = 128, PIECES = RANK / BLOCK;                    // columns of one scale, if numbers have 8 bits
constexpr u32 BYTES_RAW = KEYS * (RANK + PIECES * 4 + COLUMNS * 2);  // of a block of rows of 8-bit blocks
constexpr int COPIERS = FP8 ? 4 : 1;  // warps that copy, or convert, the keys
constexpr int REGISTERS = FP8 ? 208 : 232, REGISTERS_OF_COPIERS = FP8 ? 88 : 32;  // of a thread
static_assert(2 * REGISTERS + REGISTERS_OF_COPIERS <= 3 * 168, "a launch of 384 threads has 168 registers for each");

// Shared memory: the queries; two blocks of keys, and their scales; of both warpgroups the rows' maxima and sums;
// barriers. The last tile of a block, its rotated columns, is read for scores alone; then it holds the exponentiated
// scores of the block, the weights of its values.
constexpr u32 OFFSET_KEYS = BYTES_KEYS, WEIGHTS = VALUE_TILES * BYTES_TILE;
constexpr u32 OFFSET_SCALES = OFFSET_KEYS + 2 * BYTES_KEYS, BYTES_SCALES = KEYS * PIECES * 4;
constexpr u32 OFFSET_MAXIMA = OFFSET_SCALES + 2 * BYTES_SCALES, OFFSET_SUMS = OFFSET_MAXIMA + 2 * ROWS * 4;
constexpr u32 OFFSET_BARRIERS = OFFSET_SUMS + 2 * ROWS * 4;

// Barriers: of the queries, copied and read; then for each block of keys and each piece of BLOCK columns, full; for each
// half of the columns, empty; then for the bytes of both blocks, if they are of 8-bit blocks. Warpgroup 0 reads the first
// half of the values, and warpgroup 1 the second one. The last tile belongs to the half of the warpgroup that reads the
// weights from there: to the second half of the first block, and to the first half of the second block. It comes with the
// last piece of that half.
constexpr u32 QUERIES = 0, QUERIES_READ = 8, FULL = 16, FULL_OF_BLOCK = PIECES * 8, EMPTY = FULL + 2 * FULL_OF_BLOCK;
constexpr u32 RAW = EMPTY + 4 * 8;

// The piece of the first or second block that the last tile comes with.
__device__ constexpr int piece_with_rotated(int second) {
    return second ? PIECES / 2 - 1 : PIECES - 1;
}

// sequences; queries · heads rows of each; most parts of a sequence; keys of the shortest part; width of the page table.
struct Sizes {
    int batch, queries, heads, parts, shortest_part, table_width;
    float scale;  // of scores, times log2(e)
};

#ifndef EMULATED

__device__ __forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint4 load_16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
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

// Two numbers of bfloat16 times two others.
__device__ __forceinline__ u32 product_of_pairs(u32 one, u32 other) {
    u32 result;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(one), "r"(other));
    return result;
}

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

// The next kernel of the stream may start.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// The kernel before has ended, and its results can be read.
__device__ __forceinline__ void wait_for_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Policies of the GPU's cache, as `createpolicy.fractional` with the fraction 1 makes them. It drops pages first, which each
// tile reads once, and sums last, which will be read again.
constexpr u64 EVICT_FIRST = 0x12f0000000000000, EVICT_LAST = 0x14f0000000000000;

// Copies a box of pages.
__device__ __forceinline__ void copy_of_pages(u32 target, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(target), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(EVICT_FIRST) : "memory");
}

// Stores four matrices of 8 × 8 numbers of 16 bits; thread t gives the address of row t % 8 of matrix t / 8.
__device__ __forceinline__ void store_matrices(u32 address, const u32* numbers) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::
        "r"(address), "r"(numbers[0]), "r"(numbers[1]), "r"(numbers[2]), "r"(numbers[3]) : "memory");
}

// Four numbers that this thread, or an earlier kernel, has written.
__device__ __forceinline__ float4 load_four(const float* address) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address) : "memory");
    return v;
}

// Four numbers of sums that are kept, stored and read once.
__device__ __forceinline__ void store_kept(float* address, float4 v) {
    asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;"
        ::"l"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "l"(EVICT_LAST) : "memory");
}

__device__ __forceinline__ float4 load_kept(const float* address) {
    float4 v;
    asm volatile("ld.global.cg.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address), "l"(EVICT_FIRST) : "memory");
    return v;
}

#endif

#define INFINITE __int_as_float(0x7f800000)
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

// Named barriers: for the weights of each warpgroup's blocks, for both warpgroups' sums, and of each one alone.
enum {
    WEIGHTS_SHOWN = 1, SUMS_ARE_READ = WEIGHTS_SHOWN + 2, SUMS_ARE_THERE, ZEROED, SCORED = ZEROED + 2,
};

// Keys of each of `parts` parts, in pairs of blocks.
__device__ __forceinline__ int part_of(int length, int parts) {
    int pairs = (length + 2 * KEYS - 1) / (2 * KEYS);
    return (pairs + parts - 1) / parts * (2 * KEYS);
}

// A sequence's parts, as its length and the number of its rows say.
struct Parts {
    int keys, number;  // keys of each but the last one

    __device__ Parts(int length, const Sizes& sizes)
        : keys(max(min(max(part_of(length, PARTS), sizes.shortest_part), LONGEST_PART / (length > LONG ? 2 : 1)),
              part_of(length, MOST_PARTS))),
          number(max(1, (length + keys - 1) / keys)) {}
};

__device__ __forceinline__ int blocks_of(int length) {
    return max(1, (length + KEYS - 1) / KEYS);
}

// Some parts of a sequence, one after another.
struct Run {
    int sequence, length, parts, part_keys;
    int first, count;

    __device__ int first_key() const { return first * part_keys; }
    __device__ int keys() const { return max(0, min(count * part_keys, length - first_key())); }
    __device__ int blocks() const { return (keys() + KEYS - 1) / KEYS; }
    __device__ bool is_whole() const { return count == parts; }
};

// The runs of this thread block, in order. As many thread blocks as there are tiles of rows have the same runs.
struct Runs {
    const Sizes& sizes;
    const int* lengths;
    int tile, sequence, block;  // `block`: how many blocks lie before the sequence
    int begin, end;             // the parts that begin at these blocks

    __device__ Runs(const Sizes& sizes, const int* lengths) : sizes(sizes), lengths(lengths), block(0) {
        int tiles = (sizes.queries * sizes.heads + ROWS - 1) / ROWS, groups = gridDim.x / tiles;
        tile = blockIdx.x % tiles;
        int lane = threadIdx.x % 32, total = 0, largest = 1;
        for (sequence = lane; sequence < sizes.batch; sequence += 32) {
            int length = lengths[sequence];
            total += blocks_of(length);
            largest = max(largest, min(blocks_of(length), Parts(length, sizes).keys / KEYS));
        }
        for (int distance = 1; distance < 32; distance *= 2) {
            total += __shfl_sync(~0u, total, lane ^ distance);
            largest = max(largest, __shfl_sync(~0u, largest, lane ^ distance));
        }
        // Shares of whole parts: then sequences of one length are cut seldom.
        int share = (total + groups - 1) / groups;
        share = (share + largest - 1) / largest * largest;
        begin = blockIdx.x / tiles * share;
        end = begin + share;
        // The first sequence that ends after `begin`.
        for (sequence = 0; sequence < sizes.batch; sequence += 32) {
            int own = sequence + lane < sizes.batch ? blocks_of(lengths[sequence + lane]) : 0, until = own;
            for (int distance = 1; distance < 32; distance *= 2) {
                int before = __shfl_sync(~0u, until, max(0, lane - distance));
                if (lane >= distance) until += before;
            }
            u32 after = __ballot_sync(~0u, block + until > begin);
            int found = after ? __ffs(after) - 1 : 31;
            block += __shfl_sync(~0u, after ? until - own : until, found);
            if (after) {
                sequence += found;
                break;
            }
        }
    }

    // How many of a sequence's parts begin before a block.
    __device__ static int parts_before(int block, const Run& run) {
        int blocks = run.part_keys / KEYS;
        return min(run.parts, max(0, block + blocks - 1) / blocks);
    }

    __device__ bool next(Run& run) {
        while (sequence < sizes.batch && block < end) {
            run.sequence = sequence;
            run.length = lengths[sequence];
            Parts parts(run.length, sizes);
            run.parts = parts.number;
            run.part_keys = parts.keys;
            run.first = parts_before(begin - block, run);
            run.count = parts_before(end - block, run) - run.first;
            sequence += 1;
            block += blocks_of(run.length);
            if (run.count > 0) return true;
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
    const TensorMap& queries, const Runs& runs, const Run& run, const Uses& uses, u32 shared) {
    u32 barriers = shared + OFFSET_BARRIERS;
    int row = run.sequence * runs.sizes.queries * runs.sizes.heads + runs.tile * ROWS;
    barrier_wait(barriers + QUERIES_READ, uses.of_queries % 2 ^ 1);
    barrier_expect(barriers + QUERIES, BYTES_KEYS);
    for (int tile = 0; tile < TILES; tile++)
        copy_box(shared + tile * BYTES_TILE, &queries, tile * COLUMNS, row, barriers + QUERIES);
}

// Copies a half of a block of keys when its place, filled `uses` times before, is empty.
__device__ __forceinline__ void copy_half(
    const TensorMap& pages, int row, int second, int half, u32 uses, u32 shared) {
    u32 barriers = shared + OFFSET_BARRIERS, keys = shared + OFFSET_KEYS + second * BYTES_KEYS;
    barrier_wait(barriers + EMPTY + second * 16 + half * 8, uses % 2 ^ 1);
#pragma unroll
    for (int piece = half * (PIECES / 2); piece < (half + 1) * (PIECES / 2); piece++) {
        u32 full = barriers + FULL + second * FULL_OF_BLOCK + piece * 8;
        bool has_rotated = piece == piece_with_rotated(second);
        barrier_expect(full, (2 + has_rotated) * BYTES_TILE);
        for (int tile = 2 * piece; tile < 2 * piece + 2; tile++)
            copy_of_pages(keys + tile * BYTES_TILE, &pages, tile * COLUMNS, row, full);
        if (has_rotated) copy_of_pages(keys + WEIGHTS, &pages, RANK, row, full);
    }
}

// Copies the queries and the keys of every run, from one warp: a block as soon as both warpgroups have read the one
// that was there.
__device__ __forceinline__ void copy_runs(
    Runs runs, const TensorMap& queries, const TensorMap& pages, const int* table, u32 shared) {
    int lane = threadIdx.x % 32;
    Run run;
    Uses uses{};
    while (runs.next(run)) {
        if (lane == 0) copy_queries(queries, runs, run, uses, shared);
        uses.of_queries++;
        const int* of_run = table + (long long)run.sequence * runs.sizes.table_width + run.first_key() / KEYS;
        int page = 0, blocks = run.blocks();
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            if (block % 32 == 0) page = block + lane < blocks ? of_run[block + lane] : 0;
            int row = __shfl_sync(~0u, page, block % 32) * KEYS, second = block % 2;
            u32 before = second ? uses.of_block[1]++ : uses.of_block[0]++;
            if (lane == 0) {
                copy_half(pages, row, second, 0, before, shared);
                copy_half(pages, row, second, 1, before, shared);
            }
            __syncwarp();
        }
    }
}

// The address of 16 bytes in a tile whose rows of 128 bytes are swizzled as TMA does it.
__device__ __forceinline__ u32 place_in_tile(u32 tile, int row, int piece) {
    return tile + row * 128 + (piece ^ row % 8) * 16;
}

// Two e4m3 numbers, in the high bytes of both halves, times powers of two. The bits of their exponents become the lowest
// ones of bfloat16's, which divides by 2^120: `factors` are two times 2^120 · scale.
__device__ __forceinline__ u32 shifted_pair(u32 two, u32 factors) {
    return product_of_pairs((two & 0x80008000) | (two >> 4 & 0x07f007f0), factors);
}

__device__ __forceinline__ u32 bits_of_factors(float scale) {
    return ((u32)__float_as_int(scale) + (120u << 23)) >> 16;
}

// Whether a scale is a power of two that `shifted_pair` can multiply with.
__device__ __forceinline__ bool is_plain(float scale) {
    u32 bits = __float_as_int(scale);
    return (bits & 0x807fffff) == 0 && bits >= 1u << 23 && bits <= 134u << 23;
}

// Stores 16 numbers of a row, in two pieces of 16 bytes.
template <bool IS_PLAIN>
__device__ __forceinline__ void store_numbers(uint4 bytes, float scale, u32 tile, int row, int piece) {
    u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w}, pairs[8];
    u32 factors = __byte_perm(bits_of_factors(scale), 0, 0x1010);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 low = __byte_perm(words[i], 0, 0x1404), high = __byte_perm(words[i], 0, 0x3424);
        pairs[2 * i] = IS_PLAIN ? shifted_pair(low, factors) : scaled_pair(words[i], scale);
        pairs[2 * i + 1] = IS_PLAIN ? shifted_pair(high, factors) : scaled_pair(words[i] >> 16, scale);
    }
    store_16(place_in_tile(tile, row, piece), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    store_16(place_in_tile(tile, row, piece + 1), make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]));
}

// Turns BLOCK columns of a warp's 16 rows into bfloat16. Their bytes lie in tile VALUE_TILES / 2 + `piece`, row by row
// as the tiles do, so a warp overwrites nothing but what it has read. Of every row a thread has 16 numbers; the rows
// behind the sequence may hold anything, and 0 · NaN is NaN.
__device__ __forceinline__ void convert_columns(u32 keys, u32 scales, int piece, int left) {
    int lane = threadIdx.x % 32, first = threadIdx.x % 128 / 32 * 16 + lane / 16 * 2 + lane / 4 % 2;
    int quarter = lane % 4, chunk = quarter + lane / 8 % 2 * 4;
    u32 raw = keys + (VALUE_TILES / 2 + piece) * BYTES_TILE, tile = keys + (2 * piece + chunk / 4) * BYTES_TILE;
    uint4 bytes[4];
    float scale[4];
    u32 largest = 0;  // has a byte's highest bit where a number is NaN
    bool plain = true;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = first + 4 * i;
        bytes[i] = row < left ? load_16(raw + row * 128 + chunk * 16) : make_uint4(0, 0, 0, 0);
        scale[i] = row < left ? load_shared(scales + (row * PIECES + piece) * 4) : 1;
        plain = plain && is_plain(scale[i]);
        largest |= (bytes[i].x & 0x7f7f7f7f) + 0x01010101 | (bytes[i].y & 0x7f7f7f7f) + 0x01010101;
        largest |= (bytes[i].z & 0x7f7f7f7f) + 0x01010101 | (bytes[i].w & 0x7f7f7f7f) + 0x01010101;
    }
    if (__all_sync(~0u, plain && !(largest & 0x80808080))) {  // and all have read
#pragma unroll
        for (int i = 0; i < 4; i++) store_numbers<true>(bytes[i], scale[i], tile, first + 4 * i, quarter * 2);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) store_numbers<false>(bytes[i], scale[i], tile, first + 4 * i, quarter * 2);
    }
}

// Zeros for the rotated numbers of a warp's rows behind the sequence.
__device__ __forceinline__ void zero_rotated(u32 keys, int left) {
    int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
        int row = warp * 16 + 4 * i + lane / 8;
        if (row >= left) store_16(keys + WEIGHTS + row * 128 + lane % 8 * 16, make_uint4(0, 0, 0, 0));
    }
}

// The pieces of a half of a block are complete: all of a warp's threads have stored their share.
__device__ __forceinline__ void arrive_with_half(u32 full, int half) {
    show_to_tensor_cores();
    __syncwarp();
    if (threadIdx.x % 32) return;
    for (int piece = half * (PIECES / 2); piece < (half + 1) * (PIECES / 2); piece++) barrier_arrive(full + piece * 8);
}

// What the pages of 8-bit blocks are for TMA: bytes, scales, and rotated numbers.
struct RawPages {
    const TensorMap &bytes, &scales, &rotated;
};

// Copies the bytes of a block when its place, filled `uses` times before, is empty.
__device__ __forceinline__ void copy_raw(const RawPages& pages, int row, int second, u32 uses, u32 shared) {
    u32 barriers = shared + OFFSET_BARRIERS, raw = barriers + RAW + second * 8;
    u32 keys = shared + OFFSET_KEYS + second * BYTES_KEYS;
    barrier_wait(barriers + EMPTY + second * 16, uses % 2 ^ 1);
    barrier_wait(barriers + EMPTY + second * 16 + 8, uses % 2 ^ 1);
    barrier_expect(raw, BYTES_RAW);
    for (int piece = 0; piece < PIECES; piece++)
        copy_of_pages(keys + (VALUE_TILES / 2 + piece) * BYTES_TILE, &pages.bytes, piece * BLOCK, row, raw);
    copy_of_pages(keys + WEIGHTS, &pages.rotated, RANK / 2 + 2 * PIECES, row, raw);
    copy_of_pages(shared + OFFSET_SCALES + second * BYTES_SCALES, &pages.scales, RANK / 4, row, raw);
}

__device__ __forceinline__ bool raw_place_is_empty(int second, u32 uses, u32 shared) {
    u32 empty = shared + OFFSET_BARRIERS + EMPTY + second * 16;
    return barrier_has_passed(empty, uses % 2 ^ 1) && barrier_has_passed(empty + 8, uses % 2 ^ 1);
}

// The same for 8-bit blocks, from a warpgroup: its first thread copies, and all turn a block's numbers into bfloat16.
__device__ __forceinline__ void convert_runs(
    Runs runs, const TensorMap& queries, const RawPages& pages, const int* table, u32 shared) {
    u32 barriers = shared + OFFSET_BARRIERS;
    bool copies = threadIdx.x % 128 == 0;
    Run run;
    Uses uses{};
    while (runs.next(run)) {
        const int* of_run = table + (long long)run.sequence * runs.sizes.table_width + run.first_key() / KEYS;
        int keys = run.keys(), blocks = run.blocks();
        if (copies && blocks > 0) copy_raw(pages, of_run[0] * KEYS, 0, uses.of_block[0], shared);
        if (copies) copy_queries(queries, runs, run, uses, shared);
        uses.of_queries++;
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            int second = block % 2, left = keys - block * KEYS;
            u32 parity = (second ? uses.of_block[1]++ : uses.of_block[0]++) % 2;
            u32 target = shared + OFFSET_KEYS + second * BYTES_KEYS, full = barriers + FULL + second * FULL_OF_BLOCK;
            u32 scales = shared + OFFSET_SCALES + second * BYTES_SCALES;
            barrier_wait(barriers + RAW + second * 8, parity);
            if (left < KEYS) zero_rotated(target, left);
            bool to_copy = copies && block + 1 < blocks;  // the next block, as soon as its place is empty
#pragma unroll 1
            for (int piece = 0; piece < PIECES; piece++) {
                if (to_copy && raw_place_is_empty(second ^ 1, uses.of_block[second ^ 1], shared)) {
                    copy_raw(pages, of_run[block + 1] * KEYS, second ^ 1, uses.of_block[second ^ 1], shared);
                    to_copy = false;
                }
                __syncwarp();
                convert_columns(target, scales, piece, left);
                if (piece % (PIECES / 2) == PIECES / 2 - 1) arrive_with_half(full, piece / (PIECES / 2));
            }
            if (to_copy) copy_raw(pages, of_run[block + 1] * KEYS, second ^ 1, uses.of_block[second ^ 1], shared);
            __syncwarp();
        }
    }
}

// A thread's two rows of a tile: the largest score, times log2(e), and the sum of the exponentiated scores of the
// warpgroup's own blocks; of the thread's own columns, and of all when a part is complete.
struct Rows {
    float maximum_0 = -INFINITE, maximum_8 = -INFINITE, sum_0 = 0, sum_8 = 0;

    __device__ void add_sums(const Rows& others) {
        sum_0 += others.sum_0;
        sum_8 += others.sum_8;
    }
};

__device__ __forceinline__ float largest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_of_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// What a row's sums are multiplied by when its maximum grows.
__device__ __forceinline__ float decay(float before, float now) {
    return before == now ? 1 : exp2_of(before - now);  // both may be -inf
}

template <int N>
__device__ __forceinline__ void scale_sums(float (&sums)[N], Rows& rows, float now_0, float now_8) {
    float factor_0 = decay(rows.maximum_0, now_0), factor_8 = decay(rows.maximum_8, now_8);
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

// Scales the sums of rows whose maxima have grown. Most of the time none has.
template <int N>
__device__ __forceinline__ void rescale(float (&sums)[N], Rows& rows, float now_0, float now_8) {
    bool same = now_0 == rows.maximum_0 && now_8 == rows.maximum_8;
    if (!__all_sync(~0u, same)) scale_sums(sums, rows, now_0, now_8);
}

// Adds a tile's share to the scores of a block, without waiting, or begins with it.
__device__ __forceinline__ void score(float (&scores)[32], u32 queries, u32 keys, int tile, bool add) {
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++)
        multiply_keys(scores, queries + tile * (BYTES_TILE / 16) + 2 * k, keys + tile * (BYTES_TILE / 16) + 2 * k,
            add || k > 0);
}

// Turns scores into weights, relative to the rows' maxima, and sums the thread's.
__device__ __forceinline__ void exponentiate(
    float (&scores)[32], u32 (&weights)[16], float maximum_0, float maximum_8, float& sum_0, float& sum_8) {
    // A row that has seen no key yet has the maximum -inf, which no score is compared with.
    float from_0 = maximum_0 == -INFINITE ? 0 : maximum_0;
    float from_8 = maximum_8 == -INFINITE ? 0 : maximum_8;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        scores[i] = exp2_of(scores[i] - (i % 4 < 2 ? from_0 : from_8));
        if (i % 4 < 2)
            sum_0 += scores[i];
        else
            sum_8 += scores[i];
    }
#pragma unroll
    for (int i = 0; i < 16; i++) weights[i] = as_bfloat16(scores[2 * i], scores[2 * i + 1]);
}

// Stores a warpgroup's weights where the other one multiplies with them.
__device__ __forceinline__ void show_weights(const u32 (&weights)[16], u32 stored) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 4; k++) store_matrices(stored + ((2 * k + lane / 16) ^ (lane & 7)) * 16, weights + 4 * k);
    show_to_tensor_cores();
}

// What a warpgroup needs to know of the part that it attends with.
struct Part {
    int first_key, keys;
    bool last;             // no later part needs these queries
    int limit_0, limit_8;  // the first keys that a thread's two rows do not see
    float scale;
};

// Rows behind the sequence may hold anything, and 0 · NaN is NaN.
template <int GROUP>
__device__ __forceinline__ void zero_keys(u32 block, int first) {
    for (int i = first * 8 * TILES + threadIdx.x % 128; i < KEYS * 8 * TILES; i += 128) {
        int key = i / (8 * TILES), piece = i % (8 * TILES);
        store_16(block + piece / 8 * BYTES_TILE + key * 128 + piece % 8 * 16, make_uint4(0, 0, 0, 0));
    }
    show_to_tensor_cores();
    synchronize<ZEROED + GROUP, 128>();
}

// Scales the scores of a block that begins with `first_key`, hides those of keys that a row does not see, and grows the
// rows' maxima. A thread's columns are 8 i + 2 (lane % 4) and the next one.
__device__ __forceinline__ void mask(
    float (&scores)[32], const Part& part, int first_key, float& maximum_0, float& maximum_8) {
    int key = first_key + 2 * (threadIdx.x % 4);
    bool cut = first_key + KEYS > min(part.limit_0, part.limit_8);
    float largest_0 = -INFINITE, largest_8 = -INFINITE;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        scores[i] *= part.scale;
        if (cut && key + i / 4 * 8 + i % 2 >= (i % 4 < 2 ? part.limit_0 : part.limit_8)) scores[i] = -INFINITE;
        if (i % 4 < 2)
            largest_0 = fmaxf(largest_0, scores[i]);
        else
            largest_8 = fmaxf(largest_8, scores[i]);
    }
    maximum_0 = fmaxf(maximum_0, largest_of_four(largest_0));
    maximum_8 = fmaxf(maximum_8, largest_of_four(largest_8));
}

// Begins the scores of a block of this warpgroup's own as its pieces come, without waiting for the products.
template <int GROUP>
__device__ __forceinline__ void begin_scores(
    const Part& part, int block, u32 parity, u32 shared, float (&scores)[32]) {
    u32 keys = shared + OFFSET_KEYS + GROUP * BYTES_KEYS, barriers = shared + OFFSET_BARRIERS;
    u32 full = barriers + FULL + GROUP * FULL_OF_BLOCK;
    u32 queries = descriptor(shared), keys_at = descriptor(keys);
    if (FP8) barrier_wait(barriers + RAW + GROUP * 8, parity);  // of the rotated numbers
    int left = part.keys - block * KEYS;
    if (!FP8 && left < KEYS) {
        for (int piece = 0; piece < PIECES; piece++) barrier_wait(full + piece * 8, parity);
        zero_keys<GROUP>(keys, left);
    }
    pin(scores);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        barrier_wait(full + piece * 8, parity);
        begin_products();
#pragma unroll
        for (int tile = 2 * piece; tile < 2 * piece + 2; tile++) score(scores, queries, keys_at, tile, tile > 0);
        if (piece == piece_with_rotated(GROUP)) score(scores, queries, keys_at, VALUE_TILES, true);
        commit_products();
    }
}

// Turns complete scores into weights, and grows the maxima of `rows`, which the other warpgroup will read.
template <int GROUP>
__device__ __forceinline__ void weigh(
    const Part& part, int block, u32 shared, float (&scores)[32], u32 (&weights)[16], Rows& rows) {
    int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    bool is_last = part.last && part.keys - block * KEYS <= 2 * KEYS;
    if (is_last && lane == 0) barrier_arrive(shared + OFFSET_BARRIERS + QUERIES_READ);
    mask(scores, part, part.first_key + block * KEYS, rows.maximum_0, rows.maximum_8);
    if (lane % 4 == 0) {
        u32 maxima = shared + OFFSET_MAXIMA + 4 * (GROUP * ROWS + row);
        store_shared(maxima, rows.maximum_0);
        store_shared(maxima + 32, rows.maximum_8);
    }
    exponentiate(scores, weights, rows.maximum_0, rows.maximum_8, rows.sum_0, rows.sum_8);
}

// Shows the other warpgroup the weights of a block of this one's own.
template <int GROUP>
__device__ __forceinline__ void show_own(const u32 (&weights)[16], u32 shared) {
    int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16;
    synchronize<SCORED + GROUP, 128>();  // no warp reads the rotated columns any more
    show_weights(weights, shared + OFFSET_KEYS + GROUP * BYTES_KEYS + WEIGHTS + row * 128);
    arrive<WEIGHTS_SHOWN + GROUP, 256>();
}

// Begins to add the values of a block of this warpgroup's own, without waiting.
template <int GROUP>
__device__ __forceinline__ void begin_own_values(const u32 (&weights)[16], u32 shared, float (&sums)[HALF / 2]) {
    u32 keys = shared + OFFSET_KEYS + GROUP * BYTES_KEYS;
    u32 values = transposed_descriptor(keys + GROUP * (VALUE_TILES / 2) * BYTES_TILE);
    pin(sums);
    begin_products();
#pragma unroll
    for (int k = 0; k < 4; k++) multiply_values(sums, weights + 4 * k, values + 128 * k);
    commit_products();
}

// The same of a block whose weights the other warpgroup shows.
template <int GROUP>
__device__ __forceinline__ void begin_others_values(u32 parity, u32 shared, float (&sums)[HALF / 2], Rows& rows) {
    constexpr int OTHER = GROUP ^ 1;
    int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    u32 keys = shared + OFFSET_KEYS + OTHER * BYTES_KEYS, barriers = shared + OFFSET_BARRIERS;
    u32 maxima = shared + OFFSET_MAXIMA + 4 * (OTHER * ROWS + row);
    u32 values = transposed_descriptor(keys + GROUP * (VALUE_TILES / 2) * BYTES_TILE);
    u32 weights = descriptor(keys + WEIGHTS);
#pragma unroll
    for (int piece = 0; piece < PIECES / 2; piece++)
        barrier_wait(barriers + FULL + OTHER * FULL_OF_BLOCK + (GROUP * (PIECES / 2) + piece) * 8, parity);
    synchronize<WEIGHTS_SHOWN + OTHER, 256>();
    wait_for_products<0>();  // the compiler makes every product wait if sums change while one is computed
    rescale(sums, rows, load_shared(maxima), load_shared(maxima + 32));
    pin(sums);
    begin_products();
#pragma unroll
    for (int k = 0; k < 4; k++) multiply_values(sums, weights + 2 * k, values + 128 * k);
    commit_products();
}

// Waits for the values of a block, and lets its half of the columns be copied over.
template <int GROUP>
__device__ __forceinline__ void complete_values(u32 shared, int second, float (&sums)[HALF / 2]) {
    wait_for_products<0>();
    pin(sums);
    if (threadIdx.x % 32 == 0) barrier_arrive(shared + OFFSET_BARRIERS + EMPTY + second * 16 + GROUP * 8);
}

// The first warpgroup's work on its own block.
__device__ __forceinline__ void attend_first(
    const Part& part, int block, u32 parity, u32 shared, float (&sums)[HALF / 2], Rows& rows) {
    float scores[32];
    u32 weights[16];
    begin_scores<0>(part, block, parity, shared, scores);
    wait_for_products<0>();
    pin(scores);
    Rows grown{rows.maximum_0, rows.maximum_8};
    weigh<0>(part, block, shared, scores, weights, grown);
    rescale(sums, rows, grown.maximum_0, grown.maximum_8);
    begin_own_values<0>(weights, shared, sums);
    show_own<0>(weights, shared);
    rows.add_sums(grown);
    complete_values<0>(shared, 0, sums);
}

// The second warpgroup's work on a pair of blocks. It begins its scores before the first warpgroup has shown the weights
// of its block, and weighs them while the tensor cores add the values of that block.
__device__ __forceinline__ void attend_second(
    const Part& part, int block, u32 parity_0, u32 parity_1, u32 shared, float (&sums)[HALF / 2], Rows& rows) {
    float scores[32];
    u32 weights[16];
    begin_scores<1>(part, block + 1, parity_1, shared, scores);
    begin_others_values<1>(parity_0, shared, sums, rows);
    pin(scores);
    Rows grown{rows.maximum_0, rows.maximum_8};
    weigh<1>(part, block + 1, shared, scores, weights, grown);
    show_own<1>(weights, shared);
    complete_values<1>(shared, 0, sums);
    rescale(sums, rows, grown.maximum_0, grown.maximum_8);
    begin_own_values<1>(weights, shared, sums);
    rows.add_sums(grown);
    complete_values<1>(shared, 1, sums);
}

// One warpgroup's work on all blocks of a part.
template <int GROUP>
__device__ __forceinline__ void attend(
    const Part& part, u32 shared, Uses& uses, float (&sums)[HALF / 2], Rows& rows) {
    // From a shuffle: the compiler then knows that a warp's threads stay together, and lets products overlap.
    int blocks = __shfl_sync(~0u, (part.keys + KEYS - 1) / KEYS, 0), block = 0;
#pragma unroll 1
    for (; block + 1 < blocks; block += 2) {
        u32 parity_0 = uses.of_block[0]++ % 2, parity_1 = uses.of_block[1]++ % 2;
        if (GROUP == 0) {
            attend_first(part, block, parity_0, shared, sums, rows);
            begin_others_values<0>(parity_1, shared, sums, rows);
            complete_values<0>(shared, 1, sums);
        } else {
            attend_second(part, block, parity_0, parity_1, shared, sums, rows);
        }
    }
    if (block < blocks) {
        u32 parity = uses.of_block[0]++ % 2;
        if (GROUP == 0) {
            attend_first(part, block, parity, shared, sums, rows);
        } else {
            begin_others_values<1>(parity, shared, sums, rows);
            complete_values<1>(shared, 0, sums);
        }
    }
    if (part.last && blocks <= GROUP) {  // no block of this warpgroup's own
        __syncwarp();                    // all of its threads have waited for the queries
        if (threadIdx.x % 32 == 0) barrier_arrive(shared + OFFSET_BARRIERS + QUERIES_READ);
    }
}

// Where results go. A whole sequence's: `out` and `lse`. Otherwise the parts' sums, and of each row of a part its
// maximum and both warpgroups' sums; `added` tells how many parts of a sequence are in its first one already.
struct Results {
    bf16* out;
    float *lse, *parts, *part_rows;
    int* added;
    float* kept;  // sums that a thread block keeps until its next part is complete
};

// Two rows' sums as one: the arithmetic by which parts are added.
__device__ __forceinline__ float add(float before, float before_decay, float part, float part_decay) {
    return fmaf(before, before_decay, part * part_decay);
}

// Adds the sums that were kept to those of the next part.
__device__ __forceinline__ void add_part(float (&sums)[HALF / 2], Rows& rows, const Rows& before, const float* kept) {
    float now_0 = fmaxf(before.maximum_0, rows.maximum_0), now_8 = fmaxf(before.maximum_8, rows.maximum_8);
    float before_0 = decay(before.maximum_0, now_0), before_8 = decay(before.maximum_8, now_8);
    float part_0 = decay(rows.maximum_0, now_0), part_8 = decay(rows.maximum_8, now_8);
    constexpr int AT_ONCE = 16;  // more do not fit into registers
#pragma unroll
    for (int first = 0; first < HALF / 8; first += AT_ONCE) {
        float4 of_before[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) of_before[i] = load_kept(kept + 512 * (first + i));
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float* own = sums + 4 * (first + i);
            own[0] = add(of_before[i].x, before_0, own[0], part_0);
            own[1] = add(of_before[i].y, before_0, own[1], part_0);
            own[2] = add(of_before[i].z, before_8, own[2], part_8);
            own[3] = add(of_before[i].w, before_8, own[3], part_8);
        }
        __syncwarp();  // or the compiler loads all at once
    }
    rows.sum_0 = add(before.sum_0, before_0, rows.sum_0, part_0);
    rows.sum_8 = add(before.sum_8, before_8, rows.sum_8, part_8);
    rows.maximum_0 = now_0;
    rows.maximum_8 = now_8;
}

__device__ __forceinline__ void keep_part(const float (&sums)[HALF / 2], float* kept) {
#pragma unroll
    for (int i = 0; i < HALF / 8; i++)
        store_kept(kept + 512 * i, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
}

// Stores the sums of a part, to be added by the second kernel. `first_row`: of the tile, in memory.
__device__ __forceinline__ void store_part(
    const float (&sums)[HALF / 2], const Rows& rows, int group, int rows_left, long long first_row,
    const Results& results) {
    int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = row + 8 * half;
        if (at >= rows_left) continue;
        float* to = results.parts + (first_row + at) * RANK + group * HALF + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < HALF / 8; i++)
            *reinterpret_cast<float2*>(to + 8 * i) = make_float2(sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]);
        if (lane % 4) continue;
        float* of_row = results.part_rows + 4 * (first_row + at);
        if (group == 0) of_row[0] = half ? rows.maximum_8 : rows.maximum_0;
        of_row[1 + group] = half ? rows.sum_8 : rows.sum_0;
    }
}

// The share of a sum that a weight of one is; a row that saw no key has none.
__device__ __forceinline__ float share_of(float sum) {
    return sum == 0 ? 0 : 1 / sum;
}

__device__ __forceinline__ float log_sum_exp(float maximum, float sum) {
    return sum == 0 ? -INFINITE : (maximum + log2f(sum)) * LN_2;
}

// Stores the result of a whole sequence.
__device__ __forceinline__ void store_result(
    const float (&sums)[HALF / 2], const Rows& rows, int group, int rows_left, long long first_row,
    const Results& results, u32 shared) {
    int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    // Each warpgroup has the sums of its own blocks.
    u32 exchange = shared + OFFSET_SUMS + 4 * row;
    synchronize<SUMS_ARE_READ, 256>();
    if (lane % 4 == 0) {
        store_shared(exchange + 4 * ROWS * group, rows.sum_0);
        store_shared(exchange + 4 * ROWS * group + 32, rows.sum_8);
    }
    synchronize<SUMS_ARE_THERE, 256>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = row + 8 * half;
        if (at >= rows_left) continue;
        float sum = load_shared(exchange + 32 * half) + load_shared(exchange + 4 * ROWS + 32 * half);
        float share = share_of(sum);
        bf16* to = results.out + (first_row + at) * RANK + group * HALF + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < HALF / 8; i++)
            *reinterpret_cast<u32*>(to + 8 * i) =
                as_bfloat16(sums[4 * i + 2 * half] * share, sums[4 * i + 2 * half + 1] * share);
        if (group == 0 && lane % 4 == 0)
            results.lse[first_row + at] = log_sum_exp(half ? rows.maximum_8 : rows.maximum_0, sum);
    }
}

// Attends with every run, from two warpgroups.
template <int GROUP>
__device__ __forceinline__ void attend_runs(Runs runs, const Results& results, u32 shared) {
    const Sizes& sizes = runs.sizes;
    int rows = sizes.queries * sizes.heads, rows_left = rows - runs.tile * ROWS, thread = threadIdx.x % 128;
    int row = thread / 32 * 16 + thread % 32 / 4;
    bool has_rows = thread / 32 * 16 < rows_left;
    float* kept = results.kept + ((long long)blockIdx.x * 2 + GROUP) * (ROWS * HALF) + 4 * thread;
    Run run;
    Uses uses{};
    while (runs.next(run)) {
        // The first key that a row does not see: query s of S sees the keys before length - (S - 1 - s).
        int limit = run.length - sizes.queries + 1;
        int limit_0 = limit + min(runs.tile * ROWS + row, rows - 1) / sizes.heads;
        int limit_8 = limit + min(runs.tile * ROWS + row + 8, rows - 1) / sizes.heads;
        Rows before;
        float sums[HALF / 2];
        barrier_wait(shared + OFFSET_BARRIERS + QUERIES, uses.of_queries++ % 2);
#pragma unroll 1
        for (int part = run.first, left = run.count; left > 0; part++, left--) {
            Rows of_part;
#pragma unroll
            for (int i = 0; i < HALF / 2; i++) sums[i] = 0;
            int first_key = part * run.part_keys, keys = max(0, min(run.part_keys, run.length - first_key));
            attend<GROUP>({first_key, keys, left == 1, limit_0, limit_8, sizes.scale}, shared, uses, sums, of_part);
            of_part.sum_0 = sum_of_four(of_part.sum_0);
            of_part.sum_8 = sum_of_four(of_part.sum_8);
            if (run.first == 0) {
                if (part > 0 && has_rows) add_part(sums, of_part, before, kept);
                before = of_part;
                if (left > 1 && has_rows) keep_part(sums, kept);
            }
            if (run.first > 0 || (left == 1 && !run.is_whole())) {
                int place = run.first > 0 ? part : 0;
                long long first_row = ((long long)run.sequence * sizes.parts + place) * rows + runs.tile * ROWS;
                store_part(sums, of_part, GROUP, rows_left, first_row, results);
            }
        }
        if (run.first > 0) continue;
        long long first_row = (long long)run.sequence * rows + runs.tile * ROWS;
        if (run.is_whole()) store_result(sums, before, GROUP, rows_left, first_row, results, shared);
        if (GROUP == 0 && thread == 0 && runs.tile == 0 && sizes.parts > 1) results.added[run.sequence] = run.count;
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) mla_decode(
    const __grid_constant__ TensorMap queries,
    const __grid_constant__ TensorMap pages,    // their numbers of bfloat16, or the bytes of 8-bit blocks,
    const __grid_constant__ TensorMap scales,   // their scales
    const __grid_constant__ TensorMap rotated,  // and their rotated numbers
    const int* table, const int* lengths, bf16* out, float* lse, float* parts, float* part_rows, int* added,
    float* kept, const Sizes sizes) {
    let_next_kernel_start();
    u32 shared = shared_memory();
    if (threadIdx.x == 0) {
        u32 barriers = shared + OFFSET_BARRIERS;
        barrier_init(barriers + QUERIES, 1);
        barrier_init(barriers + QUERIES_READ, 8);
        for (int i = 0; i < 2 * PIECES; i++) barrier_init(barriers + FULL + 8 * i, COPIERS);
        for (int i = 0; i < 4; i++) {
            barrier_init(barriers + EMPTY + 8 * i, 4);  // the warps that read this half
        }
        barrier_init(barriers + RAW, 1);
        barrier_init(barriers + RAW + 8, 1);
        show_barriers();
    }
    __syncthreads();
    Results results{out, lse, parts, part_rows, added, kept};
    if (threadIdx.x >= 256) {
        give_registers<REGISTERS_OF_COPIERS>();
        if (FP8)
            convert_runs(Runs(sizes, lengths), queries, {pages, scales, rotated}, table, shared);
        else if (threadIdx.x < 288)
            copy_runs(Runs(sizes, lengths), queries, pages, table, shared);
    } else {
        take_registers<REGISTERS>();
        if (threadIdx.x < 128)
            attend_runs<0>(Runs(sizes, lengths), results, shared);
        else
            attend_runs<1>(Runs(sizes, lengths), results, shared);
    }
}

// The largest number of this lane and of those before it.
__device__ __forceinline__ float largest_until_lane(float x) {
    int lane = threadIdx.x % 32;
    for (int distance = 1; distance < 32; distance *= 2) {
        float before = __shfl_sync(~0u, x, max(0, lane - distance));
        x = fmaxf(x, before);
    }
    return x;
}

// Adds the parts of the sequences that were cut, a warp each time 128 columns of a row. As many thread blocks work for
// each sequence. Lane i knows the row's maximum and sums of piece i, and how both sides of its addition decay.
extern "C" __global__ void __launch_bounds__(128, 4) mla_decode_parts(
    const int* lengths, bf16* out, float* lse, const float* parts, const float* part_rows, const int* added,
    const Sizes sizes) {
    constexpr int AT_ONCE = 16, WIDTH = 128, WARPS = 4;
    int blocks = gridDim.x / sizes.batch, sequence = blockIdx.x / blocks, lane = threadIdx.x % 32;
    wait_for_kernel_before();
    int first_added = added[sequence], pieces = Parts(lengths[sequence], sizes).number - first_added + 1;
    if (pieces == 1) return;
    int rows = sizes.queries * sizes.heads, unit = blockIdx.x % blocks * WARPS + threadIdx.x / 32;
    for (; unit < rows * (RANK / WIDTH); unit += blocks * WARPS) {
        int row = unit / (RANK / WIDTH), column = unit % (RANK / WIDTH) * WIDTH + 4 * lane;
        auto row_of = [&](int piece) {
            int part = piece ? first_added + piece - 1 : 0;
            return ((long long)sequence * sizes.parts + part) * rows + row;
        };
        float4 sums{};
        float maximum = -INFINITE, sum_0 = 0, sum_1 = 0;
#pragma unroll 1
        for (int piece = 0; piece < pieces; piece += AT_ONCE) {
            float4 values[AT_ONCE], of_row = make_float4(-INFINITE, 0, 0, 0);
            if (lane < AT_ONCE && piece + lane < pieces) of_row = load_four(part_rows + 4 * row_of(piece + lane));
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (piece + i < pieces) values[i] = load_four(parts + row_of(piece + i) * RANK + column);
            float now = fmaxf(maximum, largest_until_lane(of_row.x));
            float until = __shfl_sync(~0u, now, max(0, lane - 1));
            float before = decay(lane ? until : maximum, now), part = decay(of_row.x, now);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (i % 4 == 0) __syncwarp();  // or the compiler keeps all that follows in registers
                float before_i = __shfl_sync(~0u, before, i), part_i = __shfl_sync(~0u, part, i);
                float of_0 = __shfl_sync(~0u, of_row.y, i), of_1 = __shfl_sync(~0u, of_row.z, i);
                if (piece + i >= pieces) continue;
                bool is_first = piece + i == 0;
                sum_0 = is_first ? of_0 : add(sum_0, before_i, of_0, part_i);
                sum_1 = is_first ? of_1 : add(sum_1, before_i, of_1, part_i);
                sums.x = is_first ? values[i].x : add(sums.x, before_i, values[i].x, part_i);
                sums.y = is_first ? values[i].y : add(sums.y, before_i, values[i].y, part_i);
                sums.z = is_first ? values[i].z : add(sums.z, before_i, values[i].z, part_i);
                sums.w = is_first ? values[i].w : add(sums.w, before_i, values[i].w, part_i);
            }
            maximum = __shfl_sync(~0u, now, 31);
        }
        float sum = sum_0 + sum_1, share = share_of(sum);
        long long at = (long long)sequence * rows + row;
        *reinterpret_cast<uint2*>(out + at * RANK + column) =
            make_uint2(as_bfloat16(sums.x * share, sums.y * share), as_bfloat16(sums.z * share, sums.w * share));
        if (column == 0) lse[at] = log_sum_exp(maximum, sum);
    }
}
