// Quantizing tiles to FP8 (e4m3) by rows and by columns, for Hopper (sm_90a).
//
// A thread block takes a tile of one block of 128 places (along the columns) by 128 numbers of a row. It loads the
// tile once and keeps it packed in registers. A thread holds 8 rows × 8 columns: 16 threads share a row, and
// half-warp h has rows 8 h to 8 h + 7. So the 8 numbers that a thread has of a column are 8 bytes in a row of the
// transposed tile, which goes through shared memory, for the sake of stores of 16 bytes.

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

// The tile of this thread block; false behind the last group. Tiles are taken by strips; one is `strip` tiles
// wide and as long as the columns. So rows that several groups share are read while they are in the cache.
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

// Puts a pair into a word. The second half comes first, because the conversion to e4m3 then adds the first half.
__device__ __forceinline__ void put_half(u32& word, bool second, u32 pair) {
    word = second ? pair : pair | word << 16;
}

// Stores two words, without a branch, across which the compiler would not join conversions to e4m3.
__device__ __forceinline__ void store_if(bool condition, u8* target, const u32 (&words)[2]) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v2.u32 [%1], {%2, %3};\n}"
        ::"r"(int(condition)), "l"(target), "r"(words[0]), "r"(words[1]) : "memory");
}

// The scale of a block with this largest magnitude; NaN stays NaN.
__device__ __forceinline__ float scale_of(float largest, int power_of_two) {
    float scale = largest / LARGEST;
    if (scale < SMALLEST_SCALE) scale = SMALLEST_SCALE;
    if (power_of_two && scale == scale) scale = __uint_as_float((__float_as_uint(scale) + FRACTION) & ~FRACTION);
    return scale;
}

// Puts 4 numbers of a column of the tile into the transposed tile, of the first or of the second 4 rows of this
// thread. Pieces of 16 bytes, and the two words of each half of a piece, change places according to the column, so
// that the threads of a warp write to different banks.
__device__ __forceinline__ void put(uint4* transposed, int column, int half, u32 numbers) {
    int word = threadIdx.x / LANES * 2 + half, swizzle = column / SIDE;
    reinterpret_cast<u32*>(transposed)[column * (BLOCK / 4) + (word ^ swizzle / 2 * 4 ^ swizzle % 2)] = numbers;
}

// Stores the transposed tile at `values`, the place of its first number in a matrix with rows of `places`; of its
// rows the first `rows`.
__device__ __forceinline__ void store_transposed(const uint4* transposed, u8* values, int places, int rows) {
#pragma unroll
    for (int i = 0; i < BLOCK * BLOCK / 16 / THREADS; i++) {
        int row = (threadIdx.x + i * THREADS) / 8, piece = threadIdx.x % 8, swizzle = row / SIDE;
        uint4 found = transposed[row * 8 + (piece ^ swizzle / 2)];
        if (swizzle % 2) found = make_uint4(found.y, found.x, found.w, found.z);
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
        if (inside && row + r < tile.last)
            loaded = *reinterpret_cast<const uint4*>(start + from_row * sizes.stride);
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
            int own = lane * SIDE + 4 * half + 2 * k;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                u32 a = packed[4 * r][2 * half + k], b = packed[4 * r + 1][2 * half + k];
                u32 c = packed[4 * r + 2][2 * half + k], d = packed[4 * r + 3][2 * half + k];
                u32 low = e4m3_quad(low_bfloat16(a) * by_low, low_bfloat16(b) * by_low, low_bfloat16(c) * by_low,
                    low_bfloat16(d) * by_low);
                u32 high = e4m3_quad(high_bfloat16(a) * by_high, high_bfloat16(b) * by_high,
                    high_bfloat16(c) * by_high, high_bfloat16(d) * by_high);
                put(transposed, own, r, low);
                put(transposed, own + 1, r, high);
            }
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

// What swiglu_backward multiplies the numbers of a row by: the gate by its scale, in the exponent by -log2(e) too;
// the up by its scale and the router's weight; the gradient of the hidden layer by the router's weight.
struct alignas(16) Row {
    float gate, exponent, up, weight;
};

// What swiglu_backward computes of a number: the hidden layer, the gradients of gate and up, and the gradient of up
// without the router's weight.
struct Results {
    float hidden, grad_gate, grad_up, unweighted;
};

constexpr int HIDDEN = 0, GRAD_GATE = 1, GRAD_UP = 2, RESULTS = 3;
constexpr int GATE = 0, UP = 1, SUM = 2;  // of a row: the largest gradients of gate and up, the weight's gradient

// Shared memory of swiglu_backward. The transposed tiles take the place of the magnitudes, which are read before.
struct Shared {
    union {
        uint4 transposed[RESULTS][BLOCK * BLOCK / 16];
        float of_warps[WARPS][RESULTS][BLOCK];  // the largest magnitudes of each column
    };
    float2 inverses[RESULTS][BLOCK / 2];  // of the scales of columns
    Row rows[BLOCK];
    float up_scales[BLOCK];
    float2 row_inverses[BLOCK];  // of the scales of the gradients of gate and up
};
static_assert(sizeof(Shared) == 54272, "the launch asks for this size");

// Two numbers, half a word, from e4m3 to float32.
__device__ __forceinline__ float2 from_e4m3(u32 word, int half) {
    u32 both;
    float2 found;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(u16(word >> 16 * half)));
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(found.x), "=f"(found.y) : "r"(both));
    return found;
}

__device__ __forceinline__ float power_of_two_of(float x) {
    float found;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
    return found;
}

__device__ __forceinline__ float reciprocal_of(float x) {
    float found;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
    return found;
}

// The larger one of two magnitudes; NaN if one of both is NaN.
__device__ __forceinline__ float larger(float a, float b) {
    float found;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(fabsf(a)), "f"(fabsf(b)));
    return found;
}

// From gate and up before they are multiplied with their scales, and the gradient of the hidden layer.
__device__ __forceinline__ Results backward(float gate, float up, float grad, const Row& row) {
    float sigmoid = reciprocal_of(1 + power_of_two_of(gate * row.exponent));
    float silu = gate * row.gate * sigmoid;
    float slope = silu * (1 - sigmoid) + sigmoid;  // of silu
    float unweighted = grad * silu;
    up *= row.up;
    return Results{silu * up, grad * up * slope, unweighted * row.weight, unweighted};
}

__device__ __forceinline__ Row row_at(const Shared& shared, int row) {
    float4 found = *reinterpret_cast<const float4*>(&shared.rows[row]);
    return Row{found.x, found.y, found.z, found.w};
}

// Of two values, the kind of which is known to the compiler: their sum, or the larger magnitude.
__device__ __forceinline__ float joined(int kind, float a, float b) { return kind == SUM ? a + b : larger(a, b); }

// Joins values of two rows with those of the thread whose number differs by `step`. The thread whose number has
// that bit keeps the second row, the other one the first row.
__device__ __forceinline__ float join_rows(int kind, float first, float second, int step) {
    bool upper = threadIdx.x & step;
    float passed = __shfl_xor_sync(ALL, upper ? first : second, step);
    return joined(kind, upper ? second : first, passed);
}

// From 8 rows × 8 columns of a thread: the largest magnitudes of each result in each column, and of each row those
// of its gradients, and its share of the gradient of the router's weight, divided by the scale of its up. Of the 16
// threads of a row, thread t ends with those of row t / 2.
__device__ __forceinline__ void find_largest(
    const u32 (&gate)[SIDE][2], const u32 (&up)[SIDE][2], const u32 (&grad)[SIDE][4], const Shared& shared,
    float (&of_columns)[RESULTS][SIDE], float (&of_row)[3]) {
    float waiting[3][3];  // of the one, two, or four rows before, joined
#pragma unroll
    for (int r = 0; r < SIDE; r++) {
        Row row = row_at(shared, threadIdx.x / LANES * SIDE + r);
        float of_this[3] = {0, 0, 0};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 gates = from_e4m3(gate[r][k / 2], k % 2), ups = from_e4m3(up[r][k / 2], k % 2);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float from = i ? high_bfloat16(grad[r][k]) : low_bfloat16(grad[r][k]);
                float by_up = i ? ups.y : ups.x;
                Results found = backward(i ? gates.y : gates.x, by_up, from, row);
                of_this[GATE] = larger(of_this[GATE], found.grad_gate);
                of_this[UP] = larger(of_this[UP], found.grad_up);
                of_this[SUM] += found.unweighted * by_up;
                float results[RESULTS] = {found.hidden, found.grad_gate, found.grad_up};
#pragma unroll
                for (int q = 0; q < RESULTS; q++)
                    of_columns[q][2 * k + i] = r ? larger(of_columns[q][2 * k + i], results[q]) : fabsf(results[q]);
            }
        }
#pragma unroll
        for (int kind = 0; kind < 3; kind++) {
            float value = of_this[kind];
#pragma unroll
            for (int level = 0; level < 3; level++) {
                bool second = (r >> level) % 2 && (r + 1) % (1 << level) == 0;  // this row ends a pair of such rows
                bool first = !((r >> level) % 2) && (r + 1) % (1 << level) == 0;
                if (first) waiting[level][kind] = value;
                if (second) value = join_rows(kind, waiting[level][kind], value, 2 << level);
            }
            of_row[kind] = value;
        }
    }
#pragma unroll
    for (int kind = 0; kind < 3; kind++)
        of_row[kind] = joined(kind, of_row[kind], __shfl_xor_sync(ALL, of_row[kind], 1));
}

// The largest magnitudes of the columns of this thread's two half-warps, to shared memory.
__device__ __forceinline__ void put_largest(const float (&of_columns)[RESULTS][SIDE], Shared& shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % LANES;
    bool upper = threadIdx.x & LANES;  // the second half-warp keeps the second half of the columns
#pragma unroll
    for (int q = 0; q < RESULTS; q++) {
        float kept[SIDE / 2];
#pragma unroll
        for (int i = 0; i < SIDE / 2; i++) {
            float passed = upper ? of_columns[q][i] : of_columns[q][i + SIDE / 2];
            kept[i] = upper ? of_columns[q][i + SIDE / 2] : of_columns[q][i];
            kept[i] = larger(kept[i], __shfl_xor_sync(ALL, passed, LANES));
        }
        float* target = &shared.of_warps[warp][q][lane * SIDE + (upper ? SIDE / 2 : 0)];
        *reinterpret_cast<float4*>(target) = make_float4(kept[0], kept[1], kept[2], kept[3]);
    }
}

// The results again, quantized: by rows to memory, by columns to the transposed tiles.
__device__ __forceinline__ void quantize_results(
    const u32 (&gate)[SIDE][2], const u32 (&up)[SIDE][2], const u32 (&grad)[SIDE][4], Shared& shared,
    u8* row_values, int width, int rows) {
    int lane = threadIdx.x % LANES, first_row = threadIdx.x / LANES * SIDE;
    u32 of_columns[RESULTS][SIDE];  // of 4 rows
#pragma unroll
    for (int two_rows = 0; two_rows < SIDE / 2; two_rows++) {
        int r = 2 * (two_rows ^ 1);
        u32 of_rows[2][2][2];  // of two rows, the gradients of gate and up, 4 columns each
#pragma unroll
        for (int two_columns = 0; two_columns < SIDE / 2; two_columns++) {
            int k = two_columns ^ 1;
            Results found[2][2];  // of two rows × two columns
#pragma unroll
            for (int s = 0; s < 2; s++) {
                float2 gates = from_e4m3(gate[r + s][k / 2], k % 2), ups = from_e4m3(up[r + s][k / 2], k % 2);
                u32 grads = grad[r + s][k];
                Row row = row_at(shared, first_row + r + s);
                found[s][0] = backward(gates.x, ups.x, low_bfloat16(grads), row);
                found[s][1] = backward(gates.y, ups.y, high_bfloat16(grads), row);
                float2 by = shared.row_inverses[first_row + r + s];
                u32 of_gate = e4m3_pair(found[s][0].grad_gate * by.x, found[s][1].grad_gate * by.x);
                u32 of_up = e4m3_pair(found[s][0].grad_up * by.y, found[s][1].grad_up * by.y);
                put_half(of_rows[s][0][k / 2], k % 2, of_gate);
                put_half(of_rows[s][1][k / 2], k % 2, of_up);
            }
            float2 by[RESULTS];
#pragma unroll
            for (int q = 0; q < RESULTS; q++) by[q] = shared.inverses[q][lane * (SIDE / 2) + k];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                Results first = found[0][i], second = found[1][i];
                float of_hidden = i ? by[HIDDEN].y : by[HIDDEN].x, of_gate = i ? by[GRAD_GATE].y : by[GRAD_GATE].x;
                float of_up = i ? by[GRAD_UP].y : by[GRAD_UP].x;
                int column = 2 * k + i;
                u32 hidden = e4m3_pair(first.hidden * of_hidden, second.hidden * of_hidden);
                u32 grad_gate = e4m3_pair(first.grad_gate * of_gate, second.grad_gate * of_gate);
                u32 grad_up = e4m3_pair(first.grad_up * of_up, second.grad_up * of_up);
                put_half(of_columns[HIDDEN][column], r % 4, hidden);
                put_half(of_columns[GRAD_GATE][column], r % 4, grad_gate);
                put_half(of_columns[GRAD_UP][column], r % 4, grad_up);
            }
        }
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                store_if(r + s < rows, row_values + u32((2 * (r + s) + i) * width), of_rows[s][i]);
        if (r % 4) continue;
#pragma unroll
        for (int q = 0; q < RESULTS; q++)
#pragma unroll
            for (int column = 0; column < SIDE; column++)
                put(shared.transposed[q], lane * SIDE + column, r / 4, of_columns[q][column]);
    }
}

// The width is a multiple of 128. `sums` takes the share of each tile in the gradients of the router's weights,
// which are `gates`.
extern "C" __global__ void __launch_bounds__(THREADS, 2) fp8_swiglu_backward(
    const u8* __restrict__ kept, const float* __restrict__ kept_scales, const bf16* __restrict__ grad_hidden,
    const float* __restrict__ gates, const int2* __restrict__ rows_of_blocks, u8* row_values, float* row_scales,
    u8* values, float* scales, u8* hidden_values, float* hidden_scales, float* sums, const Sizes sizes) {
    extern __shared__ uint4 dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    Tile tile;
    if (!find_tile(tile, rows_of_blocks, sizes, STRIP)) return;
    int width = sizes.width, blocks = width / BLOCK, lane = threadIdx.x % LANES;
    int row = tile.row + threadIdx.x / LANES * SIDE, column = tile.column + lane * SIDE;

    u32 gate[SIDE][2], up[SIDE][2], grad[SIDE][4];
    const u8* start = kept + (unsigned long long)row * (2u * width) + column;
    const u8* grad_start = reinterpret_cast<const u8*>(grad_hidden + column);
#pragma unroll
    for (int r = 0; r < SIDE; r++) {
        uint2 gates_loaded = make_uint2(0, 0), ups_loaded = make_uint2(0, 0);
        uint4 loaded = make_uint4(0, 0, 0, 0);
        if (row + r < tile.last) {
            gates_loaded = *reinterpret_cast<const uint2*>(start + u32(2 * r * width));
            ups_loaded = *reinterpret_cast<const uint2*>(start + u32((2 * r + 1) * width));
            loaded = *reinterpret_cast<const uint4*>(grad_start + (unsigned long long)(row + r) * sizes.stride);
        }
        gate[r][0] = gates_loaded.x, gate[r][1] = gates_loaded.y, up[r][0] = ups_loaded.x, up[r][1] = ups_loaded.y;
        grad[r][0] = loaded.x, grad[r][1] = loaded.y, grad[r][2] = loaded.z, grad[r][3] = loaded.w;
    }
    if (threadIdx.x < BLOCK) {
        int own = tile.row + threadIdx.x;
        float gate_scale = 0, up_scale = 0, weight = 0;
        if (own < tile.last) {
            const float* at = kept_scales + (long long)own * (2 * blocks) + tile.column / BLOCK;
            gate_scale = at[0], up_scale = at[blocks], weight = gates ? gates[own] : 1;
        }
        shared.rows[threadIdx.x] = Row{gate_scale, -1.44269504f * gate_scale, up_scale * weight, weight};
        shared.up_scales[threadIdx.x] = up_scale;
    }
    __syncthreads();

    float of_columns[RESULTS][SIDE], of_row[3];
    find_largest(gate, up, grad, shared, of_columns, of_row);
    put_largest(of_columns, shared);
    int own = row + lane / 2, is_up = lane % 2;
    float scale = scale_of(is_up ? of_row[UP] : of_row[GATE], sizes.power_of_two);
    reinterpret_cast<float*>(shared.row_inverses)[threadIdx.x / LANES * (2 * SIDE) + lane] = 1 / scale;
    if (own < tile.last) {
        row_scales[(long long)own * (2 * blocks) + is_up * blocks + tile.column / BLOCK] = scale;
        if (gates && !is_up)
            sums[(long long)own * blocks + tile.column / BLOCK] = of_row[SUM] * shared.up_scales[own - tile.row];
    }
    __syncthreads();

    for (int own = threadIdx.x; own < RESULTS * BLOCK; own += THREADS) {
        int result = own / BLOCK, inside = own % BLOCK;
        float largest = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) largest = larger(largest, shared.of_warps[warp][result][inside]);
        float scale = scale_of(largest, sizes.power_of_two);
        reinterpret_cast<float*>(shared.inverses[result])[inside] = 1 / scale;
        float* target = scales + (long long)tile.block * (2 * width) + (result == GRAD_UP ? width : 0);
        if (result == HIDDEN) target = hidden_scales + (long long)tile.block * width;
        target[tile.column + inside] = scale;
    }
    __syncthreads();

    u8* row_target = row_values + (long long)row * (2 * width) + column;
    quantize_results(gate, up, grad, shared, row_target, width, tile.last - row);
    __syncthreads();
    long long places = sizes.places, at = tile.column * places + tile.block * BLOCK;
    store_transposed(shared.transposed[HIDDEN], hidden_values + at, sizes.places, BLOCK);
    store_transposed(shared.transposed[GRAD_GATE], values + at, sizes.places, BLOCK);
    store_transposed(shared.transposed[GRAD_UP], values + at + width * places, sizes.places, BLOCK);
}
