// Products of FP8 (e4m3) matrices with one scale per block of 128 numbers along K, for Hopper (sm_90a).
//
// One thread block per multiprocessor computes tiles of the output in turn. One thread copies tiles of the operands
// into shared memory with the tensor memory accelerator (TMA), up to STAGES blocks of K ahead; one warp copies their
// scales. Two warpgroups multiply; each owns half of the tile. The tensor cores sum 128 products along K, then
// ordinary instructions multiply this sum by the scales of its blocks and add it to a float32 total (DeepSeek-V3
// report, section 3.3.2). While one warpgroup does that, the tensor cores work for the other one.
//
// In columns_product every thread also needs the scales of its columns. A warpgroup owns half of the columns there,
// not half of the rows, so that a scale that it has read serves 64 rows and the next 64.
//
// Set by the compiler's command line:
//   COLUMNS     0: rows_product,    out[x, n] = sum over k of a[x, k] b[e, n, k]; x is in group e of the rows
//               1: columns_product, out[e, m, n] = sum over p of a[m, p] b[n, p]; p are the places of group e
//   TILE_N      columns of an output tile: 128 or 256
//   FLOAT_OUT   1: float32 output, 0: bfloat16
//   STAGES      blocks of K in shared memory

#include "hopper.cuh"

#if FLOAT_OUT
typedef float Out;
#else
typedef bf16 Out;
#endif

constexpr int TILE_M = 128, BLOCK = 128;
constexpr int GROUP_M = 64, PART_N = 128;  // rows and columns of one instruction of the tensor cores
constexpr int PARTS = TILE_N / PART_N;
constexpr int STRIP = 2048 / TILE_N;  // tiles of a strip of columns, whose tiles are taken row by row
constexpr int WARPS = 8;              // that multiply
constexpr bool BY_COLUMNS = COLUMNS && PARTS == 2;  // a warpgroup owns half of the columns of a tile, else of the rows
// Of a thread's 32 column scales, those that it holds for both of its parts. More registers would be spilled, and
// with 8 or 16 the compiler places them so that the instructions wait for each other.
constexpr int HELD = 12;
constexpr int STORED = 64;            // columns that a warp stores at a time

// Shared memory: for each stage a tile of a, a tile of b, and scales: of the columns of b (columns_product), of the
// rows of a, and of the blocks of a weight (rows_product); then what the warps are about to store; then the barriers.
constexpr u32 BYTES_A = TILE_M * BLOCK, BYTES_B = TILE_N * BLOCK;
constexpr u32 BYTES_COLUMN_SCALES = COLUMNS ? TILE_N * 4 : 0;
constexpr u32 ROW_SCALES = BYTES_COLUMN_SCALES, BLOCK_SCALES = ROW_SCALES + TILE_M * 4;
constexpr u32 BYTES_SCALES = BLOCK_SCALES + 128;
constexpr u32 BYTES_STORE = FLOAT_OUT ? 0 : 16 * STORED * 2;
constexpr u32 OFFSET_B = STAGES * BYTES_A, OFFSET_STORE = OFFSET_B + STAGES * BYTES_B;
constexpr u32 OFFSET_SCALES = OFFSET_STORE + WARPS * BYTES_STORE;
constexpr u32 OFFSET_BARRIERS = OFFSET_SCALES + STAGES * BYTES_SCALES;

// rows, columns: of the output; the rows of all groups, or of one group's matrix. depth: length of K; in
// columns_product the number of places if there is one group.
struct Sizes {
    int groups, rows, columns, depth;
};

// Whether the phase has ended.
__device__ __forceinline__ bool barrier_passed(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n" : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
    return passed;
}

// Copies one number into shared memory, without waiting.
__device__ __forceinline__ void copy_number(u32 target, const float* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}

// d (64 × 128, float32) = or += a (64 × 32) · b (128 × 32) transposed, by the tensor cores, without waiting.
__device__ __forceinline__ void multiply(float (&d)[64], u32 a, u32 b, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        ".reg .b64 a, b;\n"
        "mov.b64 a, {%64, 0x40000040};\n"
        "mov.b64 b, {%65, 0x40000040};\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "a, b, p, 1, 1;\n"
        "}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a), "r"(b), "r"(add));
}

// A tile of the output: its group, its first row and column, the end of its group's rows, and the blocks of K.
struct Tile {
    int group, row, row_end, column, first_block, blocks;
};

// The tiles of this thread block: numbers blockIdx.x, blockIdx.x + gridDim.x, … of the tiles of all groups.
struct Tiles {
    const Sizes& sizes;
    const int* ends;  // of each group of rows or places; null if there is one group
    int number, group, first_tile, start, end, first_block;

    __device__ Tiles(const Sizes& sizes, const int* ends)
        : sizes(sizes), ends(ends), number(blockIdx.x), group(-1), first_tile(0), start(0), end(0), first_block(0) {}

    __device__ int end_of(int group) const {
        return group < 0 ? 0 : ends ? ends[group] : COLUMNS ? sizes.depth : sizes.rows;
    }

    __device__ int row_tiles() const {
        return group < 0 ? 0 : ((COLUMNS ? sizes.rows : end - start) + TILE_M - 1) / TILE_M;
    }

    __device__ int column_tiles() const { return (sizes.columns + TILE_N - 1) / TILE_N; }

    // Goes to the group of the next tile, group by group.
    __device__ bool walk() {
        while (number >= first_tile + row_tiles() * column_tiles()) {
            first_tile += row_tiles() * column_tiles();
            first_block += (end - start + BLOCK - 1) / BLOCK;
            start = end;
            group += 1;
            if (group == sizes.groups) return false;
            end = end_of(group);
        }
        return true;
    }

    // The same in columns_product, whose groups have equally many tiles: from the number alone, which spares registers,
    // and without the group's first block.
    __device__ bool jump() {
        int tiles = (sizes.rows + TILE_M - 1) / TILE_M * column_tiles();
        group = number / tiles;
        if (group >= sizes.groups) return false;
        first_tile = group * tiles;
        start = end_of(group - 1), end = end_of(group);
        return true;
    }

    __device__ bool next(Tile& tile, bool needs_blocks) {
        if (!(COLUMNS && !needs_blocks ? jump() : walk())) return false;
        int inside = number - first_tile, strip = inside / (row_tiles() * STRIP);
        int width = min(STRIP, column_tiles() - strip * STRIP), rest = inside - strip * row_tiles() * STRIP;
        tile.group = group;
        tile.column = (strip * STRIP + rest % width) * TILE_N;
        tile.row = rest / width * TILE_M + (COLUMNS ? 0 : start);
        tile.row_end = COLUMNS ? sizes.rows : end;
        tile.first_block = COLUMNS ? first_block : 0;
        tile.blocks = ((COLUMNS ? end - start : sizes.depth) + BLOCK - 1) / BLOCK;
        number += gridDim.x;
        return true;
    }
};

// Copies the operands of every tile, from one thread.
__device__ __forceinline__ void copy_operands(
    Tiles tiles, const TensorMap& a, const TensorMap& b, const TensorMap& column_scales, u32 shared) {
    u32 full = shared + OFFSET_BARRIERS, empty = full + 8 * STAGES;
    Tile tile;
    Stage<STAGES> stage{0, 0};
    while (tiles.next(tile, true)) {
        int row_b = tile.column + (COLUMNS ? 0 : tile.group * tiles.sizes.columns);
#pragma unroll 1  // else it takes more registers than this warp may have
        for (int block = tile.first_block; block < tile.first_block + tile.blocks; block++, stage.advance()) {
            u32 barrier = full + 8 * stage.index;
            barrier_wait(empty + 8 * stage.index, stage.parity ^ 1);
            barrier_expect(barrier, BYTES_A + BYTES_B + BYTES_COLUMN_SCALES);
            copy_box(shared + stage.index * BYTES_A, &a, block * BLOCK, tile.row, barrier);
            copy_box(shared + OFFSET_B + stage.index * BYTES_B, &b, block * BLOCK, row_b, barrier);
            if (COLUMNS)
                copy_box(shared + OFFSET_SCALES + stage.index * BYTES_SCALES, &column_scales, tile.column, block,
                    barrier);
        }
    }
}

// Copies the scales of the rows of a, and in rows_product those of the blocks of a weight, from one warp.
__device__ __forceinline__ void copy_scales(
    Tiles tiles, const float* scales_a, const float* scales_b, u32 shared) {
    const Sizes& sizes = tiles.sizes;
    u32 full = shared + OFFSET_BARRIERS, empty = full + 8 * STAGES;
    int lane = threadIdx.x % 32, blocks = (sizes.depth + BLOCK - 1) / BLOCK;
    int column_blocks = (sizes.columns + BLOCK - 1) / BLOCK;
    long long row_step = COLUMNS ? 1 : blocks, block_step = COLUMNS ? sizes.rows : 1;
    Tile tile;
    Stage<STAGES> stage{0, 0};
    while (tiles.next(tile, true)) {
        const float* of_a[TILE_M / 32];
#pragma unroll
        for (int i = 0; i < TILE_M / 32; i++) {
            int row = min(tile.row + lane + 32 * i, sizes.rows - 1);
            of_a[i] = scales_a + row * row_step + tile.first_block * block_step;
        }
        int column_block = min(tile.column / BLOCK + lane, column_blocks - 1);
        const float* of_b = scales_b + ((long long)tile.group * column_blocks + column_block) * blocks;
#pragma unroll 1
        for (int block = 0; block < tile.blocks; block++, stage.advance()) {
            u32 target = shared + OFFSET_SCALES + stage.index * BYTES_SCALES + 4 * lane;
            barrier_wait(empty + 8 * stage.index, stage.parity ^ 1);
#pragma unroll
            for (int i = 0; i < TILE_M / 32; i++)
                copy_number(target + ROW_SCALES + 128 * i, of_a[i] + block * block_step);
            if (!COLUMNS && lane < PARTS) copy_number(target + BLOCK_SCALES, of_b + block);
            barrier_arrive_after_copies(full + 8 * stage.index);
        }
    }
}

// Adds the tensor cores' sum over one block of K, times the scales of the block, to the total. Of every 8 columns,
// thread t of a warp holds number 2 (t % 4) and the next one, in rows t / 4 and t / 4 + 8.
__device__ __forceinline__ void promote(float (&total)[64], const float (&sum)[64], float row_0, float row_8) {
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
        total[i] += sum[i] * row_0;
        total[i + 1] += sum[i + 1] * row_0;
        total[i + 2] += sum[i + 2] * row_8;
        total[i + 3] += sum[i + 3] * row_8;
    }
}

// Reads the scales of a thread's columns.
template <int N>
__device__ __forceinline__ void load_column_scales(float (&column)[N], u32 address) {
#pragma unroll
    for (int i = 0; i < N; i += 2)
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
            : "=f"(column[i]), "=f"(column[i + 1]) : "r"(address + 16 * i) : "memory");
}

// The same as `promote` with a scale for each column, too: the first ones are held, the others are at `address`.
__device__ __forceinline__ void promote_columns(
    float (&total)[64], const float (&sum)[64], float row_0, float row_8, const float (&held)[HELD], u32 address) {
    float others[32 - HELD];
#pragma unroll
    for (int i = 0; i < PART_N / 8; i++) {
        if (i == 4) load_column_scales(others, address + 16 * HELD);  // when the first sums have freed registers
        float even = 2 * i < HELD ? held[2 * i] : others[2 * i - HELD];
        float odd = 2 * i < HELD ? held[2 * i + 1] : others[2 * i + 1 - HELD];
        total[4 * i] += sum[4 * i] * (row_0 * even);
        total[4 * i + 1] += sum[4 * i + 1] * (row_0 * odd);
        total[4 * i + 2] += sum[4 * i + 2] * (row_8 * even);
        total[4 * i + 3] += sum[4 * i + 3] * (row_8 * odd);
    }
}

// Writes 16 rows × PART_N columns of a warp. Two neighbouring threads exchange numbers, so that each has 4 neighbours.
__device__ __forceinline__ void store(
    float* out, const float (&total)[64], u32, int row, int row_end, int column, int columns) {
    int lane = threadIdx.x % 32;
    bool odd = lane % 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = row + lane / 4 + 8 * half;
        float* target = out + (long long)at * columns + column;
#pragma unroll
        for (int i = 0; i < PART_N / 8; i += 2) {
            const float *first = total + 4 * i + 2 * half, *second = first + 4;
            float got_0 = __shfl_xor_sync(~0u, odd ? first[0] : second[0], 1);
            float got_1 = __shfl_xor_sync(~0u, odd ? first[1] : second[1], 1);
            float4 values = odd ? make_float4(got_0, got_1, second[0], second[1])
                                : make_float4(first[0], first[1], got_0, got_1);
            int place = 8 * (i + odd) + 4 * (lane % 4 / 2);
            if (at < row_end && column + place < columns) *reinterpret_cast<float4*>(target + place) = values;
        }
    }
}

// The same in bfloat16, through shared memory, so that 8 threads write 128 bytes of one row.
__device__ __forceinline__ void store(
    bf16* out, const float (&total)[64], u32 staged, int row, int row_end, int column, int columns) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int first = 0; first < PART_N / 8; first += STORED / 8) {
        __syncwarp();  // what was staged before has been read
#pragma unroll
        for (int i = 0; i < STORED / 8; i += 2) {
            // Four 8×8 matrices: rows 0-7 and 8-15 of 8 columns, then of the next 8. Pieces of 16 bytes are swizzled.
            const float* from = total + 4 * (first + i);
            int inside = lane % 16, piece = (i + lane / 16) ^ (inside & 7);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::
                "r"(staged + inside * 128 + piece * 16), "r"(as_bfloat16(from[0], from[1])),
                "r"(as_bfloat16(from[2], from[3])), "r"(as_bfloat16(from[4], from[5])),
                "r"(as_bfloat16(from[6], from[7])) : "memory");
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int inside = 4 * i + lane / 8, piece = lane % 8, at = row + inside, place = column + 8 * (first + piece);
            uint4 values;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
                : "r"(staged + inside * 128 + (piece ^ (inside & 7)) * 16) : "memory");
            if (at < row_end && place < columns)
                *reinterpret_cast<uint4*>(out + (long long)at * columns + place) = values;
        }
    }
}

// Multiplies and stores every tile, from two warpgroups.
__device__ __forceinline__ void multiply_tiles(Tiles tiles, Out* out, u32 shared) {
    const Sizes& sizes = tiles.sizes;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warpgroup = warp / 4;
    // A warpgroup multiplies in parts of 64 rows × 128 columns, which lie below or beside each other.
    constexpr int PART_ROWS = BY_COLUMNS ? GROUP_M : 0, PART_COLUMNS = BY_COLUMNS ? 0 : PART_N;
    int first_row = BY_COLUMNS ? 0 : warpgroup * GROUP_M, first_column = BY_COLUMNS ? warpgroup * PART_N : 0;
    u32 full = shared + OFFSET_BARRIERS;
    u32 tiles_a = descriptor(shared + first_row * BLOCK);
    u32 tiles_b = descriptor(shared + OFFSET_B + first_column * BLOCK);
    first_row += warp % 4 * 16;
    u32 row_scales = shared + OFFSET_SCALES + ROW_SCALES + 4 * (first_row + lane / 4);
    u32 block_scales = shared + OFFSET_SCALES + BLOCK_SCALES;
    u32 column_scales = shared + OFFSET_SCALES + 4 * first_column + lane % 4 * 8;
    // Else the compiler computes these anew for every block, while the tensor cores have nothing to do.
    asm volatile("" : "+r"(tiles_a), "+r"(tiles_b), "+r"(row_scales), "+r"(block_scales), "+r"(column_scales),
        "+r"(full), "+r"(lane));
    Tile tile;
    Stage<STAGES> stage{0, 0};
    bool ready = false;  // whether the stage is known to be full
    while (tiles.next(tile, false)) {
        float total[PARTS][64], sum[64];
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int i = 0; i < 64; i++) total[part][i] = 0;
        for (int block = 0; block < tile.blocks; block++) {
            if (!ready) barrier_wait(full + 8 * stage.index, stage.parity);
            u32 tile_a = tiles_a + stage.index * (BYTES_A / 16), tile_b = tiles_b + stage.index * (BYTES_B / 16);
            u32 scales = stage.index * BYTES_SCALES, empty = full + 8 * STAGES + 8 * stage.index;
            float row_0, row_8, of_block[PARTS], of_column[HELD];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                pin(sum);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int k = 0; k < BLOCK / 32; k++)
                    multiply(sum, tile_a + part * (PART_ROWS * BLOCK / 16) + 2 * k,
                        tile_b + part * (PART_COLUMNS * BLOCK / 16) + 2 * k, k > 0);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                // From here to the wait, the tensor cores work.
                if (part == 0 || BY_COLUMNS) {
                    row_0 = load_shared(row_scales + scales + 4 * part * PART_ROWS);
                    row_8 = load_shared(row_scales + scales + 4 * part * PART_ROWS + 32);
                }
                if (part == 0) {
                    if (COLUMNS) {
                        load_column_scales(of_column, column_scales + scales);
                    } else {
#pragma unroll
                        for (int i = 0; i < PARTS; i++) of_block[i] = load_shared(block_scales + scales + 4 * i);
                    }
                    stage.advance();
                }
                if (part == PARTS - 1) ready = barrier_passed(full + 8 * stage.index, stage.parity);
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                pin(sum);
                if (!COLUMNS && part == PARTS - 1) {
                    __syncwarp();  // all lanes have read the scales
                    if (lane == 0) barrier_arrive(empty);
                }
                if (COLUMNS)
                    promote_columns(total[part], sum, row_0, row_8, of_column, column_scales + scales);
                else
                    promote(total[part], sum, row_0 * of_block[part], row_8 * of_block[part]);
            }
            if (COLUMNS) {
                __syncwarp();  // all lanes have read the scales of the columns
                if (lane == 0) barrier_arrive(empty);
            }
        }
        Out* target = out + (COLUMNS ? (long long)tile.group * sizes.rows * sizes.columns : 0);
        u32 staged = shared + OFFSET_STORE + warp * BYTES_STORE;
        int row = tile.row + first_row, column = tile.column + first_column;
        store(target, total[0], staged, row, tile.row_end, column, sizes.columns);
        if (PARTS == 2)
            store(target, total[PARTS - 1], staged, row + PART_ROWS, tile.row_end, column + PART_COLUMNS, sizes.columns);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) fp8_product(
    const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
    const __grid_constant__ TensorMap column_scales,  // of b, in columns_product
    const float* scales_a, const float* scales_b,     // of a's rows; of the blocks of the weights, in rows_product
    const int* ends, Out* out, const Sizes sizes) {
    u32 shared = shared_memory();
    if (threadIdx.x == 0) {
        u32 full = shared + OFFSET_BARRIERS, empty = full + 8 * STAGES;
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(full + 8 * stage, 1 + 32);  // the thread that copies operands, the warp that copies scales
            barrier_init(empty + 8 * stage, WARPS);
        }
        show_barriers();
    }
    __syncthreads();
    Tiles tiles(sizes, ends);
    if (threadIdx.x >= 32 * WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 32 * WARPS) copy_operands(tiles, a, b, column_scales, shared);
        if (threadIdx.x / 32 == WARPS + 1) copy_scales(tiles, scales_a, scales_b, shared);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        multiply_tiles(tiles, out, shared);
    }
}
