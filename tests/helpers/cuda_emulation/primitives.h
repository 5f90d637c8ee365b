// Runs a CUDA kernel on a CPU: every thread of a thread block is a thread of the host, and what the kernel does by
// inline assembly is done here by ordinary code. It shows wrong indices, masks, barriers that never pass, and values
// that are read before they were written or overwritten before they were read. It is no model of time, and trusts that
// the layouts of the tensor cores' operands are those of the PTX manual, as they are written down here.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned short bf16;  // its bits

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

// A matrix in memory; TMA copies boxes of 64 rows of it.
struct TensorMap {
    const void* numbers;
    long rows, row_bytes;
    int number_bytes, box_bytes;  // of a row of the box
    bool swizzled;
};

struct Index {
    int x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim;

// The state of one thread block.

struct Warp {
    std::barrier<> together{32};
    float numbers[32];
    u32 words[32];
};
struct Warpgroup {
    std::barrier<> together{128};
    u32 fragments[128][4];
};
struct CopyBarrier {
    int expected, missing;
    long bytes;
    u32 phase;
};
struct NamedBarrier {
    int arrived = 0;
    u32 phase = 0;
};
struct Block {
    alignas(1024) u8 memory[232448];
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;
    std::barrier<> together;
    std::mutex mutex;
    std::condition_variable changed;
    std::map<u32, CopyBarrier> barriers;
    NamedBarrier named[16];

    explicit Block(int threads) : warps(threads / 32), warpgroups(threads / 128), together(threads) {
        memset(memory, 0xff, sizeof memory);  // NaN in bfloat16 and in float32
    }
};
inline Block* block;

inline Warp& warp_of_thread() { return block->warps[threadIdx.x / 32]; }
inline Warpgroup& warpgroup_of_thread() { return block->warpgroups[threadIdx.x / 128]; }
inline int lane_of_thread() { return threadIdx.x % 32; }

[[noreturn]] inline void fail(const char* what, u32 which) {
    fprintf(stderr, "emulated kernel: %s %u, thread %d of block %d\n", what, which, threadIdx.x, blockIdx.x);
    std::_Exit(3);
}

template <typename Passed>
inline void wait_until(std::unique_lock<std::mutex>& lock, const char* what, u32 which, Passed passed) {
    if (!block->changed.wait_for(lock, std::chrono::minutes(3), passed)) fail(what, which);
}

inline u32 shared_memory() { return 0; }

// Warps

inline float __shfl_xor_sync(u32, float x, int mask) {
    Warp& warp = warp_of_thread();
    warp.numbers[lane_of_thread()] = x;
    warp.together.arrive_and_wait();
    float result = warp.numbers[lane_of_thread() ^ mask];
    warp.together.arrive_and_wait();
    return result;
}

template <typename Word>
inline Word __shfl_sync(u32, Word x, int lane) {
    Warp& warp = warp_of_thread();
    memcpy(&warp.words[lane_of_thread()], &x, 4);
    warp.together.arrive_and_wait();
    Word result;
    memcpy(&result, &warp.words[lane], 4);
    warp.together.arrive_and_wait();
    return result;
}

inline bool __all_sync(u32, bool x) {
    Warp& warp = warp_of_thread();
    warp.words[lane_of_thread()] = x;
    warp.together.arrive_and_wait();
    bool result = std::all_of(warp.words, warp.words + 32, [](u32 each) { return each; });
    warp.together.arrive_and_wait();
    return result;
}

inline u32 __ballot_sync(u32, bool x) {
    Warp& warp = warp_of_thread();
    warp.words[lane_of_thread()] = x;
    warp.together.arrive_and_wait();
    u32 result = 0;
    for (int lane = 0; lane < 32; lane++) result |= warp.words[lane] << lane;
    warp.together.arrive_and_wait();
    return result;
}

inline int __ffs(u32 x) { return __builtin_ffs(x); }

inline void __syncwarp() { warp_of_thread().together.arrive_and_wait(); }
inline void __syncthreads() { block->together.arrive_and_wait(); }

// Barriers

inline void end_phase_if_complete(CopyBarrier& barrier) {
    if (barrier.missing || barrier.bytes) return;
    barrier.phase += 1;
    barrier.missing = barrier.expected;
    block->changed.notify_all();
}

inline void barrier_init(u32 address, u32 arrivals) {
    std::lock_guard lock(block->mutex);
    block->barriers[address] = {int(arrivals), int(arrivals), 0, 0};
}

inline void barrier_expect(u32 address, u32 bytes) {
    std::lock_guard lock(block->mutex);
    CopyBarrier& barrier = block->barriers.at(address);
    if (!barrier.missing) fail("too many arrivals at barrier", address);
    barrier.missing -= 1;
    barrier.bytes += bytes;
    end_phase_if_complete(barrier);
}

inline void barrier_arrive(u32 address) { barrier_expect(address, 0); }

inline void barrier_wait(u32 address, u32 parity) {
    std::unique_lock lock(block->mutex);
    CopyBarrier& barrier = block->barriers.at(address);
    wait_until(lock, "waits in vain for barrier", address, [&] { return barrier.phase % 2 != parity; });
}

inline bool barrier_has_passed(u32 address, u32 parity) {
    std::lock_guard lock(block->mutex);
    return block->barriers.at(address).phase % 2 != parity;
}

inline void arrive_at(int name, int threads, bool waits) {
    std::unique_lock lock(block->mutex);
    NamedBarrier& barrier = block->named[name];
    u32 phase = barrier.phase;
    barrier.arrived += 1;
    if (barrier.arrived == threads) {
        barrier.arrived = 0;
        barrier.phase += 1;
        block->changed.notify_all();
    } else if (waits) {
        wait_until(lock, "waits in vain for named barrier", name, [&] { return barrier.phase != phase; });
    }
}

template <int NAME, int THREADS>
inline void arrive() { arrive_at(NAME, THREADS, false); }
template <int NAME, int THREADS>
inline void synchronize() { arrive_at(NAME, THREADS, true); }
inline void show_barriers() {}
inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}
inline void show_to_tensor_cores() {}

// Registers

template <int NUMBER>
inline void give_registers() {}
template <int NUMBER>
inline void take_registers() {}
template <int N>
inline void pin(float (&)[N]) {}

// Memory

// Addresses of 16 bytes are exchanged within rows of 128 bytes, by the number of the row.
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(u32 target, const TensorMap* map, int column, int row, u32 barrier) {
    for (int r = 0; r < 64; r++)
        for (int c = 0; c < map->box_bytes; c++) {
            long from = column * map->number_bytes + c;
            bool there = row + r < map->rows && from < map->row_bytes;
            u32 to = target + r * map->box_bytes + c;
            block->memory[map->swizzled ? swizzled(to) : to] =
                there ? static_cast<const u8*>(map->numbers)[(row + r) * map->row_bytes + from] : 0;
        }
    std::lock_guard lock(block->mutex);
    CopyBarrier& waiting = block->barriers.at(barrier);
    waiting.bytes -= 64 * map->box_bytes;
    end_phase_if_complete(waiting);
}

inline void copy_of_pages(u32 target, const TensorMap* map, int column, int row, u32 barrier) {
    copy_box(target, map, column, row, barrier);
}

inline float load_shared(u32 address) {
    float value;
    memcpy(&value, block->memory + address, 4);
    return value;
}
inline void store_shared(u32 address, float value) { memcpy(block->memory + address, &value, 4); }
inline void store_16(u32 address, uint4 value) { memcpy(block->memory + address, &value, 16); }
inline uint4 load_16(u32 address) {
    uint4 value;
    memcpy(&value, block->memory + address, 16);
    return value;
}

inline float4 load_four(const float* address) {
    float4 value;
    memcpy(&value, address, 16);
    return value;
}

inline void store_four_if(bool there, float* address, float4 value) {
    if (there) memcpy(address, &value, 16);
}

inline float4 load_kept(const float* address) { return load_four(address); }
inline void store_kept(float* address, float4 value) { memcpy(address, &value, 16); }

// Numbers

inline float exp2_of(float x) { return exp2f(x); }

inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
    unsigned long long all = x | (unsigned long long)y << 32;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= u32(all >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}

inline float wide(bf16 bits) {
    u32 word = u32(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

inline bf16 narrow(float x) {
    u32 word;
    memcpy(&word, &x, 4);
    return x != x ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

inline u32 as_bfloat16(float low, float high) { return narrow(low) | u32(narrow(high)) << 16; }

inline float e4m3(u32 bits) {
    int exponent = bits >> 3 & 15, fraction = bits & 7;
    float value = exponent ? ldexpf(1 + fraction / 8.f, exponent - 7) : ldexpf(fraction / 8.f, -6);
    if ((bits & 127) == 127) value = NAN;
    return bits & 128 ? -value : value;
}

inline u32 scaled_pair(u32 two, float scale) { return as_bfloat16(e4m3(two & 255) * scale, e4m3(two >> 8 & 255) * scale); }

inline u32 product_of_pairs(u32 one, u32 other) {
    return as_bfloat16(wide(one & 0xffff) * wide(other & 0xffff), wide(one >> 16) * wide(other >> 16));
}

// Tensor cores. A thread holds columns 8 i + 2 (lane % 4) and the next one, of rows lane / 4 and lane / 4 + 8.

inline float at(u32 place) {
    bf16 bits;
    memcpy(&bits, block->memory + swizzled(place), 2);
    return wide(bits);
}

// Of an operand whose columns are summed over, and of one whose rows are.
inline float operand(u32 descriptor, int row, int k) {
    return at(((descriptor & 0x3fff) << 4) + row / 8 * 1024 + row % 8 * 128 + k * 2);
}
inline float transposed_operand(u32 descriptor, int column, int k) {
    u32 distance = (descriptor >> 16 & 0x3fff) << 4;
    return at(((descriptor & 0x3fff) << 4) + column / 64 * distance + k / 8 * 1024 + k % 8 * 128 + column % 64 * 2);
}

template <int N, typename A, typename B>
inline void multiply(float (&sums)[N], A a, B b, bool add) {
    int first = threadIdx.x % 128 / 32 * 16 + lane_of_thread() / 4;
    for (int i = 0; i < N; i++) {
        int row = first + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * (lane_of_thread() % 4) + i % 2;
        float sum = add ? sums[i] : 0;
        for (int k = 0; k < 16; k++) sum += a(row, k) * b(column, k);
        sums[i] = sum;
    }
}

// Products run when a thread waits for them: as late as the GPU may run them.
typedef std::vector<std::function<void()>> Products;
inline thread_local Products products;             // not committed yet
inline thread_local std::deque<Products> committed;  // and not waited for

inline void begin_products() {}
inline void commit_products() {
    committed.push_back(std::move(products));
    products.clear();
}

template <int PENDING>
inline void wait_for_products() {
    for (; committed.size() > PENDING; committed.pop_front())
        for (auto& product : committed.front()) {
            warpgroup_of_thread().together.arrive_and_wait();
            product();
            warpgroup_of_thread().together.arrive_and_wait();
        }
}

inline void multiply_keys(float (&sums)[32], u32 queries, u32 keys, int add) {
    products.push_back([&sums, queries, keys, add] {
        multiply(sums, [=](int row, int k) { return operand(queries, row, k); },
            [=](int column, int k) { return operand(keys, column, k); }, add);
    });
}

template <int N>
inline void multiply_values(float (&sums)[N], const u32* weights, u32 values) {
    products.push_back([&sums, weights, values] {
        Warpgroup& group = warpgroup_of_thread();
        memcpy(group.fragments[threadIdx.x % 128], weights, 16);
        group.together.arrive_and_wait();
        auto weight = [&](int row, int k) {
            u32 pair = group.fragments[row / 16 * 32 + row % 8 * 4 + k % 8 / 2][row % 16 / 8 + k / 8 * 2];
            return wide(k % 2 ? pair >> 16 : pair);
        };
        multiply(sums, weight, [=](int column, int k) { return transposed_operand(values, column, k); }, true);
    });
}

template <int N>
inline void multiply_values(float (&sums)[N], u32 weights, u32 values) {
    products.push_back([&sums, weights, values] {
        multiply(sums, [=](int row, int k) { return operand(weights, row, k); },
            [=](int column, int k) { return transposed_operand(values, column, k); }, true);
    });
}

template <int N>
inline void multiply_transposed(float (&sums)[N], u32 a, u32 b) {
    products.push_back([&sums, a, b] {
        multiply(sums, [=](int row, int k) { return transposed_operand(a, row, k); },
            [=](int column, int k) { return transposed_operand(b, column, k); }, true);
    });
}

inline void store_matrices(u32 address, const u32* numbers) {
    Warp& warp = warp_of_thread();
    int lane = lane_of_thread();
    warp.words[lane] = address;
    warp.together.arrive_and_wait();
    for (int i = 0; i < 4; i++) memcpy(block->memory + warp.words[8 * i + lane / 4] + lane % 4 * 4, numbers + i, 4);
    warp.together.arrive_and_wait();
}

// Runs `kernel` as every thread of `blocks` thread blocks, one block after the other.
template <typename Kernel>
void launch(int blocks, int threads, Kernel kernel) {
    gridDim.x = blocks;
    for (int number = 0; number < blocks; number++) {
        Block state(threads);
        block = &state;
        std::vector<std::thread> all;
        for (int thread = 0; thread < threads; thread++)
            all.emplace_back([&, thread] {
                threadIdx.x = thread;
                blockIdx.x = number;
                kernel();
            });
        for (std::thread& each : all) each.join();
    }
}

#include "hopper.cuh"  // the part of it that is ordinary code
