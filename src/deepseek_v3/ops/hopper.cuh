// What the kernels in CUDA C++ share: types, barriers, the tensor memory accelerator (TMA), tiles for the tensor cores.
// `kernel_cache.py` puts this text in place of the line that includes it.

#ifndef EMULATED

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;  // its bits

struct alignas(64) TensorMap {
    u8 bytes[128];
};

// The first address of shared memory that swizzled tiles can begin at.
__device__ __forceinline__ u32 shared_memory() {
    extern __shared__ u8 dynamic[];
    return (static_cast<u32>(__cvta_generic_to_shared(dynamic)) + 1023) & ~1023u;
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives; the phase then ends only after `bytes` have been copied, too.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives when this thread's copies of numbers are done.
__device__ __forceinline__ void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// Whether the phase of this parity has ended.
__device__ __forceinline__ bool barrier_has_passed(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

// The barriers are initialized, for the copies too.
__device__ __forceinline__ void show_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Copies a box of a matrix into shared memory, without waiting.
__device__ __forceinline__ void copy_box(u32 target, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(target), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

__device__ __forceinline__ float load_shared(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ u32 as_bfloat16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ void store_16(u32 address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
        ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// A warpgroup that multiplies takes registers that one that copies has given.
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

// The operands of an instruction of the tensor cores: the sums of a thread, and the registers that they are in.
#define TEN(n) "%" n "0, %" n "1, %" n "2, %" n "3, %" n "4, %" n "5, %" n "6, %" n "7, %" n "8, %" n "9, "
#define SUMS_32 TEN("") TEN("1") TEN("2") "%30, %31"
#define SUMS_64 TEN("") TEN("1") TEN("2") TEN("3") TEN("4") TEN("5") "%60, %61, %62, %63"
#define SUMS_128 TEN("") TEN("1") TEN("2") TEN("3") TEN("4") TEN("5") TEN("6") TEN("7") TEN("8") TEN("9") TEN("10") \
    TEN("11") "%120, %121, %122, %123, %124, %125, %126, %127"
#define OUT_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
    "+f"(d[i + 6]), "+f"(d[i + 7])
#define OUT_32(i) OUT_8(i), OUT_8(i + 8), OUT_8(i + 16), OUT_8(i + 24)

// Keeps the compiler from moving or copying numbers that the tensor cores are about to write, or are writing.
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

// Waits until only the last PENDING groups of products are not complete.
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#endif

// Ordinary code, which the emulation of kernels on a CPU compiles, too.

// The low half of the descriptor of a tile in shared memory; adding n moves it by 16 n bytes along K. The high half,
// 0x40000040, says that TMA has swizzled its rows of 128 bytes, and that 8 rows lie 1024 bytes from the next 8.
__device__ __forceinline__ u32 descriptor(u32 address) {
    return address >> 4 | 1 << 16;
}

// The same of an operand whose rows are summed over, in tiles of 64 rows × 64 columns: it holds the distance of the next
// 64 columns, and adding 128 moves it by 16 rows.
__device__ __forceinline__ u32 transposed_descriptor(u32 address) {
    return address >> 4 | 64 * 128 / 16 << 16;
}

// One of COUNT stages of shared memory, and the parity of the phase in which its barriers are.
template <int COUNT>
struct Stage {
    u32 index, parity;

    __device__ void advance() {
        index += 1;
        if (index == COUNT) index = 0, parity ^= 1;
    }
};
