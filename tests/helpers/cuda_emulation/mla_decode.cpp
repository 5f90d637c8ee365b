// The kernels of ops/mla_decode/cuda/decode.cu as a function of a shared library.

#include "decode.cu"

extern "C" void run(
    int blocks, const bf16* queries, const void* pages, long page_rows, long columns, const int* table,
    const int* lengths, bf16* out, float* lse, float* parts, float* part_rows, int* added, float* kept, int batch,
    int queries_each, int heads, int most_parts, int shortest_part, int table_width, float scale) {
    TensorMap of_queries{queries, (long)batch * queries_each * heads, 2 * columns, 2, 128, true};
    long row_bytes = FP8 ? BYTES_RAW / KEYS : 2 * columns;
    TensorMap numbers{pages, page_rows, row_bytes, FP8 ? 1 : 2, 128, !FP8};
    TensorMap scales{pages, page_rows, row_bytes, 4, PIECES * 4, false}, rotated{pages, page_rows, row_bytes, 2, 128, true};
    Sizes sizes{batch, queries_each, heads, most_parts, shortest_part, table_width, scale * LOG2_E};
    launch(blocks, 384, [&] {
        mla_decode(of_queries, numbers, scales, rotated, table, lengths, out, lse, parts, part_rows, added, kept, sizes);
    });
    if (most_parts > 1)
        launch(2 * batch, 128, [&] { mla_decode_parts(lengths, out, lse, parts, part_rows, added, sizes); });
}
