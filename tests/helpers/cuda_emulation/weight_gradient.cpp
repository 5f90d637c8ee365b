// The kernel of ops/grouped_gemm/cuda/weight_gradient.cu as a function of a shared library.

#include "weight_gradient.cu"

extern "C" void run(
    int blocks, const bf16* a, const bf16* b, const int* ends, float* out, int summed_rows, int groups, int rows,
    int columns) {
    TensorMap of_a{a, summed_rows, 2L * rows, 2, 2 * BOX, true}, of_b{b, summed_rows, 2L * columns, 2, 2 * BOX, true};
    launch(blocks, 384, [&] { grouped_weight_gradient(of_a, of_b, ends, out, {groups, rows, columns}); });
}
