// Quantizing tiles to FP8 (e4m3) by rows and by columns, for Hopper (sm_90a).
//
// A thread block takes a tile of one block of 128 places (along the columns) by 128 numbers of a row. It loads the
// tile once and keeps it packed in registers. A thread holds 8 rows × 8 columns: 16 threads share a row and read 128
// of its numbers; half-warp h has rows 8 h … 8 h + 7. So the 8 numbers that a thread has of a column are 8 bytes in
// a row of the transposed tile, which goes through shared memory for the sake of stores of 16 bytes.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef u16 bf16;  // its bits

constexpr int BLOCK = 128;  // numbers with one scale, and the sides of a tile
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int SIDE = 8;      // rows and columns of a thread
constexpr int LANES = 16;    // threads that share a row
constexpr int STRIP = 4;     // tiles side by side that are taken before those of the next rows
constexpr u32 ALL = 0xffffffff;
constexpr u32 MAGNITUDES = 0x7fff7fff;  // the bits of two bfloat16 behind their signs
constexpr u32 FRACTION = (1 << 23) - 1;  // the bits of a float32 behind its exponent
constexpr float LARGEST = 448, SMALLEST_SCALE = 1.17549435e-38f;

// Of the rows in memory: their stride in bytes, how many they are, and their width; then the places of all groups.
struct Sizes {
    u32 stride;
    int rows, width, places, power_of_two;
};

// A tile: its block of places, its first column, its first row, and the end of the rows of its group.
struct Tile {
    int block, column, row, last;
};

// The tile of this thread block. Tiles are taken strip by strip, each `strip` tiles wide and as long as the columns.
// False behind the last group.
__device__ __forceinline__ bool find_tile(Tile& tile, const int2* rows_of_blocks, const Sizes& sizes, int strip) {
    int blocks = sizes.places / BLOCK, tiles = (sizes.width + BLOCK - 1) / BLOCK;
    int first = blockIdx.x / (blocks * strip) * strip, inside = blockIdx.x - first * blocks;
    int wide = min(strip, tiles - first);
    tile.block = inside / wide;
    tile.column = (first + inside % wide) * BLOCK;
    int2 rows = rows_of_blocks ? rows_of_blocks[tile.block] : make_int2(tile.block * BLOCK, sizes.rows);
    tile.row = rows.x;
    tile.last = rows.y;
    return rows.y > 0;
}

// The larger one of each of two pairs of 16-bit numbers.
__device__ __forceinline__ u32 larger_pair(u32 a, u32 b) {
    u32 found;
    asm("max.u16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    return found;
}

__device__ __forceinline__ float low_bfloat16(u32 pair) { return __uint_as_float(pair << 16); }

__device__ __forceinline__ float high_bfloat16(u32 pair) { return __uint_as_float(pair & 0xffff0000); }

__device__ __forceinline__ u32 e4m3_pair(float first, float second) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ __forceinline__ u32 e4m3_quad(float a, float b, float c, float d) {
    return e4m3_pair(a, b) | e4m3_pair(c, d) << 16;
}

// The scale of a block with this largest magnitude; NaN stays NaN.
__device__ __forceinline__ float scale_of(float largest, int power_of_two) {
    float scale = largest / LARGEST;
    if (scale < SMALLEST_SCALE) scale = SMALLEST_SCALE;
    if (power_of_two && scale == scale) scale = __uint_as_float((__float_as_uint(scale) + FRACTION) & ~FRACTION);
    return scale;
}

// Puts the 8 numbers that this thread has of a column of the tile into the transposed tile. Pieces of 8 bytes are
// swizzled, so that the 16 threads of a half-warp write to different banks.
__device__ __forceinline__ void put(uint4* transposed, int column, uint2 numbers) {
    int piece = threadIdx.x / LANES ^ column / SIDE;
    reinterpret_cast<uint2*>(transposed)[column * (BLOCK / 8) + piece] = numbers;
}

// Stores the transposed tile at `values`, the place of its first number in a matrix with rows of `places`; of its
// rows the first `rows`.
__device__ __forceinline__ void store_transposed(const uint4* transposed, u8* values, int places, int rows) {
#pragma unroll
    for (int i = 0; i < BLOCK * BLOCK / 16 / THREADS; i++) {
        int row = (threadIdx.x + i * THREADS) / 8, piece = threadIdx.x % 8, swizzle = row / SIDE;
        uint4 found = transposed[row * 8 + (piece ^ swizzle / 2)];
        if (swizzle % 2) found = make_uint4(found.z, found.w, found.x, found.y);
        if (row < rows) *reinterpret_cast<uint4*>(values + (long long)row * places + piece * 16) = found;
    }
}

// From 4 words of 16 threads, each with the magnitudes of two rows, the largest ones of rows 2 p and 2 p + 1, where
// p = threadIdx.x / 4 % 4. Each step halves the number of words; a thread passes on those that it does not keep.
__device__ __forceinline__ u32 largest_of_two_rows(u32 (&words)[4]) {
    bool upper = threadIdx.x & 8;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 passed = __shfl_xor_sync(ALL, upper ? words[i] : words[i + 2], 8);
        words[i] = larger_pair(upper ? words[i + 2] : words[i], passed);
    }
    upper = threadIdx.x & 4;
    u32 passed = __shfl_xor_sync(ALL, upper ? words[0] : words[1], 4);
    u32 word = larger_pair(upper ? words[1] : words[0], passed);
    word = larger_pair(word, __shfl_xor_sync(ALL, word, 2));
    return larger_pair(word, __shfl_xor_sync(ALL, word, 1));
}

// Quantizes the rows of x, or with `source` the rows x[source], by columns; with ROWS by rows, too.
template <bool ROWS>
__device__ __forceinline__ void quantize(
    const bf16* __restrict__ x, const long long* __restrict__ source, const int2* __restrict__ rows_of_blocks,
    u8* values, float* scales, u8* row_values, float* row_scales, const Sizes& sizes) {
    __shared__ uint4 transposed[BLOCK * BLOCK / 16];
    __shared__ uint4 of_warps[WARPS][LANES];  // the largest magnitudes of each column, in bfloat16
    __shared__ float4 inverses[BLOCK / 4];    // of the scales of columns
    Tile tile;
    if (!find_tile(tile, rows_of_blocks, sizes, source ? 1 : STRIP)) return;
    int lane = threadIdx.x % LANES, row = tile.row + threadIdx.x / LANES * SIDE;
    int column = tile.column + lane * SIDE;
    bool inside = column < sizes.width;

    u32 from = row + lane;  // thread r of a row's 16 threads knows where row r comes from
    if (source) from = lane < SIDE && row + lane < tile.last ? source[row + lane] : 0;
    const u8* start = reinterpret_cast<const u8*>(x + column);
    u32 packed[SIDE][4];
#pragma unroll
    for (int r = 0; r < SIDE; r++) {
        unsigned long long from_row = __shfl_sync(ALL, from, r, LANES);
        uint4 loaded = make_uint4(0, 0, 0, 0);
        if (inside && row + r < tile.last) loaded = *reinterpret_cast<const uint4*>(start + from_row * sizes.stride);
        packed[r][0] = loaded.x, packed[r][1] = loaded.y, packed[r][2] = loaded.z, packed[r][3] = loaded.w;
    }

    u32 of_rows[SIDE / 2], of_columns[4] = {0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < SIDE; r += 2) {
        u32 first = 0, second = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 a = packed[r][k] & MAGNITUDES, b = packed[r + 1][k] & MAGNITUDES;
            of_columns[k] = larger_pair(of_columns[k], larger_pair(a, b));
            first = larger_pair(first, a), second = larger_pair(second, b);
        }
        of_rows[r / 2] = larger_pair(__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632));
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        of_columns[k] = larger_pair(of_columns[k], __shfl_xor_sync(ALL, of_columns[k], LANES));
    if (threadIdx.x % 32 < LANES)
        of_warps[threadIdx.x / 32][lane] = make_uint4(of_columns[0], of_columns[1], of_columns[2], of_columns[3]);
    __syncthreads();

    if (threadIdx.x < BLOCK) {
        const u16* magnitudes = reinterpret_cast<const u16*>(of_warps) + threadIdx.x;
        u32 largest = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) largest = max(largest, u32(magnitudes[warp * BLOCK]));
        float scale = scale_of(low_bfloat16(largest), sizes.power_of_two);
        reinterpret_cast<float*>(inverses)[threadIdx.x] = 1 / scale;
        int own = tile.column + threadIdx.x;
        if (own < sizes.width) scales[(long long)tile.block * sizes.width + own] = scale;
    }
    if (ROWS) {
        u32 two_rows = largest_of_two_rows(of_rows);
        int own = row + lane / 4 * 2 + lane % 2;
        float scale = scale_of(lane % 2 ? high_bfloat16(two_rows) : low_bfloat16(two_rows), sizes.power_of_two);
        float inverse = 1 / scale;
        if (lane % 4 < 2 && own < tile.last)
            row_scales[(long long)own * ((sizes.width + BLOCK - 1) / BLOCK) + tile.column / BLOCK] = scale;
#pragma unroll
        for (int r = 0; r < SIDE; r++) {
            float by = __shfl_sync(ALL, inverse, r / 2 * 4 + r % 2, LANES);
            u32 words[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                u32 a = packed[r][2 * k], b = packed[r][2 * k + 1];
                words[k] = e4m3_quad(low_bfloat16(a) * by, high_bfloat16(a) * by, low_bfloat16(b) * by,
                    high_bfloat16(b) * by);
            }
            if (inside && row + r < tile.last)
                *reinterpret_cast<uint2*>(row_values + (long long)(row + r) * sizes.width + column) =
                    make_uint2(words[0], words[1]);
        }
    }
    __syncthreads();

#pragma unroll
    for (int half = 0; half < 2; half++) {
        float4 by = inverses[lane * 2 + half];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float by_low = k ? by.z : by.x, by_high = k ? by.w : by.y;
            u32 low[2], high[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                u32 a = packed[4 * r][2 * half + k], b = packed[4 * r + 1][2 * half + k];
                u32 c = packed[4 * r + 2][2 * half + k], d = packed[4 * r + 3][2 * half + k];
                low[r] = e4m3_quad(low_bfloat16(a) * by_low, low_bfloat16(b) * by_low, low_bfloat16(c) * by_low,
                    low_bfloat16(d) * by_low);
                high[r] = e4m3_quad(high_bfloat16(a) * by_high, high_bfloat16(b) * by_high,
                    high_bfloat16(c) * by_high, high_bfloat16(d) * by_high);
            }
            put(transposed, lane * SIDE + 4 * half + 2 * k, make_uint2(low[0], low[1]));
            put(transposed, lane * SIDE + 4 * half + 2 * k + 1, make_uint2(high[0], high[1]));
        }
    }
    __syncthreads();
    u8* target = values + (long long)tile.column * sizes.places + tile.block * BLOCK;
    store_transposed(transposed, target, sizes.places, sizes.width - tile.column);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) fp8_columns(
    const bf16* x, const long long* source, const int2* rows_of_blocks, u8* values, float* scales,
    const Sizes sizes) {
    quantize<false>(x, source, rows_of_blocks, values, scales, nullptr, nullptr, sizes);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) fp8_rows_and_columns(
    const bf16* x, u8* values, float* scales, u8* row_values, float* row_scales, const Sizes sizes) {
    quantize<true>(x, nullptr, nullptr, values, scales, row_values, row_scales, sizes);
}
