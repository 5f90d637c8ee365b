// Gradients of the experts' weights in float32, of bfloat16 matrices, for Hopper (sm_90a):
// out[e, m, n] = sum over the rows x of group e of a[x, m] b[x, n].
//
// One thread block per multiprocessor computes tiles of 128 × 256 of the gradients in turn. One thread copies blocks of
// 64 rows of both operands into shared memory with the tensor memory accelerator (TMA), up to STAGES blocks ahead. Two
// warpgroups multiply; each owns 64 rows of a tile, 128 sums a thread. While the tensor cores work on one block, the
// products of the next one are queued. Rows are summed over, so the tensor cores read both operands transposed.
//
// A group has any number of rows, and its last block ends with rows of the next group or with rows that belong to none.
// They are cleared in shared memory, as far as products read them: they may hold anything, and 0 · NaN is NaN.

#ifdef EMULATED  // on a CPU, by tests/helpers/cuda_emulation, which defines the same
#include "primitives.h"
#else
#include "hopper.cuh"
#endif

constexpr int TILE_M = 128, TILE_N = 256, BLOCK = 64;  // rows and columns of a tile, rows that are summed at a time
constexpr int STEP = 16;                               // rows that one instruction of the tensor cores sums over
constexpr int BOX = 64;                                // columns of one copy; a warpgroup's rows of a tile
constexpr int BOXES_A = TILE_M / BOX, BOXES_B = TILE_N / BOX;
constexpr int STAGES = 4;
constexpr int STRIP = 2048 / TILE_N;  // tiles of a strip of columns, whose tiles are taken row by row
constexpr int WARPS = 8;              // that multiply
constexpr int REGISTERS = 232, REGISTERS_OF_COPIERS = 40;  // of a thread
static_assert(2 * REGISTERS + REGISTERS_OF_COPIERS <= 3 * 168, "a launch of 384 threads has 168 registers for each");

// Shared memory: for each stage the boxes of a, then those of b; then the barriers.
constexpr u32 BYTES_BOX = BLOCK * BOX * 2, BYTES_A = BOXES_A * BYTES_BOX;
constexpr u32 BYTES_STAGE = BYTES_A + BOXES_B * BYTES_BOX;
constexpr u32 OFFSET_FULL = STAGES * BYTES_STAGE, OFFSET_EMPTY = OFFSET_FULL + 8 * STAGES;

// rows, columns: of one group's gradient.
struct Sizes {
    int groups, rows, columns;
};

#ifndef EMULATED

// sums (64 × 256) += a (16 × 64) transposed · b (16 × 256), by the tensor cores, without waiting.
__device__ __forceinline__ void multiply_transposed(float (&d)[TILE_N / 2], u32 a, u32 b) {
    asm volatile(
        "{\n"
        ".reg .b64 a, b;\n"
        "mov.b64 a, {%128, 0x40000040};\n"
        "mov.b64 b, {%129, 0x40000040};\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" SUMS_128 "}, a, b, 1, 1, 1, 1, 1;\n"
        "}\n" : OUT_32(0), OUT_32(32), OUT_32(64), OUT_32(96) : "r"(a), "r"(b));
}

// Writes four numbers if `there`. A branch would separate a warp's threads, and let every exchange wait for the last.
__device__ __forceinline__ void store_four_if(bool there, float* address, float4 v) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.f32 [%1], {%2, %3, %4, %5};\n}\n"
        ::"r"((int)there), "l"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

#endif

// A tile of a group's gradient, and the rows of the operands that it sums over.
struct Tile {
    int group, row, column;
    int first, count;
};

// The tiles of this thread block: numbers blockIdx.x, blockIdx.x + gridDim.x, … of the tiles of all groups.
struct Tiles {
    const Sizes& sizes;
    const int* ends;
    int number;

    __device__ Tiles(const Sizes& sizes, const int* ends) : sizes(sizes), ends(ends), number(blockIdx.x) {}

    __device__ bool next(Tile& tile) {
        int row_tiles = (sizes.rows + TILE_M - 1) / TILE_M, column_tiles = (sizes.columns + TILE_N - 1) / TILE_N;
        tile.group = number / (row_tiles * column_tiles);
        if (tile.group >= sizes.groups) return false;
        int inside = number - tile.group * (row_tiles * column_tiles), strip = inside / (row_tiles * STRIP);
        int width = min(STRIP, column_tiles - strip * STRIP), rest = inside - strip * row_tiles * STRIP;
        tile.column = (strip * STRIP + rest % width) * TILE_N;
        tile.row = rest / width * TILE_M;
        tile.first = tile.group > 0 ? ends[tile.group - 1] : 0;
        tile.count = ends[tile.group] - tile.first;
        number += gridDim.x;
        return true;
    }
};

// Copies the operands of every tile, from one thread.
__device__ __forceinline__ void copy_tiles(Tiles tiles, const TensorMap& a, const TensorMap& b, u32 shared) {
    Tile tile;
    Stage<STAGES> stage{0, 0};
    while (tiles.next(tile)) {
#pragma unroll 1
        for (int done = 0; done < tile.count; done += BLOCK, stage.advance()) {
            u32 full = shared + OFFSET_FULL + 8 * stage.index, target = shared + stage.index * BYTES_STAGE;
            int row = tile.first + done;
            barrier_wait(shared + OFFSET_EMPTY + 8 * stage.index, stage.parity ^ 1);
            barrier_expect(full, BYTES_STAGE);
            for (int box = 0; box < BOXES_A; box++)
                copy_box(target + box * BYTES_BOX, &a, tile.row + box * BOX, row, full);
            for (int box = 0; box < BOXES_B; box++)
                copy_box(target + BYTES_A + box * BYTES_BOX, &b, tile.column + box * BOX, row, full);
        }
    }
}

// Clears rows `count` to `end` - 1 of a stage, fewer than STEP, in what a warpgroup multiplies: its box of a and all of
// b. The other warpgroup clears the same rows of b, so that neither waits for the other.
__device__ __forceinline__ void clear_rows(u32 stage, int warpgroup, int count, int end) {
    int thread = threadIdx.x % 128;
    if (thread < (end - count) * 8) {  // a row of a box has 8 pieces of 16 bytes
        u32 place = stage + count * 128 + thread * 16;
        store_16(place + warpgroup * BYTES_BOX, make_uint4(0, 0, 0, 0));
        for (int box = 0; box < BOXES_B; box++)
            store_16(place + BYTES_A + box * BYTES_BOX, make_uint4(0, 0, 0, 0));
    }
    show_to_tensor_cores();
    if (warpgroup == 0)
        synchronize<1, 128>();
    else
        synchronize<2, 128>();
}

// What a warpgroup multiplies of a stage.
struct Operands {
    u32 a, b;

    __device__ Operands(u32 stage, int warpgroup)
        : a(transposed_descriptor(stage + warpgroup * BYTES_BOX)), b(transposed_descriptor(stage + BYTES_A)) {}
};

// Adds the rows of a group's whole blocks to the sums of a warpgroup.
__device__ __forceinline__ void multiply_blocks(
    float (&sums)[TILE_N / 2], int blocks, Stage<STAGES>& stage, int warpgroup, u32 shared) {
    bool arrives = threadIdx.x % 32 == 0;
    u32 of_before = 0;  // the barrier of the block before, which the tensor cores may still read
#pragma unroll 1
    for (int block = 0; block < blocks; block++, stage.advance()) {
        barrier_wait(shared + OFFSET_FULL + 8 * stage.index, stage.parity);
        Operands operands(shared + stage.index * BYTES_STAGE, warpgroup);
        pin(sums);
        begin_products();
#pragma unroll
        for (int step = 0; step < BLOCK / STEP; step++)
            multiply_transposed(sums, operands.a + step * 128, operands.b + step * 128);
        commit_products();
        wait_for_products<1>();
        if (arrives && block > 0) barrier_arrive(of_before);
        of_before = shared + OFFSET_EMPTY + 8 * stage.index;
    }
    wait_for_products<0>();
    pin(sums);
    if (arrives && blocks > 0) barrier_arrive(of_before);
}

// Adds the `count` rows of a group's last block, if it is no whole one.
__device__ __forceinline__ void multiply_rest(
    float (&sums)[TILE_N / 2], int count, Stage<STAGES>& stage, int warpgroup, u32 shared) {
    u32 place = shared + stage.index * BYTES_STAGE;
    int steps = (count + STEP - 1) / STEP;
    barrier_wait(shared + OFFSET_FULL + 8 * stage.index, stage.parity);
    if (count % STEP) clear_rows(place, warpgroup, count, steps * STEP);
    Operands operands(place, warpgroup);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        pin(sums);
        begin_products();
        multiply_transposed(sums, operands.a + step * 128, operands.b + step * 128);
        commit_products();
        wait_for_products<0>();
        pin(sums);
    }
    if (threadIdx.x % 32 == 0) barrier_arrive(shared + OFFSET_EMPTY + 8 * stage.index);
    stage.advance();
}

// Writes 16 rows × TILE_N columns of a warp. Of every 8 columns, thread t holds number 2 (t % 4) and the next one, in
// rows t / 4 and t / 4 + 8. Two neighbouring threads exchange numbers, so that each has 4 neighbours.
__device__ __forceinline__ void store(
    float* out, const float (&sums)[TILE_N / 2], int row, int column, const Sizes& sizes) {
    int lane = threadIdx.x % 32;
    bool odd = lane % 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = row + lane / 4 + 8 * half;
        float* target = out + (long long)at * sizes.columns + column;
#pragma unroll
        for (int i = 0; i < TILE_N / 8; i += 2) {
            const float *first = sums + 4 * i + 2 * half, *second = first + 4;
            float got_0 = __shfl_xor_sync(~0u, odd ? first[0] : second[0], 1);
            float got_1 = __shfl_xor_sync(~0u, odd ? first[1] : second[1], 1);
            float4 values = odd ? make_float4(got_0, got_1, second[0], second[1])
                                : make_float4(first[0], first[1], got_0, got_1);
            int place = 8 * (i + odd) + 4 * (lane % 4 / 2);
            store_four_if(at < sizes.rows && column + place < sizes.columns, target + place, values);
        }
    }
}

// Sums and stores every tile, from two warpgroups.
__device__ __forceinline__ void multiply_tiles(Tiles tiles, float* out, u32 shared) {
    const Sizes& sizes = tiles.sizes;
    int warp = threadIdx.x / 32;
    Tile tile;
    Stage<STAGES> stage{0, 0};
    while (tiles.next(tile)) {
        // So the compiler knows that a warp's threads stay together; else it lets products wait for each other.
        int count = __shfl_sync(~0u, tile.count, 0), rest = count % BLOCK;
        float sums[TILE_N / 2];
        // It also does that if the first product of a tile overwrites the sums and the others add to them.
#pragma unroll
        for (int i = 0; i < TILE_N / 2; i++) sums[i] = 0;
        multiply_blocks(sums, count / BLOCK, stage, warp / 4, shared);
        if (rest > 0) multiply_rest(sums, rest, stage, warp / 4, shared);
        store(out + (long long)tile.group * sizes.rows * sizes.columns, sums, tile.row + 16 * warp, tile.column, sizes);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) grouped_weight_gradient(
    const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const int* ends, float* out,
    const Sizes sizes) {
    u32 shared = shared_memory();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(shared + OFFSET_FULL + 8 * stage, 1);
            barrier_init(shared + OFFSET_EMPTY + 8 * stage, WARPS);
        }
        show_barriers();
    }
    __syncthreads();
    Tiles tiles(sizes, ends);
    if (threadIdx.x >= 32 * WARPS) {
        give_registers<REGISTERS_OF_COPIERS>();
        if (threadIdx.x == 32 * WARPS) copy_tiles(tiles, a, b, shared);
    } else {
        take_registers<REGISTERS>();
        multiply_tiles(tiles, out, shared);
    }
}
