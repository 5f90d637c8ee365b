// Runs a CUDA kernel on a CPU: every thread of a thread block is a fiber, and what the kernel does by inline assembly is
// done here by ordinary code. It shows wrong indices, masks, barriers that never pass, and values that are read before
// they were written or overwritten before they were read. It is no model of time, and trusts that the layouts of the
// tensor cores' operands are those of the PTX manual, as they are written down here.

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
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
inline Index threadIdx, blockIdx, gridDim;

[[noreturn]] inline void fail(const char* what, u32 which) {
    fprintf(stderr, "emulated kernel: %s %u, thread %d of block %d\n", what, which, threadIdx.x, blockIdx.x);
    std::_Exit(3);
}

// Fibers: one thread of the host runs all threads of a thread block. Each runs until it must wait for others. Then one of
// those that need not wait is drawn at random, in the same way in every launch. Some are held back for a while, a thread,
// a warp or a warpgroup, or until no other can run. So a barrier that is missing shows.

typedef std::vector<std::function<void()>> Products;

struct Fiber {
    ucontext_t start;
    jmp_buf place;  // where it waits
    bool has_started = false;
    Products products;             // of the tensor cores: not committed yet
    std::deque<Products> committed;  // and not waited for
};
inline std::vector<Fiber> fibers;  // `threadIdx.x` is the number of the one that runs
inline std::vector<int> ready;     // those that need not wait
inline int unfinished;
inline int held_from, held_until;  // those that are held back
inline unsigned long long drawn;
inline jmp_buf after_all;
inline std::function<void()> kernel_of_fibers;

inline int draw(int count) {
    drawn = drawn * 6364136223846793005 + 1442695040888963407;
    return (drawn >> 33) % count;
}

inline void hold_others_back() {
    constexpr int SIZES[] = {1, 32, 128};
    int size = SIZES[draw(3)];
    held_from = draw(fibers.size() / size) * size;
    held_until = held_from + size;
}

// The place in `ready` of the fiber that runs next.
inline int draw_ready() {
    int count = ready.size(), first = draw(count);
    for (int i = 0; i < count; i++) {
        int place = (first + i) % count;
        if (ready[place] < held_from || ready[place] >= held_until) return place;
    }
    hold_others_back();
    return first;
}

[[noreturn]] inline void run_next(const char* what, u32 which) {
    if (ready.empty()) fail(what, which);
    if (draw(256) == 0) hold_others_back();
    int place = draw_ready();
    threadIdx.x = std::exchange(ready[place], ready.back());
    ready.pop_back();
    Fiber& fiber = fibers[threadIdx.x];
    if (fiber.has_started) _longjmp(fiber.place, 1);
    fiber.has_started = true;
    setcontext(&fiber.start);
    std::abort();
}

inline void run_fiber() {
    kernel_of_fibers();
    if (--unfinished == 0) _longjmp(after_all, 1);
    run_next("ends while others wait in vain; it is", threadIdx.x);
}

// Where fibers wait until another one opens it.
struct Gate {
    std::vector<int> waiting;

    void wait(const char* what, u32 which) {
        waiting.push_back(threadIdx.x);
        if (!_setjmp(fibers[threadIdx.x].place)) run_next(what, which);
    }
    void open() {
        ready.insert(ready.end(), waiting.begin(), waiting.end());
        waiting.clear();
    }
};

struct Barrier {
    int threads, arrived = 0;
    Gate gate;

    void arrive_and_wait() {
        if (++arrived < threads) return gate.wait("waits in vain for a barrier; threads that it needs:", threads);
        arrived = 0;
        gate.open();
    }
};

// The state of one thread block.

struct Warp {
    Barrier together{32};
    float numbers[32];
    u32 words[32];
};
struct Warpgroup {
    Barrier together{128};
    u32 fragments[128][4];
    float rows[64][16], columns[256][16];  // the operands of a product
};
struct CopyBarrier {
    int expected, missing;
    long bytes;
    u32 phase;
    Gate gate;
};
struct NamedBarrier {
    int arrived = 0;
    Gate gate;
};
struct Block {
    alignas(1024) u8 memory[232448];
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;
    Barrier together;
    std::map<u32, CopyBarrier> barriers;
    NamedBarrier named[16];

    explicit Block(int threads) : warps(threads / 32), warpgroups(threads / 128), together{threads} {
        memset(memory, 0xff, sizeof memory);  // NaN in bfloat16 and in float32
    }
};
inline Block* block;

inline Warp& warp_of_thread() { return block->warps[threadIdx.x / 32]; }
inline Warpgroup& warpgroup_of_thread() { return block->warpgroups[threadIdx.x / 128]; }
inline int lane_of_thread() { return threadIdx.x % 32; }

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
    barrier.gate.open();
}

inline void barrier_init(u32 address, u32 arrivals) {
    block->barriers[address] = {int(arrivals), int(arrivals), 0, 0, {}};
}

inline void barrier_expect(u32 address, u32 bytes) {
    CopyBarrier& barrier = block->barriers.at(address);
    if (!barrier.missing) fail("too many arrivals at barrier", address);
    barrier.missing -= 1;
    barrier.bytes += bytes;
    end_phase_if_complete(barrier);
}

inline void barrier_arrive(u32 address) { barrier_expect(address, 0); }

inline void barrier_wait(u32 address, u32 parity) {
    CopyBarrier& barrier = block->barriers.at(address);
    while (barrier.phase % 2 == parity) barrier.gate.wait("waits in vain for barrier", address);
}

inline bool barrier_has_passed(u32 address, u32 parity) {
    return block->barriers.at(address).phase % 2 != parity;
}

inline void arrive_at(int name, int threads, bool waits) {
    NamedBarrier& barrier = block->named[name];
    barrier.arrived += 1;
    if (barrier.arrived == threads) {
        barrier.arrived = 0;
        barrier.gate.open();
    } else if (waits) {
        barrier.gate.wait("waits in vain for named barrier", name);
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
    Warpgroup& group = warpgroup_of_thread();
    for (int i = threadIdx.x % 128; i < 64 * 16; i += 128) group.rows[i / 16][i % 16] = a(i / 16, i % 16);
    for (int i = threadIdx.x % 128; i < 2 * N * 16; i += 128) group.columns[i / 16][i % 16] = b(i / 16, i % 16);
    group.together.arrive_and_wait();
    int first = threadIdx.x % 128 / 32 * 16 + lane_of_thread() / 4;
    for (int i = 0; i < N; i++) {
        int row = first + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * (lane_of_thread() % 4) + i % 2;
        float sum = add ? sums[i] : 0;
        for (int k = 0; k < 16; k++) sum += group.rows[row][k] * group.columns[column][k];
        sums[i] = sum;
    }
}

// Products run when a thread waits for them: as late as the GPU may run them.
inline void add_product(std::function<void()> product) { fibers[threadIdx.x].products.push_back(std::move(product)); }
inline void begin_products() {}
inline void commit_products() {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.committed.push_back(std::exchange(fiber.products, {}));
}

template <int PENDING>
inline void wait_for_products() {
    std::deque<Products>& committed = fibers[threadIdx.x].committed;
    for (; committed.size() > PENDING; committed.pop_front())
        for (auto& product : committed.front()) {
            warpgroup_of_thread().together.arrive_and_wait();
            product();
            warpgroup_of_thread().together.arrive_and_wait();
        }
}

inline void multiply_keys(float (&sums)[32], u32 queries, u32 keys, int add) {
    add_product([&sums, queries, keys, add] {
        multiply(sums, [=](int row, int k) { return operand(queries, row, k); },
            [=](int column, int k) { return operand(keys, column, k); }, add);
    });
}

template <int N>
inline void multiply_values(float (&sums)[N], const u32* weights, u32 values) {
    add_product([&sums, weights, values] {
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
    add_product([&sums, weights, values] {
        multiply(sums, [=](int row, int k) { return operand(weights, row, k); },
            [=](int column, int k) { return transposed_operand(values, column, k); }, true);
    });
}

template <int N>
inline void multiply_transposed(float (&sums)[N], u32 a, u32 b) {
    add_product([&sums, a, b] {
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
    constexpr int STACK = 1 << 17;  // bytes
    std::unique_ptr<u8[]> stacks(new u8[(long)threads * STACK]);
    kernel_of_fibers = kernel;
    drawn = 0;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        Block state(threads);
        block = &state;
        fibers = std::vector<Fiber>(threads);
        for (int thread = 0; thread < threads; thread++) {
            ucontext_t& start = fibers[thread].start;
            getcontext(&start);
            start.uc_stack.ss_sp = stacks.get() + (long)thread * STACK;
            start.uc_stack.ss_size = STACK;
            makecontext(&start, run_fiber, 0);
            ready.push_back(thread);
        }
        unfinished = threads;
        hold_others_back();
        if (!_setjmp(after_all)) run_next("does not begin:", 0);
    }
}

#include "hopper.cuh"  // the part of it that is ordinary code
