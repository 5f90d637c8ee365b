// What the kernels in CUDA C++ share: types, barriers, the tensor memory accelerator (TMA), tiles for the tensor cores.
// `kernel_cache.py` puts this text in place of the line that includes it.

typedef unsigned char u8;
typedef unsigned int u32;
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

// The low half of the descriptor of a tile in shared memory; adding n moves it by 16 n bytes along K. The high half,
// 0x40000040, says that TMA has swizzled its rows of 128 bytes, and that 8 rows lie 1024 bytes from the next 8.
__device__ __forceinline__ u32 descriptor(u32 address) {
    return address >> 4 | 1 << 16;
}

__device__ __forceinline__ u32 as_bfloat16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
